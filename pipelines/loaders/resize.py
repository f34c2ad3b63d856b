"""Resizing one image on the CPU: the antialiased kernels of torchvision's `resize`, several times as fast as DALI's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipelines.base import Interpolation

# The functions below `torch.nn.functional.interpolate`. torchvision's allocates its result and takes 9 us longer to get
# to the kernel, the operators of `torch.ops` 3 us, all of it with the interpreter's lock.
_KERNELS: dict[Interpolation, Any] = {
    "bilinear": torch._C._nn._upsample_bilinear2d_aa,
    "bicubic": torch._C._nn._upsample_bicubic2d_aa,
}


def crop_and_resize(pixels: Tensor, box: Sequence[int], into: Tensor, interpolation: Interpolation) -> None:
    """Fill `into`, uint8 (1, 3, S, S), with the region `box` (top, left, height, width) of uint8 (3, H, W)."""
    top, left, height, width = box
    _, rows, columns = stride = pixels.stride()
    first = pixels.storage_offset() + top * rows + left * columns
    # One call in place of the three that would slice and add a dimension.
    _resize(pixels.as_strided((1, 3, height, width), (pixels.numel(), *stride), first), into, interpolation)


def resize_and_crop(
    pixels: Tensor, size: Sequence[int], corner: Sequence[int], into: Tensor, interpolation: Interpolation
) -> None:
    """Resize uint8 (3, H, W) to `size` (height, width) and fill `into`, (1, 3, S, S), from `corner` (top, left) on."""
    top, left = corner
    side = into.shape[-1]
    resized = torch.empty((1, *size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    _resize(pixels.unsqueeze(0), resized, interpolation)
    into.copy_(resized[..., top : top + side, left : left + side])


def _resize(pixels: Tensor, into: Tensor, interpolation: Interpolation) -> None:
    """(1, 3, H, W) to (1, 3, h, w). Fastest where both are channels last in memory."""
    _KERNELS[interpolation](pixels, into.shape[2:], False, None, None, out=into)
