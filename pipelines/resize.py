"""Resizing one image on the CPU: torchvision's antialiased kernels, several times as fast as DALI's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from pipelines.base import Interpolation


def crop_and_resize(pixels: Tensor, box: Sequence[int], side: int, interpolation: Interpolation) -> Tensor:
    """The region `box` (top, left, height, width) of uint8 (3, H, W) as (3, side, side), whatever its shape."""
    top, left, height, width = box
    return _resize(pixels[:, top : top + height, left : left + width], [side, side], interpolation)


def resize_and_crop(
    pixels: Tensor, size: Sequence[int], corner: Sequence[int], side: int, interpolation: Interpolation
) -> Tensor:
    """uint8 (3, H, W) resized to `size` (height, width), of which the square at `corner` (top, left) is kept."""
    top, left = corner
    return _resize(pixels, list(size), interpolation)[:, top : top + side, left : left + side]


def _resize(pixels: Tensor, size: list[int], interpolation: Interpolation) -> Tensor:
    resized: Tensor = resize(pixels, size, interpolation=InterpolationMode(interpolation), antialias=True)
    return resized
