"""Operations on a pixel's channels or its neighbours: colour, sharpness, blur. Pillow's `ImageEnhance`, `ImageFilter`.

All take and return uint8 (G, 3, S, S); only elementwise arithmetic, whose result no batch size can change.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment.point import blend, luma, to_bytes
from pipelines.augment.transfer import to_device

_MAX_SIGMA = 2.4  # up to here a box reaches no further than two pixels
_PASSES = 3


def _factors(factor: NDArray[np.float64], images: Tensor) -> Tensor:
    return to_device(factor.astype(np.float32), images.device).view(-1, 1, 1, 1)


def color(images: Tensor, factor: NDArray[np.float64]) -> Tensor:
    """Blends with the grey image; `factor` (G,), 0 is grey."""
    values = images.to(torch.float32)
    return blend(luma(values), values, _factors(factor, images))


def sharpness(images: Tensor, factor: NDArray[np.float64]) -> Tensor:
    """Blends with the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13, whose borders are left alone; 0 is smoothed."""
    whole = images.to(torch.int16)
    rows = whole[:, :, :-2] + whole[:, :, 1:-1] + whole[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1]
    total.add_(rows[..., 2:]).add_(whole[:, :, 1:-1, 1:-1] * 4)
    values = images.to(torch.float32)
    smooth = values.clone()
    smooth[:, :, 1:-1, 1:-1] = total.to(torch.float32).add_(6.5).div_(13).floor_()
    return blend(smooth, values, _factors(factor, images))


def _box_weights(sigma: NDArray[np.float64]) -> NDArray[np.float32]:
    """Weights (G, 3) at distance 0, 1 and 2 of the box that, applied three times, stands for a Gaussian.

    The box has a fractional width: its outermost weights are smaller. (Gwosdek et al., Theoretical foundations of
    Gaussian convolution by extended box filtering, 2011; Pillow's `GaussianBlur`.)
    """
    assert sigma.max() <= _MAX_SIGMA
    variance = sigma**2 / _PASSES
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)  # 0 or 1: pixels on each side with full weight
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    full = 1 / (2 * (whole + part) + 1)
    edge = (1 - (2 * whole + 1) * full) / 2
    return np.stack((full, np.where(whole == 1, full, edge), np.where(whole == 1, edge, 0)), axis=1).astype(np.float32)


def blur(images: Tensor, sigma: NDArray[np.float64]) -> Tensor:
    """Gaussian blur; `sigma` (G,) in pixels."""
    centre, near, far = to_device(_box_weights(sigma), images.device).view(-1, 3, 1, 1, 1).unbind(1)
    padded = images.new_empty((*images.shape[:3], images.shape[3] + 4), dtype=torch.float32)
    inner = padded[..., 2:-2]
    inner.copy_(images)
    for _ in range(2):  # along rows, then, turned, along columns
        for _ in range(_PASSES):
            padded[..., :2] = padded[..., 2:3]
            padded[..., -2:] = padded[..., -3:-2]
            total = (padded[..., 1:-3] + padded[..., 3:-1]).mul_(near)
            total.add_((padded[..., :-4] + padded[..., 4:]).mul_(far)).add_(inner * centre)
            torch.floor(total.add_(0.5), out=inner)
        inner.copy_(inner.transpose(2, 3).clone())
    return to_bytes(inner)
