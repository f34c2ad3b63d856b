"""Operations that replace each grey level by another: one table of 256 entries per image and channel.

Each equals Pillow's (`ImageOps`, `ImageEnhance`) exactly. All take and return uint8 (G, 3, S, S); G is the number of
images an operation was drawn for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment.transfer import to_device

_LEVELS = np.arange(256)


def lookup(images: Tensor, tables: Tensor) -> Tensor:
    """Each value replaced by its entry in `tables`, uint8 (G, 3, 256) or (G, 1, 256) for all channels alike."""
    tables = tables.expand(-1, 3, -1)
    return tables.gather(2, images.flatten(2).long()).view_as(images)


def invert_table(_: NDArray[np.float64]) -> NDArray[Any]:
    return 255 - _LEVELS


def posterize_table(bits: NDArray[np.float64]) -> NDArray[Any]:
    """Keeps the top `bits` of each level."""
    dropped = 8 - bits.astype(np.int64)[:, None]
    return _LEVELS >> dropped << dropped


def solarize_table(threshold: NDArray[np.float64]) -> NDArray[Any]:
    """Inverts the levels from `threshold` on."""
    return np.where(threshold[:, None] > _LEVELS, _LEVELS, 255 - _LEVELS)


def solarize_add_table(addend: NDArray[np.float64]) -> NDArray[Any]:
    """Adds to the levels below 128."""
    return np.where(_LEVELS < 128, np.minimum(_LEVELS + addend[:, None], 255), _LEVELS)


def brightness_table(factor: NDArray[np.float64]) -> NDArray[Any]:
    """Blends with black. Single precision and truncation, as Pillow's blend has them."""
    return np.clip(factor[:, None].astype(np.float32) * _LEVELS.astype(np.float32), 0, 255)


def to_bytes(values: Tensor) -> Tensor:
    """Truncates float32 values between 0 and 255; in two steps, which torch does in half the time of one."""
    return values.to(torch.int16).to(torch.uint8)


def blend(degenerate: Tensor, image: Tensor, factor: Tensor) -> Tensor:
    """Pillow's blend of float32 values: `factor` 0 gives `degenerate`, 1 gives `image`; truncated to uint8."""
    return to_bytes((image - degenerate).mul_(factor).add_(degenerate).clamp_(0, 255))


def luma(values: Tensor) -> Tensor:
    """Pillow's grey value of float32 (G, 3, S, S), in (G, 1, S, S): integers below 2^24, so float32 loses nothing."""
    red, green, blue = values.unbind(1)
    total = (red * 19595).add_(green * 38470).add_(blue * 7471).add_(0x8000)
    return total.mul_(2.0**-16).floor_().unsqueeze(1)


def contrast(images: Tensor, factor: NDArray[np.float64]) -> Tensor:
    """Blends with the mean grey value; `factor` (G,), 0 is that grey."""
    sums = luma(images.to(torch.float32)).to(torch.int64).sum((1, 2, 3))
    num_pixels = images.shape[2] * images.shape[3]
    mean = (2 * sums + num_pixels).div(2 * num_pixels, rounding_mode="floor")  # nearest, halves up
    levels = torch.arange(256, dtype=torch.float32, device=images.device)
    factors = to_device(factor.astype(np.float32), images.device)[:, None]
    return lookup(images, blend(mean.to(torch.float32)[:, None], levels, factors).unsqueeze(1))


def auto_contrast(images: Tensor, _: NDArray[np.float64]) -> Tensor:
    """Stretches each channel to the full range."""
    low, high = (extreme[..., None].to(torch.float64) for extreme in (images.amin((2, 3)), images.amax((2, 3))))
    levels = torch.arange(256, dtype=torch.float64, device=images.device)
    # Double precision in this order, and a division (torch makes 255 / x a product): truncation shows the last bit.
    scale = torch.full_like(low, 255).div_((high - low).clamp_(min=1))
    stretched = (levels * scale).add_(-low * scale).clamp_(0, 255)
    return lookup(images, torch.where(high > low, stretched, levels).to(torch.uint8))


def equalize(images: Tensor, _: NDArray[np.float64]) -> Tensor:
    """Makes each channel's histogram as even as a table can."""
    values = images.flatten(2).long()
    histogram = torch.zeros((*values.shape[:2], 256), dtype=torch.int64, device=images.device)
    histogram.scatter_add_(2, values, histogram.new_ones(()).expand_as(values))
    num_brightest = histogram.gather(2, images.amax((2, 3)).long().unsqueeze(2))  # (G, 3, 1)
    step = (values.shape[2] - num_brightest).div(255, rounding_mode="floor")
    darker = histogram.cumsum(2) - histogram
    divisor = step.clamp(min=1)
    even = (darker + step.div(2, rounding_mode="floor")).div(divisor, rounding_mode="floor").clamp_(max=255)
    levels = torch.arange(256, device=images.device)
    tables = torch.where(step > 0, even, levels).to(torch.uint8)
    return tables.gather(2, values).view_as(images)
