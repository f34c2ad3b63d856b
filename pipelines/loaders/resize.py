"""Resizing one image on the CPU: the antialiased kernels of torchvision's `resize`, several times as fast as DALI's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipelines.base import Interpolation

# torchvision's function allocates its result and takes 9 us longer to get to the kernel, all of it with the
# interpreter's lock: at 16 threads a third of what can be resized.
_KERNELS = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
}


def crop_and_resize(pixels: Tensor, box: Sequence[int], into: Tensor, interpolation: Interpolation) -> None:
    """Fill `into`, uint8 (3, S, S), with the region `box` (top, left, height, width) of uint8 (3, H, W)."""
    top, left, height, width = box
    _resize(pixels[:, top : top + height, left : left + width], into, interpolation)


def resize_and_crop(
    pixels: Tensor, size: Sequence[int], corner: Sequence[int], into: Tensor, interpolation: Interpolation
) -> None:
    """Resize uint8 (3, H, W) to `size` (height, width) and fill `into`, (3, S, S), from `corner` (top, left) on."""
    top, left = corner
    side = into.shape[-1]
    resized = torch.empty((*size, 3), dtype=torch.uint8).permute(2, 0, 1)
    _resize(pixels, resized, interpolation)
    into.copy_(resized[:, top : top + side, left : left + side])


def _resize(pixels: Tensor, into: Tensor, interpolation: Interpolation) -> None:
    """Fastest where both are channels last in memory."""
    size = list(into.shape[-2:])
    _KERNELS[interpolation](pixels.unsqueeze(0), size, False, None, None, out=into.unsqueeze(0))
