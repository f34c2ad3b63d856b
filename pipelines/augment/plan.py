"""What a batch goes through on a GPU, as one table that a single copy brings there.

A row of the table belongs to an image and holds 64-bit words, whole numbers or the bits of float64. It begins with
`HEAD` words: whether the image is flipped; top, left, height and width of what is erased (height 0: nothing); the
noise's key. Then each layer has `LAYER` words: the step that the image takes, plus `FRESH` where it is its first; three
parameters of the step; and the number of another image, which makes the column a list of the batch in the order of
`Kind`. A kernel is launched for the part of that list that needs it.

Layers in which an image takes no step come first, so that it enters at its own first step, straight from the pixels of
the loader, and every image's last step is in the last layer, which also normalises and erases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from pipelines.augment.neighbourhood import box_weights
from pipelines.augment.operations import Op
from pipelines.augment.point import Arguments

HEAD, LAYER = 6, 5
"""Words of a row before its layers, and of a layer."""
FRESH = 1 << 8
"""Added to the step of a layer that reads the loader's pixels instead of what the layer before has left."""
BLUR_COLUMNS = len(Op)
"""A blur is two steps: along the rows, which is `Op.BLUR`, and along the columns."""
COUNTS = 3 * 256 + 2
"""Numbers kept of an image that is counted: how often each level of each channel occurs; the sum of its grey values;
one more, so that those of every image begin at a multiple of 16 bytes."""


class Kind(IntEnum):
    """What an image needs in a layer."""

    COUNTED = 0
    """Its grey levels counted, then a table of what becomes of each, then each looked up."""
    TABLED = 1
    """The same without the count."""
    POINTWISE = 2
    """Arithmetic on each pixel."""
    GATHERED = 3
    """Several pixels for each."""
    IDLE = 4


_KINDS = np.full(BLUR_COLUMNS + 1, Kind.GATHERED, dtype=np.int8)  # numpy sorts small numbers in linear time
_KINDS[[Op.INVERT, Op.POSTERIZE, Op.SOLARIZE, Op.SOLARIZE_ADD, Op.BRIGHTNESS]] = Kind.TABLED
_KINDS[[Op.AUTO_CONTRAST, Op.EQUALIZE, Op.CONTRAST]] = Kind.COUNTED
_KINDS[[Op.COLOR]] = Kind.POINTWISE
_KINDS[[Op.NONE]] = Kind.IDLE
_ENDING = np.arange(Kind.IDLE, dtype=np.int8)[:, None]


@dataclass(frozen=True)
class Plan:
    """What one batch goes through."""

    table: NDArray[np.int64]
    """(B, HEAD + LAYER * layers)."""
    ends: tuple[int, ...]
    """For each layer four places in its list: where those `COUNTED`, `TABLED`, `POINTWISE` and `GATHERED` end."""


def layers_of(ends: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """`Plan.ends` by layer."""
    return list(zip(*(ends[kind :: Kind.IDLE] for kind in range(Kind.IDLE)), strict=True))


def num_launches(ends: Sequence[int]) -> int:
    """Kernels that carry out a plan, one that clears the counts included; the copy of the table is not."""
    launches, counts = 0, 0
    for counted, tabled, pointwise, gathered in layers_of(ends):
        counts += counted > 0
        launches += (tabled > 0) + (pointwise > 0) + (gathered > pointwise)
    return launches + counts + (counts > 0)


def make_plan(
    num_images: int,
    operations: NDArray[np.int64] | None = None,
    arguments: Arguments | None = None,
    flips: NDArray[np.bool_] | None = None,
    erased: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]] | None = None,
) -> Plan:
    """The plan of `num_images` images.

    Args:
        num_images: B.
        operations: (L, B), carried out in this order; `pipelines.augment.operations.Op`.
        arguments: (L, B), theirs.
        flips: Which images are flipped, before everything else, (B,).
        erased: Places in the batch, rectangles and noise keys, as `RandomErasing.draw` returns them.
    """
    if operations is None or arguments is None or not len(operations):
        operations, arguments = np.zeros((1, num_images), dtype=np.int64), np.zeros((1, num_images))
    steps, parameters = _ordered(*_steps(operations, arguments))
    num_layers = len(steps)
    table = np.zeros((num_images, HEAD + LAYER * num_layers), dtype=np.int64)
    if flips is not None:
        table[:, 0] = flips
    if erased is not None:
        places, rectangles, keys = erased
        table[places, 1:5], table[places, 5] = rectangles, keys
    layers = table[:, HEAD:].reshape(num_images, num_layers, LAYER)
    layers[:, :, 0] = steps.T
    num_idle = np.minimum((steps == Op.NONE).sum(axis=0), num_layers - 1)
    layers[np.arange(num_images), num_idle, 0] += FRESH
    layers[:, :, 1:4] = parameters.view(np.int64).transpose(1, 0, 2)
    kinds = _KINDS[steps]
    np.copyto(kinds[-1], Kind.POINTWISE, where=kinds[-1] == Kind.IDLE)  # at least normalised
    layers[:, :, 4] = kinds.argsort(axis=1, kind="stable").T
    ends = (kinds[:, None, :] <= _ENDING).sum(axis=2)  # (layers, 4)
    return Plan(table, tuple(ends.ravel().tolist()))


def _steps(operations: NDArray[np.int64], arguments: Arguments) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The kernels' steps (layers, B) and their parameters (layers, B, 3)."""
    steps, parameters = operations.copy(), np.zeros((*operations.shape, 3))
    parameters[:, :, 0] = arguments
    # A row is shifted by parameter 0 for each pixel of its height, plus parameter 1.
    for translation, shear in ((Op.TRANSLATE_X, Op.SHEAR_X), (Op.TRANSLATE_Y, Op.SHEAR_Y)):
        moved = operations == translation
        steps[moved] = shear
        parameters[moved, 0], parameters[moved, 1] = 0, arguments[moved]
    turned = operations == Op.ROTATE
    angles = np.radians(arguments[turned])
    parameters[turned, 0], parameters[turned, 1] = np.cos(angles), np.sin(angles)
    posterized = operations == Op.POSTERIZE
    parameters[posterized, 0] = 256 - 2 ** (8 - arguments[posterized])  # the bits kept
    blurred = operations == Op.BLUR
    if not blurred.any():
        return steps, parameters
    parameters[blurred] = box_weights(arguments[blurred])
    twice = np.stack((np.where(blurred, Op.BLUR, Op.NONE), np.where(blurred, BLUR_COLUMNS, steps)), axis=1)
    return twice.reshape(-1, steps.shape[1]), parameters.repeat(2, axis=0)


def _ordered(
    steps: NDArray[np.int64], parameters: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """With what is idle at the front, and without layers where everything is, the last one apart."""
    active, num_images = steps != Op.NONE, steps.shape[1]
    later = active[::-1].cumsum(axis=0)[::-1]  # steps of an image from this layer on
    num_layers = max(1, int(later[0].max(initial=0)))
    ordered, with_parameters = np.zeros((num_layers, num_images), dtype=np.int64), np.zeros((num_layers, num_images, 3))
    chosen = np.flatnonzero(active)
    where = (num_layers - later.ravel()[chosen]) * num_images + chosen % num_images
    ordered.reshape(-1)[where] = steps.reshape(-1)[chosen]
    with_parameters.reshape(-1, 3)[where] = parameters.reshape(-1, 3)[chosen]
    return ordered, with_parameters
