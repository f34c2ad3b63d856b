"""What is wrong with an image that cannot be read, in one sentence that names it."""

from __future__ import annotations

import re
import struct
import zlib

from PIL import Image, UnidentifiedImageError

from pipelines.base import DataError, in_words

_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # in pixel data; the others are escapes, filling and restarts
_END, _SCAN = 0xD9, 0xDA
_BETWEEN_SCANS = (0xC4, 0xCC, 0xDB, 0xDC, 0xDD, _SCAN, *range(0xE0, 0xF0), 0xFE)  # tables, sizes, comments

UNREADABLE = (
    OSError, SyntaxError, ValueError, IndexError, KeyError, TypeError, EOFError, OverflowError, MemoryError,
    struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
"""What Pillow raises for damaged files, by way of their format's parser."""


def unreadable(name: str, num_bytes: int, error: BaseException) -> DataError:
    """The error to raise for the file `name`. Pillow's own message may name an object by its address."""
    if not num_bytes:
        return DataError(f"{name} is empty; restore it or remove it")
    if isinstance(error, UnidentifiedImageError):
        return DataError(f"{name} is not an image (JPEG, PNG, WebP, BMP, GIF or TIFF); restore it or remove it")
    return DataError(f"{name} cannot be decoded: {in_words(error)}; restore it or remove it")


def has_stray_marker(jpeg: bytes | memoryview) -> bool:
    """Whether something in the pixel data of a JPEG looks like a marker that has no place there (ITU-T T.81, annex B).

    Pillow and torchvision refuse such a file. DALI decodes on, to wrong pixels. About 0.1 ms.
    """
    at, in_data, had_scan = 2, False, False
    while at + 4 <= len(jpeg):
        if in_data:
            found = _MARKER.search(jpeg, at)
            if found is None:
                return False  # it ends too early, which every decoder notices
            at = found.start()
        if jpeg[at] != 0xFF:
            return had_scan
        marker = jpeg[at + 1]
        if marker == 0xFF:  # filling
            at, in_data = at + 1, False
            continue
        if marker == _END:
            return False
        if had_scan and marker not in _BETWEEN_SCANS:
            return True
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        in_data = marker == _SCAN
        had_scan |= in_data
    return had_scan  # with a length that leads out of the file
