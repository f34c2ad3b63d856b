"""Operations that replace each grey level by another, whatever its neighbours.

Each equals Pillow's (`ImageOps`, `ImageEnhance`) exactly. All take uint8 (G, 3, S, S), G being the number of images an
operation was drawn for, and one argument per image, (G,); all return uint8 of the same shape.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment.transfer import to_device

Arguments = NDArray[np.float64]


def per_image(values: Arguments, like: Tensor, dtype: type[np.generic] = np.float32) -> Tensor:
    """One number per image, (G, 1, 1, 1), on the device of `like`."""
    return to_device(values.astype(dtype), like.device).view(-1, 1, 1, 1)


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


def invert(images: Tensor, _: Arguments) -> Tensor:
    return ~images


def posterize(images: Tensor, bits: Arguments) -> Tensor:
    """Keeps the top `bits`, 1 to 8, of each level."""
    return images & per_image(256 - 2 ** (8 - bits), images, np.uint8)


def solarize(images: Tensor, threshold: Arguments) -> Tensor:
    """Inverts the levels from `threshold`, 0 to 256, on."""
    inverted = images >= per_image(threshold, images, np.int16)
    return images ^ inverted.to(torch.uint8).neg_()


def solarize_add(images: Tensor, addend: Arguments) -> Tensor:
    """Adds to the levels below 128; at most 128, so that none exceeds 255."""
    return images + (images < 128) * per_image(addend, images, np.uint8)


def brightness(images: Tensor, factor: Arguments) -> Tensor:
    """Blends with black."""
    return to_bytes(images.to(torch.float32).mul_(per_image(factor, images)).clamp_(0, 255))


def contrast(images: Tensor, factor: Arguments) -> Tensor:
    """Blends with the mean grey value."""
    values = images.to(torch.float32)
    sums = luma(values).to(torch.int64).sum((1, 2, 3), keepdim=True)
    num_pixels = images.shape[2] * images.shape[3]
    mean = (2 * sums + num_pixels).div(2 * num_pixels, rounding_mode="floor")  # nearest, halves up
    return blend(mean.to(torch.float32), values, per_image(factor, images))


def auto_contrast(images: Tensor, _: Arguments) -> Tensor:
    """Stretches each channel to the full range."""
    low, high = (extreme[..., None].to(torch.float64) for extreme in (images.amin((2, 3)), images.amax((2, 3))))
    levels = torch.arange(256, dtype=torch.float64, device=images.device)
    # Double precision in this order, and a division (torch makes 255 / x a product): truncation shows the last bit.
    scale = torch.full_like(low, 255).div_((high - low).clamp_(min=1))
    stretched = (levels * scale).add_(-low * scale).clamp_(0, 255)
    tables = torch.where(high > low, stretched, levels).to(torch.uint8)  # (G, 3, 256)
    return tables.gather(2, images.flatten(2).long()).view_as(images)


def equalize(images: Tensor, _: Arguments) -> Tensor:
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
