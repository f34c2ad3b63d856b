"""Shear, translation and rotation as Pillow's `Image.transform` computes them with `Transform.AFFINE`.

Pixel centres lie at +0.5. An output pixel whose source lies outside the image gets the fill colour; inside, taps
beyond the border repeat the border. The cubic kernel has a = -1 (that of `Image.resize` has -0.5). All functions take
and return uint8 (G, 3, S, S).

Only gathers and elementwise arithmetic, whose result no batch size can change; coordinates are float64, so that they
do not decide which way a value is truncated.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment.transfer import to_device
from pipelines.base import Interpolation


def _weights(fraction: Tensor, interpolation: Interpolation) -> list[Tensor]:
    """Weights of neighbouring taps, in order; the tap at or left of the position is number 0 of 2, or 1 of 4."""
    d = fraction.to(torch.float32)
    if interpolation == "bilinear":
        return [1 - d, d]
    squared, cubed = d * d, d * d * d
    return [2 * squared - cubed - d, 1 - 2 * squared + cubed, d + squared - cubed, cubed - squared]


def _taps(position: Tensor, interpolation: Interpolation) -> tuple[Tensor, list[Tensor]]:
    """The pixel whose centre is at or before `position` (G, S, S), and the weights (G, 1, S, S) around it."""
    position = position - 0.5
    first = position.floor()
    return first, _weights((position - first).unsqueeze(1), interpolation)


def _finish(values: Tensor, inside: Tensor, fill: Tensor) -> Tensor:
    """Truncated like Pillow's. The small addend keeps a flat area, whose weights sum to 1 only nearly, what it is."""
    values.add_(2.0**-10).clamp_(0, 255)
    return torch.where(inside, values, fill.view(3, 1, 1)).to(torch.uint8)


def shift_rows(images: Tensor, shift: NDArray[np.float64], fill: Tensor, interpolation: Interpolation) -> Tensor:
    """Output (y, x) is the source at (y, x + shift[y]); `shift` (G, S) in pixels.

    The positions in a row share their fraction, so whole pixels are gathered once and then filtered.
    """
    side = images.shape[3]
    shifts = to_device(shift, images.device).unsqueeze(2)  # (G, S, 1)
    first = shifts.floor()
    weights = _weights((shifts - first).unsqueeze(1), interpolation)  # of (G, 1, S, 1)
    num_taps = len(weights)
    columns = torch.arange(1 - num_taps // 2, side + num_taps // 2, device=images.device)
    columns = (columns + first.long()).clamp_(0, side - 1)  # (G, S, S + num_taps - 1)
    source = images.gather(3, columns.unsqueeze(1).expand(-1, 3, -1, -1)).to(torch.float32)
    values = source[..., :side] * weights[0]
    for tap in range(1, num_taps):
        values.add_(source[..., tap : tap + side] * weights[tap])
    x = shifts + torch.arange(0.5, side, dtype=torch.float64, device=images.device)  # (G, S, S)
    return _finish(values, ((x >= 0) & (x < side)).unsqueeze(1), fill)


def shift_columns(images: Tensor, shift: NDArray[np.float64], fill: Tensor, interpolation: Interpolation) -> Tensor:
    """Output (y, x) is the source at (y + shift[x], x); `shift` (G, S) in pixels."""
    return shift_rows(images.transpose(2, 3).contiguous(), shift, fill, interpolation).transpose(2, 3)


def rotate(images: Tensor, degrees: NDArray[np.float64], fill: Tensor, interpolation: Interpolation) -> Tensor:
    """Counter-clockwise about the centre; `degrees` (G,)."""
    side = images.shape[3]
    centre = side / 2
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    # source x = cosine x - sine y + a, source y = sine x + cosine y + b, with the centre mapped to itself
    rows = np.stack((cosine, sine, centre * (1 - cosine + sine), centre * (1 - cosine - sine)), axis=1)
    cos, sin, a, b = to_device(rows, images.device).view(-1, 4, 1, 1).unbind(1)  # each (G, 1, 1)
    x = torch.arange(0.5, side, dtype=torch.float64, device=images.device)
    y = x.unsqueeze(1)
    source_x, source_y = cos * x - sin * y + a, sin * x + cos * y + b  # (G, S, S)
    inside = (source_x >= 0) & (source_x < side) & (source_y >= 0) & (source_y < side)

    first_x, weights_x = _taps(source_x, interpolation)
    first_y, weights_y = _taps(source_y, interpolation)
    num_taps = len(weights_x)
    before = num_taps // 2 - 1
    # With the border repeated around the image, every tap is the same gather from a shifted start.
    width = side + num_taps
    border = torch.arange(-before - 1, width - before - 1, device=images.device).clamp_(0, side - 1)
    pixels = images.index_select(2, border).index_select(3, border).flatten(2)  # (G, 3, width * width)
    position = first_y.clamp_(-1, side - 1).add_(1).mul_(width).add_(first_x.clamp_(-1, side - 1).add_(1))
    position = position.long().flatten(1).unsqueeze(1).expand(-1, 3, -1)  # of the tap at the top left
    for row in range(num_taps):
        for column in range(num_taps):
            tap = pixels[..., row * width + column :].gather(2, position).view_as(images)
            tap = tap.to(torch.float32).mul_(weights_x[column])
            line = line.add_(tap) if column else tap
        line.mul_(weights_y[row])
        values = values.add_(line) if row else line
    return _finish(values, inside.unsqueeze(1), fill)
