"""What a batch goes through on a GPU, as one table that a single copy brings there.

A row of the table belongs to an image and holds 64-bit words, whole numbers or the bits of float64. It begins with
`HEAD` words: whether the image is flipped; top, left, height and width of what is erased (height 0: nothing); the key of
the noise. Then each layer has `LAYER` words: the step it takes, plus `FRESH` where it is the image's first; and three
parameters of the step.

Layers in which an image takes no step come first, so that it enters at its own first step, straight from the pixels of
the loader, and every image's last step is in the last layer, which also normalises and erases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.augment.neighbourhood import box_weights
from pipelines.augment.operations import Op
from pipelines.augment.point import Arguments

HEAD, LAYER = 6, 4
"""Words of a row before its layers, and of a layer."""
FRESH = 1 << 8
"""Added to the step of a layer that reads the loader's pixels instead of what the layer before has left."""
BLUR_COLUMNS = len(Op)
"""A blur is two steps: along the rows, which is `Op.BLUR`, and along the columns."""

POINT_OPS = tuple(range(Op.AUTO_CONTRAST, Op.CONTRAST + 1))
"""Steps that look every grey level up in a table."""
COUNTED_OPS = (Op.AUTO_CONTRAST, Op.EQUALIZE, Op.CONTRAST)
"""Steps that must have counted the image's grey levels before."""
NEEDS_TABLES, NEEDS_COUNTS = 1, 2
"""Bits of `Plan.passes`."""


@dataclass(frozen=True)
class Plan:
    """What one batch goes through."""

    table: NDArray[np.int64]
    """(B, HEAD + LAYER * layers)."""
    passes: tuple[int, ...]
    """For every layer `NEEDS_TABLES` and `NEEDS_COUNTS`, where any image does."""

    @property
    def num_launches(self) -> int:
        """Kernels that carry it out, one that clears the counts included; the copy of the table is not."""
        counts = sum(bool(needs & NEEDS_COUNTS) for needs in self.passes)
        return len(self.passes) + sum(bool(needs & NEEDS_TABLES) for needs in self.passes) + counts + bool(counts)


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
    steps, parameters = _steps(num_images, operations, arguments)
    num_layers = len(steps)
    table = np.zeros((num_images, HEAD + LAYER * num_layers), dtype=np.int64)
    if flips is not None:
        table[:, 0] = flips
    if erased is not None:
        places, rectangles, keys = erased
        table[places, 1:5], table[places, 5] = rectangles, keys
    layers = table[:, HEAD:].reshape(num_images, num_layers, LAYER)
    num_idle = np.minimum((steps == Op.NONE).sum(axis=0), num_layers - 1)
    layers[:, :, 0] = steps.T
    layers[np.arange(num_images), num_idle, 0] += FRESH
    layers[:, :, 1:] = parameters.view(np.int64).transpose(1, 0, 2)
    passes = NEEDS_TABLES * _any_of(steps, POINT_OPS) + NEEDS_COUNTS * _any_of(steps, COUNTED_OPS)
    return Plan(table, tuple(passes.tolist()))


def _any_of(steps: NDArray[np.int64], chosen: tuple[int, ...]) -> NDArray[np.int64]:
    """For every layer 1 where an image takes one of the `chosen` steps in it, else 0."""
    member = np.zeros(BLUR_COLUMNS + 1, dtype=np.int64)
    member[list(chosen)] = 1
    return member[steps].max(axis=1, initial=0)


def _steps(
    num_images: int, operations: NDArray[np.int64] | None, arguments: Arguments | None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Steps (layers, B) and their parameters (layers, B, 3), with all that is idle at the front; at least one layer."""
    if operations is None or arguments is None or not len(operations):
        return np.zeros((1, num_images), dtype=np.int64), np.zeros((1, num_images, 3))
    steps, parameters = operations.copy(), np.zeros((*operations.shape, 3))
    parameters[:, :, 0] = arguments

    def put(chosen: NDArray[np.bool_], step: int, *values: Any) -> None:
        steps[chosen] = step
        parameters[chosen] = np.stack(np.broadcast_arrays(*values), axis=-1)

    # A row is shifted by parameter 0 for each pixel of its height, plus parameter 1.
    moved = {name: operations == name for name in (Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE, Op.POSTERIZE, Op.BLUR)}
    for translation, shear in ((Op.TRANSLATE_X, Op.SHEAR_X), (Op.TRANSLATE_Y, Op.SHEAR_Y)):
        put(moved[translation], shear, 0.0, arguments[moved[translation]], 0.0)
    angles = np.radians(arguments[moved[Op.ROTATE]])
    put(moved[Op.ROTATE], Op.ROTATE, np.cos(angles), np.sin(angles), 0.0)
    put(moved[Op.POSTERIZE], Op.POSTERIZE, 256 - 2 ** (8 - arguments[moved[Op.POSTERIZE]]), 0.0, 0.0)
    blurred = moved[Op.BLUR]
    if blurred.any():
        parameters[blurred] = box_weights(arguments[blurred])
        columns = np.where(blurred, BLUR_COLUMNS, steps)
        rows = np.where(blurred, steps, Op.NONE)
        twice = blurred.any(axis=1)
        pairs = [pair[1 - both :] for *pair, both in zip(rows, columns, twice, strict=True)]
        steps = np.stack([layer for pair in pairs for layer in pair])
        parameters = np.repeat(parameters, 1 + twice, axis=0)
    order = np.argsort(steps != Op.NONE, axis=0, kind="stable")
    steps = np.take_along_axis(steps, order, axis=0)
    parameters = np.take_along_axis(parameters, order[:, :, None], axis=0)
    num_unused = min(int((steps == Op.NONE).all(axis=1).sum()), len(steps) - 1)
    return steps[num_unused:], parameters[num_unused:]
