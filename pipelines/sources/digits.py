"""The 1,797 handwritten digits that scikit-learn brings along, as images: real data without a download."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

_SIDE = 32  # of the images written; the scans have 8


def digit_images() -> Iterator[tuple[str, int, bytes]]:
    """(name, digit, JPEG) of every 8x8 scan, enlarged to 32x32 pixels, by digit and number."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number in np.argsort(digits.target, kind="stable"):
        gray = np.rint(digits.images[number] * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(gray).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=95)
        label = int(digits.target[number])
        yield f"digits/{label}/{number:04d}.jpg", label, encoded.getvalue()
