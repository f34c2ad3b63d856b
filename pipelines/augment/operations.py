"""A list of operations per image, carried out over the batch: images that share an operation go through it together.

Which images those are is known on the host before the device has done anything, so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment import geometric, neighbourhood, point
from pipelines.augment.point import Arguments
from pipelines.augment.transfer import to_device
from pipelines.base import Interpolation


class Op(IntEnum):
    """Operations, each with what its argument is."""

    NONE = 0
    AUTO_CONTRAST = 1
    EQUALIZE = 2
    INVERT = 3
    POSTERIZE = 4  # bits kept, 1 to 8
    SOLARIZE = 5  # the first level inverted
    SOLARIZE_ADD = 6  # what is added to levels below 128
    BRIGHTNESS = 7  # factor; 1 changes nothing, 0 is black
    CONTRAST = 8  # factor; 0 is the mean grey
    COLOR = 9  # factor; 0 is grey
    SHARPNESS = 10  # factor; 0 is smoothed
    BLUR = 11  # standard deviation in pixels
    SHEAR_X = 12  # pixels a row is shifted by, per pixel of height
    TRANSLATE_X = 13  # pixels
    SHEAR_Y = 14
    TRANSLATE_Y = 15
    ROTATE = 16  # degrees, counter-clockwise


_INDEPENDENT: dict[Op, Callable[[Tensor, Arguments], Tensor]] = {
    Op.AUTO_CONTRAST: point.auto_contrast,
    Op.EQUALIZE: point.equalize,
    Op.INVERT: point.invert,
    Op.POSTERIZE: point.posterize,
    Op.SOLARIZE: point.solarize,
    Op.SOLARIZE_ADD: point.solarize_add,
    Op.BRIGHTNESS: point.brightness,
    Op.CONTRAST: point.contrast,
    Op.COLOR: neighbourhood.color,
    Op.SHARPNESS: neighbourhood.sharpness,
    Op.BLUR: neighbourhood.blur,
}
"""Those that need nothing but the image and their argument."""

_ROWS, _COLUMNS = (Op.SHEAR_X, Op.TRANSLATE_X), (Op.SHEAR_Y, Op.TRANSLATE_Y)
_GROUPS = (*((op,) for op in _INDEPENDENT), _ROWS, _COLUMNS, (Op.ROTATE,))
"""Operations that one pass carries out together."""
_GROUP_OF = np.array([next((number for number, group in enumerate(_GROUPS) if op in group), -1) for op in Op])

_CPU_IMAGES, _GPU_IMAGES = 1, 128
"""Images a pass takes at most: what a CPU's cache holds with the intermediate values; a bound on a GPU's memory."""


def apply(
    images: Tensor,
    operations: NDArray[np.int64],
    arguments: Arguments,
    *,
    fill: tuple[int, int, int] = (0, 0, 0),
    interpolation: Interpolation = "bicubic",
) -> Tensor:
    """A new uint8 (B, 3, S, S) in which image b went through operations[0, b], operations[1, b], ... in this order.

    `operations` and `arguments` are (L, B). `fill` is the colour of what comes in from outside the image.
    """
    images = images.clone(memory_format=torch.contiguous_format)
    size = _CPU_IMAGES if images.device.type == "cpu" else _GPU_IMAGES
    filling = to_device(np.array(fill, dtype=np.uint8), images.device)
    # Moving NONE to the end of each image's list leaves fewer, larger groups.
    order = np.argsort(operations == Op.NONE, axis=0, kind="stable")
    operations = np.take_along_axis(operations, order, axis=0)
    arguments = np.take_along_axis(arguments, order, axis=0)
    for layer, layer_arguments in zip(operations, arguments, strict=True):
        groups = _GROUP_OF[layer]
        for number, group in enumerate(_GROUPS):
            members = np.flatnonzero(groups == number)
            for start in range(0, len(members), size):
                rows = members[start : start + size]
                where = to_device(rows, images.device)
                chosen = images.index_select(0, where)
                changed = _apply_group(group, chosen, layer[rows], layer_arguments[rows], filling, interpolation)
                _words(images).index_copy_(0, where, _words(changed))
    return images


def _words(images: Tensor) -> Tensor:
    """One row per image, eight bytes as one number if they divide evenly: torch copies numbers one at a time."""
    rows = images.flatten(1)
    return rows.view(torch.int64) if rows.shape[1] % 8 == 0 else rows


def _apply_group(
    group: tuple[Op, ...],
    images: Tensor,
    operations: NDArray[np.int64],
    arguments: Arguments,
    fill: Tensor,
    interpolation: Interpolation,
) -> Tensor:
    if group[0] in _INDEPENDENT:
        return _INDEPENDENT[group[0]](images, arguments)
    if group == (Op.ROTATE,):
        return geometric.rotate(images, arguments, fill, interpolation)
    sheared = np.isin(operations, (Op.SHEAR_X, Op.SHEAR_Y))[:, None]
    lines = np.arange(images.shape[2]) + 0.5
    shift = np.where(sheared, arguments[:, None] * lines, arguments[:, None])  # (G, S)
    along = geometric.shift_rows if group == _ROWS else geometric.shift_columns
    return along(images, shift, fill, interpolation)


def moves(operations: NDArray[np.int64], arguments: Arguments, side: int) -> NDArray[np.float32]:
    """Where the pixels of images of `side` pixels that went through `apply` come from, layer by layer: float32
    (B, L, 2, 3), as `View.moves` has it. What moves no pixel has the identity."""
    shape = operations.shape
    a, b, c, d, e, f = (np.full(shape, value) for value in (1.0, 0.0, 0.0, 0.0, 1.0, 0.0))
    for op, entry, scale in (
        (Op.SHEAR_X, b, 1),
        (Op.TRANSLATE_X, c, side),
        (Op.SHEAR_Y, d, 1),
        (Op.TRANSLATE_Y, f, side),
    ):
        np.copyto(entry, arguments / scale, where=operations == op)
    turned, angle = operations == Op.ROTATE, np.radians(arguments)
    cosine, sine = np.cos(angle), np.sin(angle)
    for entry, value in ((a, cosine), (b, -sine), (c, (1 - cosine + sine) / 2)):  # about the centre
        np.copyto(entry, value, where=turned)
    for entry, value in ((d, sine), (e, cosine), (f, (1 - cosine - sine) / 2)):
        np.copyto(entry, value, where=turned)
    return np.stack((a, b, c, d, e, f), axis=-1).reshape(*shape, 2, 3).swapaxes(0, 1).astype(np.float32)
