"""Small data sets that several test files share."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from pipelines.conversion.convert import Options, convert
from pipelines.storage.manifest import Manifest

# The tensors of the tests are too small to share: threads would only wait for each other.
torch.set_num_threads(1)

MAX_SIZE = 128
"""Longest side of the images in the converted data set's FFCV files; some originals are larger, some smaller."""


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


def missing(backend: str) -> str | None:
    """Why a back end cannot be tested here; None if it can."""
    if backend == "dali" and not (find_spec("nvidia") and find_spec("nvidia.dali")):
        return "DALI is not installed"
    if backend == "ffcv" and not find_spec("ffcv"):
        return "FFCV is not installed"
    return None


@pytest.fixture(scope="session")
def converted_root(image_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`image_root` in every format that can be written here."""
    dest = tmp_path_factory.mktemp("converted") / "set"
    convert_folder(image_root, dest, "dali" if missing("ffcv") else "ffcv,dali", max_size=MAX_SIZE)
    return dest


def convert_folder(source: Path, dest: Path, formats: str, **options: Any) -> Manifest:
    """`pss-convert` as a function, silently."""
    settings = Options(formats=tuple(formats.split(",")), shard_size=20, jobs=2, **options)
    return convert(str(source), dest, settings, Silent())


class Silent:
    """Progress that nobody watches."""

    def start(self, phase: str, total: int) -> None: ...

    def advance(self, images: int) -> None: ...
