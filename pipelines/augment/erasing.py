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
    keys = crng.key(seed, epoch, index, crng.ERASING)
    rectangles = np.zeros((len(index), 4), dtype=np.int64)
    pending = np.flatnonzero(crng.u01(keys, 0) < probability)
    # One attempt is mostly enough, and all further ones of the few others cost as much as one.
    for attempts in (range(1), range(1, _ATTEMPTS)):
        drawn, fits = _attempt(keys[pending], attempts, img_size)
        first = fits.argmax(axis=0)  # (P,); 0 where none fits
        found = np.flatnonzero(fits.any(axis=0))
        rectangles[pending[found]] = drawn[:, first[found], found].T
        pending = np.delete(pending, found)
    return rectangles


def _attempt(keys: crng.UInt64, attempts: range, img_size: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Rectangles (4, A, P) that attempt number `attempts[a]` draws for sample p, and which fit the image, (A, P)."""
    numbers = 1 + 4 * np.array(attempts)[None, :] + np.arange(4)[:, None]  # (4, A)
    area, log_aspect, top, left = crng.u01(keys, numbers[:, :, None])
    area = (_AREA[0] + (_AREA[1] - _AREA[0]) * area) * img_size**2
    aspect = np.exp(_LOG_ASPECT[0] + (_LOG_ASPECT[1] - _LOG_ASPECT[0]) * log_aspect)
    height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    drawn = np.stack((top * (img_size - height + 1), left * (img_size - width + 1), height, width))
    return drawn.astype(np.int64), (height < img_size) & (width < img_size)


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

    def draw(
        self, index: NDArray[np.int64], epoch: int, img_size: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Which of the samples `index` (B,) are erased, as places in the batch, (E,); their rectangles, (E, 4) of top,
        left, height, width; the keys of their noise, (E,), the bits of uint64."""
        rectangles = draw_rectangles(
            index, probability=self.probability, img_size=img_size, seed=self.seed, epoch=epoch
        )
        erased = np.flatnonzero(rectangles[:, 2])
        keys = crng.key(self.seed, epoch, index[erased], crng.ERASING_NOISE).view(np.int64)
        return erased, rectangles[erased], keys

    def noise_table(self, device: torch.device) -> Tensor:
        """The values that noise is looked up among, on `device`: float32 (2^16,)."""
        normal: Tensor = self._normal.to(device)
        self._normal = normal
        return normal

    def __call__(self, images: Tensor, index: Tensor | NDArray[np.int64], epoch: int) -> Tensor:
        """`images`, float (B, 3, S, S), normalised, changed in place; `index` (B,) lies on the host."""
        side = images.shape[-1]
        erased, rectangles, keys = self.draw(host_index(index), epoch, side)
        if not len(erased):
            return images
        areas = rectangles[:, 2] * rectangles[:, 3]
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
        bits = crng.mix_torch(key ^ pixel).unsqueeze(1)
        shifts = torch.arange(0, 3 * _NOISE_BITS, _NOISE_BITS, device=pixel.device)
        noise: Tensor = self.noise_table(pixel.device)[(bits >> shifts) & ((1 << _NOISE_BITS) - 1)]
        return noise
