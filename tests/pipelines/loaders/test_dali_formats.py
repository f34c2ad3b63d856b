"""Which files DALI is given as they are."""

from __future__ import annotations

import io

import numpy as np
import pytest
from conftest import missing, picture

if reason := missing("dali"):
    pytest.skip(reason, allow_module_level=True)

from pipelines.loaders.dali_formats import dali_decodes


def encoded(kind: str, **options: object) -> bytearray:
    written = io.BytesIO()
    picture(40, 48, 0).save(written, kind, **options)
    return bytearray(written.getvalue())


def decodes(data: bytes | bytearray) -> bool:
    return dali_decodes(np.frombuffer(bytes(data), np.uint8))


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("JPEG", {}, True),
        ("JPEG", {"progressive": True, "comment": b"x" * 5000}, True),
        ("PNG", {}, True),
        ("WEBP", {}, True),
        ("GIF", {}, False),
        ("TIFF", {}, False),
        ("BMP", {}, False),
    ],
)
def test_formats_are_told_by_their_first_bytes(kind: str, options: dict[str, object], expected: bool) -> None:
    assert decodes(encoded(kind, **options)) is expected


@pytest.mark.parametrize("frame", [0xC3, 0xC5, 0xC7, 0xC9, 0xCA, 0xCB, 0xCF])
def test_a_jpeg_that_is_lossless_hierarchical_or_arithmetic_is_not_for_dali(frame: int) -> None:
    data = encoded("JPEG")
    data[data.index(b"\xff\xc0") + 1] = frame
    assert not decodes(data)


def test_nor_is_one_of_twelve_bits() -> None:
    data = encoded("JPEG")
    data[data.index(b"\xff\xc0") + 4] = 12
    assert not decodes(data)


def test_a_jpeg_that_ends_anywhere_is_looked_at() -> None:
    data = encoded("JPEG", comment=b"y" * 100)
    for length in range(400):
        assert decodes(data[:length]) is (length >= 2)
