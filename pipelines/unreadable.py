"""What is wrong with an image that cannot be read, in one sentence that names it."""

from __future__ import annotations

from PIL import Image, UnidentifiedImageError

from pipelines.base import DataError

UNREADABLE = (OSError, SyntaxError, ValueError, IndexError, KeyError, TypeError, Image.DecompressionBombError)
"""What Pillow raises for damaged files, by way of their format's parser."""


def unreadable(name: str, num_bytes: int, error: BaseException) -> DataError:
    """The error to raise for the file `name`. Pillow's own message may name an object by its address."""
    if not num_bytes:
        return DataError(f"{name} is empty; restore it or remove it")
    if isinstance(error, UnidentifiedImageError):
        return DataError(f"{name} is not an image (JPEG, PNG, WebP, BMP, GIF or TIFF); restore it or remove it")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return DataError(f"{name} cannot be decoded: {reason}")
