"""A teacher that needs no model: what it finds at a place is the colour there."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GRID = (6, 6)


@dataclass
class Teacher:
    """Its first logits are how far down and to the right a place is, by the colours of what it is shown."""

    name: str = "a teacher"
    digest: str = "0" * 64
    num_classes: int = 3
    classes: tuple[str, ...] | None = ("cat", "dog", "emu")
    side: int = 48
    resampling: int = int(Image.Resampling.BICUBIC)
    numbers: tuple[int, ...] = (0, 1, 2)
    """Of the classes that it tells."""
    scale: float = 1 / 240
    seconds: float = 0.0
    calls: int = 0

    def grid(self, most: int | None) -> tuple[int, int]:
        return GRID if most is None else (min(GRID[0], most), min(GRID[1], most))

    def __call__(
        self, images: NDArray[np.uint8], grid: tuple[int, int], top_k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
        time.sleep(self.seconds)
        self.calls += 1
        assert images.shape[1:] == (self.side, self.side, 3)
        cells = images.reshape(len(images), grid[0], self.side // grid[0], grid[1], self.side // grid[1], 3)
        means = cells.mean((2, 4), dtype=np.float64).transpose(0, 3, 1, 2)[:, :top_k] * self.scale
        order = np.argsort(-means, axis=1, kind="stable")
        classes = np.array(self.numbers)[order]
        return np.take_along_axis(means, order, 1).astype(np.float32), classes, np.zeros(len(images), np.int64)
