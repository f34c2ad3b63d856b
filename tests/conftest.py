"""Small data sets that several test files share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter


def picture(height: int, width: int, seed: int) -> Image.Image:
    """A smooth random image: like a photograph, it has little energy at high frequencies."""
    noise = np.random.default_rng(seed).integers(0, 256, (max(height // 8, 2), max(width // 8, 2), 3), dtype=np.uint8)
    enlarged = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    return enlarged.filter(ImageFilter.GaussianBlur(1))


def write_folder(folder: Path, counts: dict[str, int], seed: int = 0) -> None:
    """Write `counts[class]` JPEGs of various sizes into `<folder>/<class>/`."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            height, width = (int(n) for n in rng.integers(40, 160, 2))
            picture(height, width, int(rng.integers(1 << 31))).save(folder / name / f"{i:03d}.jpg", quality=90)


@pytest.fixture(scope="session")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain folder with 53 training and 23 validation images of three classes."""
    root = tmp_path_factory.mktemp("images")
    write_folder(root / "train", {"cat": 17, "dog": 19, "emu": 17}, seed=1)
    write_folder(root / "val", {"cat": 8, "dog": 9, "emu": 6}, seed=2)
    return root
