"""What lies around the pages of a .beton file is compared some rows at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.storage import beton
from pipelines.storage.beton import ALLOCATION, FIELD, HEADER, METADATA, STORED

SAMPLES, PAGE = 20, 1 << 21
START = HEADER.itemsize + 3 * FIELD.itemsize


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file of 20 images of 1000 bytes, in one page."""
    path, rows, labels = tmp_path / "train.beton", stored(), np.arange(SAMPLES)
    content = bytearray(2 * PAGE)
    front = beton.header(SAMPLES, PAGE, 2 * PAGE) + beton.metadata(rows, labels, 0).tobytes()
    content[: len(front)] = front
    path.write_bytes(bytes(content) + beton.allocation_table(rows, 0).tobytes())
    return path


def stored() -> np.ndarray:
    rows = np.zeros(SAMPLES, STORED)
    rows["ptr"], rows["size"], rows["width"], rows["height"] = PAGE + np.arange(SAMPLES) * 1000, 1000, 30, 20
    return rows


@pytest.mark.parametrize("at_once", [1, 6, 20, 1000])
@pytest.mark.parametrize(
    ("at", "part"),
    [
        (0, "header"),
        (START - 1, "table of fields"),
        *((START + i * METADATA.itemsize + 2, f"metadata of sample {i}") for i in (0, 5, 6, 19)),
        *((2 * PAGE + i * ALLOCATION.itemsize + 9, f"allocation table, sample {i}") for i in (0, 5, 6, 19)),
    ],
)
def test_what_differs_is_named(
    at: int, part: str, at_once: int, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beton, "_AT_ONCE", at_once)
    assert beton.damaged_frame(written, stored(), np.arange(SAMPLES), 400) is None
    content = bytearray(written.read_bytes())
    content[at] ^= 1
    written.write_bytes(content)
    assert beton.damaged_frame(written, stored(), np.arange(SAMPLES), 400) == part


@pytest.mark.parametrize("at_once", [6, 20])
@pytest.mark.parametrize(("more", "sample"), [(1, 20), (-1, 19), (-20 * ALLOCATION.itemsize, 0)])
def test_what_is_missing_or_too_much_is_named(
    more: int, sample: int, at_once: int, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beton, "_AT_ONCE", at_once)
    content = written.read_bytes()
    written.write_bytes(content + bytes(more) if more > 0 else content[:more])
    told = beton.damaged_frame(written, stored(), np.arange(SAMPLES), 400)
    assert told == f"allocation table, sample {sample}"
