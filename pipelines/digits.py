"""The 1,797 handwritten digits that scikit-learn brings along, as a folder of images: real data without a download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

_SIDE = 32  # of the images written; the scans have 8


def write_digits(folder: Path) -> None:
    """Write `<folder>/<digit>/<number>.jpg`, each 8x8 scan enlarged to 32x32 pixels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (scan, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / str(label)
        place.mkdir(parents=True, exist_ok=True)
        gray = np.rint(scan * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(gray).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
        image.save(place / f"{number:04d}.jpg", quality=95)
