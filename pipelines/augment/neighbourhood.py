"""Operations on a pixel's channels or its neighbours: colour, sharpness, blur. Pillow's `ImageEnhance`, `ImageFilter`.

All take and return uint8 (G, 3, S, S); only elementwise arithmetic, whose result no batch size can change.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment.point import Arguments, blend, luma, per_image, to_bytes
from pipelines.augment.transfer import to_device

_MAX_SIGMA = 2.4  # up to here a box reaches no further than two pixels
_PASSES = 3


def color(images: Tensor, factor: Arguments) -> Tensor:
    """Blends with the grey image; `factor` (G,), 0 is grey."""
    values = images.to(torch.float32)
    return blend(luma(values), values, per_image(factor, images))


def sharpness(images: Tensor, factor: Arguments) -> Tensor:
    """Blends with the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13, whose borders are left alone; 0 is smoothed."""
    whole = images.to(torch.int16)
    rows = whole[:, :, :-2] + whole[:, :, 1:-1] + whole[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1]
    total.add_(rows[..., 2:]).add_(whole[:, :, 1:-1, 1:-1] * 4)
    values = images.to(torch.float32)
    smooth = values.clone()
    smooth[:, :, 1:-1, 1:-1] = total.to(torch.float32).add_(6.5).div_(13).floor_()
    return blend(smooth, values, per_image(factor, images))


def box_weights(sigma: Arguments) -> NDArray[np.float32]:
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


def blur(images: Tensor, sigma: Arguments) -> Tensor:
    """Gaussian blur; `sigma` (G,) in pixels."""
    weights = box_weights(sigma)
    reach = 2 if weights[:, 2].any() else 1
    centre, *others = to_device(weights, images.device).view(-1, 3, 1, 1, 1).unbind(1)
    side = images.shape[3]
    padded = images.new_empty((*images.shape[:3], side + 2 * reach), dtype=torch.float32)
    inner = padded[..., reach:-reach]
    inner.copy_(images)
    for _ in range(2):  # along rows, then, turned, along columns
        for _ in range(_PASSES):
            padded[..., :reach] = padded[..., reach : reach + 1]
            padded[..., -reach:] = padded[..., -reach - 1 : -reach]
            total = inner * centre
            for distance, weight in enumerate(others[:reach], start=1):
                before, after = padded[..., reach - distance :], padded[..., reach + distance :]
                total.add_((before[..., :side] + after[..., :side]).mul_(weight))
            torch.floor(total.add_(0.5), out=inner)
        inner.copy_(inner.transpose(2, 3).clone())
    return to_bytes(inner)
