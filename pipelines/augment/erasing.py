"""Random erasing (Zhong et al., 2020) of a normalised batch, with timm's distribution of rectangles.

Position, size and noise are pure functions of (seed, epoch, sample number, pixel).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines import crng
from pipelines.augment.streams import ERASING, ERASING_NOISE
from pipelines.augment.transfer import host_index, to_device

ErasingMode = Literal["pixel", "const"]

_AREA = (0.02, 1 / 3)
_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
_ATTEMPTS = 10
_NOISE_BITS = 16


def draw_rectangles(
    index: NDArray[np.int64], *, probability: float, img_size: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    """What is erased of each sample: (B, 4) of top, left, height, width; height 0 for nothing."""
    keys = crng.key(seed, epoch, index, ERASING)
    erased = crng.u01(keys, 0) < probability
    rectangles = np.zeros((len(index), 4), dtype=np.int64)
    found = np.zeros(len(index), dtype=bool)
    for attempt in range(_ATTEMPTS):
        area, log_aspect, top, left = (crng.u01(keys, 1 + 4 * attempt + draw) for draw in range(4))
        area = (_AREA[0] + (_AREA[1] - _AREA[0]) * area) * img_size**2
        aspect = np.exp(_LOG_ASPECT[0] + (_LOG_ASPECT[1] - _LOG_ASPECT[0]) * log_aspect)
        height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (height < img_size) & (width < img_size)
        candidate = np.stack((top * (img_size - height + 1), left * (img_size - width + 1), height, width), axis=1)
        accepted = erased & fits & ~found
        rectangles[accepted] = candidate[accepted].astype(np.int64)
        found |= fits
    return rectangles


class RandomErasing:
    """Overwrites one rectangle in a share `probability` of the images, with 0 or with normal noise for each pixel.

    A rectangle's area is 2 % to 33 % of the image's, its aspect ratio 0.3 to 3.3.
    """

    def __init__(self, probability: float, *, seed: int, mode: ErasingMode = "pixel") -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"the probability of random erasing is {probability}; it must lie between 0 and 1")
        if mode not in get_args(ErasingMode):
            raise ValueError(f"the mode of random erasing is {mode!r}; use 'pixel' or 'const'")
        self.probability, self.seed, self.mode = probability, seed, mode
        # Noise is looked up among equally likely values of the normal distribution, not computed: logarithm and cosine
        # differ in the last bit between devices, and between the places a number may have in a batch.
        levels = (torch.arange(1 << _NOISE_BITS, dtype=torch.float64) + 0.5) / (1 << _NOISE_BITS)
        self._normal = torch.special.ndtri(levels).to(torch.float32)

    def __call__(self, images: Tensor, index: Tensor | NDArray[np.int64], epoch: int) -> Tensor:
        """`images`, float (B, 3, S, S), normalised, changed in place; `index` (B,) lies on the host."""
        numbers = host_index(index)
        side = images.shape[-1]
        rectangles = draw_rectangles(numbers, probability=self.probability, img_size=side, seed=self.seed, epoch=epoch)
        erased = np.flatnonzero(rectangles[:, 2])
        if not len(erased):
            return images
        rectangles = rectangles[erased]
        areas = rectangles[:, 2] * rectangles[:, 3]
        keys = crng.key(self.seed, epoch, numbers[erased], ERASING_NOISE).view(np.int64)
        starts = np.cumsum(areas) - areas
        table = to_device(np.column_stack((areas, erased, rectangles, keys, starts)), images.device)
        # One entry per erased pixel. Its number is known on the host, so the device is not asked for it.
        num_pixels = int(areas.sum())
        rows = table.repeat_interleave(table[:, 0], dim=0, output_size=num_pixels)  # (P, 8)
        _, image, top, left, _, width, key, start = rows.unbind(1)
        within = torch.arange(num_pixels, device=images.device) - start
        row = top + within.div(width, rounding_mode="floor")
        column = left + within % width
        images[image, :, row, column] = self._values(key, row * side + column).to(images.dtype)
        return images

    def _values(self, key: Tensor, pixel: Tensor) -> Tensor:
        """What (P,) pixels become: (P, 3)."""
        if self.mode == "const":
            return torch.zeros((len(pixel), 3), device=pixel.device)
        self._normal = self._normal.to(pixel.device)
        bits = crng.mix_torch(key ^ pixel).unsqueeze(1)
        shifts = torch.arange(0, 3 * _NOISE_BITS, _NOISE_BITS, device=pixel.device)
        noise: Tensor = self._normal[(bits >> shifts) & ((1 << _NOISE_BITS) - 1)]
        return noise
