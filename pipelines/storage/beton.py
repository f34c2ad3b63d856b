"""FFCV's .beton format, version 2, byte for byte.

A header, three field descriptors (image, label, index), a row of metadata for every sample, then pages with the
encoded images, and last a table of where they are. No image crosses the border of a page.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.base import in_words

_VERSION = 2
_MIN_PAGE = 1 << 21
_AT_ONCE = 1 << 16  # rows
_INT, _RGB = 1, 2  # FFCV's numbers of the field types
JPEG, RAW = 0, 1  # and of the ways to store an image
HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("table", "<u8")],
    align=True,
)
FIELD = np.dtype([("type", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("ptr", "<u8")])
METADATA = np.dtype([("image", IMAGE), ("label", "<i8"), ("index", "<i8")], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
STORED = np.dtype(
    [("ptr", "<u8"), ("size", "<u8"), ("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("crc32", "<u4")]
)
"""A row of `<name>.beton.npy`: what the file holds, for verification. `ptr` is 0 in pieces not yet in the file."""


def page_size(max_size: int) -> int:
    """Bytes in a page: a power of two, and no sample may be larger."""
    page = _MIN_PAGE
    while page < 3 * max_size**2:
        page *= 2
    return page


def stored_path(beton: Path) -> Path:
    """The file with the rows of STORED."""
    return beton.with_name(f"{beton.name}.npy")


def header(num_samples: int, page: int, table: int) -> bytes:
    """Header and fields."""
    found = np.array((_VERSION, 3, page, num_samples, table), dtype=HEADER)
    fields = np.zeros(3, dtype=FIELD)
    for row, (name, kind) in zip(fields, {"image": _RGB, "label": _INT, "index": _INT}.items(), strict=True):
        row["type"] = kind
        row["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    return found.tobytes() + fields.tobytes()


def metadata(rows: NDArray[Any], labels: NDArray[np.signedinteger], first: int) -> NDArray[Any]:
    """What follows them, up to the pages: of the samples from number `first` on."""
    found = np.zeros(len(rows), dtype=METADATA)
    for column in ("mode", "width", "height", "ptr"):
        found["image"][column] = rows[column]
    found["label"], found["index"] = labels, np.arange(first, first + len(rows))
    return found


def damaged_frame(path: Path, rows: NDArray[Any], labels: NDArray[np.signedinteger], max_size: int) -> str | None:
    """Which of the parts around the pages is not what `finish` wrote for `rows`; None if all are.

    FFCV follows the pointers in them without a check. About 0.3 s for a million samples.
    """
    page = page_size(max_size)
    parts = [slice(first, first + _AT_ONCE) for first in range(0, len(rows), _AT_ONCE)]
    table = -(-max(int((rows["ptr"][some] + rows["size"][some]).max()) for some in parts) // page) * page
    before = header(len(rows), page, table)
    try:
        with path.open("rb") as file:
            found = file.read(len(before))
            if found[: HEADER.itemsize] != before[: HEADER.itemsize]:
                return "header"
            if found != before:
                return "table of fields"
            for some in parts:
                expected = metadata(rows[some], labels[some], some.start)
                if (at := _first_difference(file.read(expected.nbytes), expected)) is not None:
                    return f"metadata of sample {some.start + at}"
            file.seek(table)
            for some in parts:
                expected = allocation_table(rows[some], some.start)
                if (at := _first_difference(file.read(expected.nbytes), expected)) is not None:
                    return f"allocation table, sample {some.start + at}"
            return f"allocation table, sample {len(rows)}" if file.read(1) else None
    except OSError as error:
        return f"which cannot be read ({in_words(error)})"


def _first_difference(found: bytes, rows: NDArray[Any]) -> int | None:
    """Number of the first of `rows` that differs or is missing."""
    expected = rows.tobytes()
    if found == expected:
        return None
    length = min(len(found), len(expected))
    differs = np.frombuffer(found, np.uint8, length) != np.frombuffer(expected, np.uint8, length)
    return (int(differs.argmax()) if differs.any() else length) // rows.itemsize


def allocation_table(rows: NDArray[Any], first: int) -> NDArray[Any]:
    """Everything behind the pages, of the samples from number `first` on."""
    table = np.zeros(len(rows), dtype=ALLOCATION)
    table["sample"], table["ptr"], table["size"] = np.arange(first, first + len(rows)), rows["ptr"], rows["size"]
    return table
