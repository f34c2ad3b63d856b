"""Shear, translation and rotation as Pillow's `Image.transform` computes them with `Transform.AFFINE`.

Pixel centres lie at +0.5. An output pixel whose source lies outside the image gets the fill colour; inside, taps
beyond the border repeat the border. The cubic kernel has a = -1 (that of `Image.resize` has -0.5). All functions take
and return uint8 (G, 3, S, S); `fill` is uint8 (3,).

Only gathers and elementwise arithmetic, whose result no batch size can change.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment.point import to_bytes
from pipelines.augment.transfer import to_device
from pipelines.base import Interpolation

_FLAT = 2.0**-10
"""Added before truncation: keeps a flat area, whose weights sum to 1 only nearly, what it is."""


def _weights(fraction: Tensor, interpolation: Interpolation) -> list[Tensor]:
    """Weights of 2 or 4 neighbouring taps, in order; number 0 of 2, or 1 of 4, lies `fraction` before the position."""
    before, after = fraction, 1 - fraction
    if interpolation == "bilinear":
        return [after, before]
    product = before * after
    outer_before, outer_after = product * -after, product * -before
    return [outer_before, after - outer_before, before - outer_after, outer_after]


def _finish(values: Tensor, inside: Tensor, fill: Tensor) -> Tensor:
    """float32 (G, 3, S, S) truncated, and filled where not `inside` (G, 1, S, S); in bytes, where it costs least."""
    pixels = to_bytes(values.clamp_(0, 255))
    outside = inside.to(torch.uint8) - 1  # 0 or 255
    return pixels.bitwise_and_(~outside).bitwise_or_(fill.view(3, 1, 1) & outside)


def shift_rows(images: Tensor, shift: NDArray[np.float64], fill: Tensor, interpolation: Interpolation) -> Tensor:
    """Output (y, x) is the source at (y, x + shift[y]); `shift` (G, S) in pixels.

    The positions in a row share their fraction, so whole pixels are gathered once and then filtered.
    """
    side = images.shape[3]
    first, nearest = np.floor(shift), np.floor(shift + 0.5)
    table = to_device(np.stack((first, nearest, shift - first), axis=1), images.device)
    first_pixel, nearest_pixel, fraction = table.to(torch.float32).unsqueeze(3).unbind(1)  # (G, S, 1)
    weights = _weights(fraction.unsqueeze(1), interpolation)  # of (G, 1, S, 1)
    num_taps = len(weights)
    columns = torch.arange(1 - num_taps // 2, side + num_taps // 2, device=images.device)
    columns = (columns + first_pixel.long()).clamp_(0, side - 1)  # (G, S, S + num_taps - 1)
    source = images.gather(3, columns.unsqueeze(1).expand(-1, 3, -1, -1)).to(torch.float32)
    values = torch.full_like(images, _FLAT, dtype=torch.float32)
    for tap, weight in enumerate(weights):
        values.add_(source[..., tap : tap + side] * weight)
    centre = (side - 1) / 2
    from_centre = torch.arange(side, device=images.device) - centre + nearest_pixel  # (G, S, S)
    return _finish(values, (from_centre.abs_() <= centre).unsqueeze(1), fill)


def shift_columns(images: Tensor, shift: NDArray[np.float64], fill: Tensor, interpolation: Interpolation) -> Tensor:
    """Output (y, x) is the source at (y + shift[x], x); `shift` (G, S) in pixels."""
    return shift_rows(images.transpose(2, 3).contiguous(), shift, fill, interpolation).transpose(2, 3)


def rotate(images: Tensor, degrees: NDArray[np.float64], fill: Tensor, interpolation: Interpolation) -> Tensor:
    """Counter-clockwise about the centre; `degrees` (G,)."""
    side = images.shape[3]
    cosine, sine = np.cos(np.radians(degrees))[:, None], np.sin(np.radians(degrees))[:, None]
    middle = (side - 1) / 2
    line = np.arange(side) - middle
    first_x, fraction_x = _position(cosine * line + middle, -sine * line, images.device)
    first_y, fraction_y = _position(sine * line, cosine * line + middle, images.device)
    nearest_x, nearest_y = first_x + (fraction_x >= 0.5), first_y + (fraction_y >= 0.5)
    inside = torch.maximum((nearest_x - middle).abs_(), (nearest_y - middle).abs_()) <= middle  # (G, S, S)

    weights_x = _weights(fraction_x, interpolation)
    weights_y = _weights(fraction_y, interpolation)
    num_taps = len(weights_x)
    before = num_taps // 2
    # With the border repeated around the image, every tap is the same gather from a shifted start.
    width = side + num_taps
    padded = images.new_empty((len(images), 3, width, width))
    padded[..., before:-before, before:-before] = images
    padded[..., before:-before, :before] = images[..., :1]
    padded[..., before:-before, -before:] = images[..., -1:]
    padded[..., :before, :] = padded[..., before : before + 1, :]
    padded[..., -before:, :] = padded[..., -before - 1 : -before, :]
    pixels = padded.flatten(2)  # (G, 3, width * width)
    start = first_y.clamp_(-1, side - 1).add_(1).mul_(width).add_(first_x.clamp_(-1, side - 1).add_(1))
    start = start.long().flatten(1).unsqueeze(1).expand(-1, 3, -1)  # of the tap at the top left
    values = torch.full_like(images, _FLAT, dtype=torch.float32)
    for row in range(num_taps):
        for column in range(num_taps):
            tap = pixels[..., row * width + column :].gather(2, start).view_as(images).to(torch.float32)
            values.add_(tap.mul_((weights_y[row] * weights_x[column]).unsqueeze(1)))
    return _finish(values, inside.unsqueeze(1), fill)


def _position(
    along_x: NDArray[np.float64], along_y: NDArray[np.float64], device: torch.device
) -> tuple[Tensor, Tensor]:
    """along_x[:, x] + along_y[:, y], as a whole number and a fraction in [0, 1): float32 (G, S, S) each.

    Fractions are kept apart from whole numbers all the way, so that float32 is as good as Pillow's float64.
    """
    parts = np.stack((along_x, along_y), axis=1)  # (G, 2, S)
    whole = np.floor(parts)
    table = to_device(np.stack((whole, parts - whole), axis=1).astype(np.float32), device)
    numbers, fractions = (table[:, part, 0].unsqueeze(1) + table[:, part, 1].unsqueeze(2) for part in range(2))
    carry = fractions.floor()
    return numbers.add_(carry), fractions.sub_(carry)
