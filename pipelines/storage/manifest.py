"""What a converted data set consists of: `dataset.json`, and for each split a table with one row per sample.

DEST/dataset.json          classes, splits, how it was made, size and sha256 of every other file, and its own
DEST/<split>.samples.npy   the table, rows of `SAMPLE`
DEST/<split>-00000.tar     original bytes (a split has these, or a .beton file, or both)
DEST/<split>-00000.idx     DALI's index of that tar, for its own reader
DEST/train.beton           the FFCV file
DEST/train.beton.npy       place and crc32 of each of its images
DEST/_info.json, README.md, classes.txt   for other programs
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.base import DataError, in_words

FORMAT = "pss-dataset"
FORMAT_VERSION = 3
"""Version 2 has no `.cls` members in its tars, and nothing for other programs beside them; all else is the same."""
_READ_VERSIONS = (2, 3)
MANIFEST = "dataset.json"

SAMPLE = np.dtype(
    [
        ("label", "<i4"),
        ("height", "<i4"),  # of the original image, EXIF orientation ignored
        ("width", "<i4"),
        ("shard", "<i4"),  # which tar, -1 if the split has none
        ("offset", "<i8"),  # of the image's first byte in that tar
        ("length", "<i8"),
        ("crc32", "<u4"),  # of the image's bytes as stored in the tar, or as they were read for FFCV
    ]
)

SPLIT_ALIASES = {"train": ("train",), "val": ("val", "validation", "test")}
"""The two splits, and the names under which a folder or a caller may give them."""


def canonical_split(name: str) -> str:
    """`train` or `val`; raises `DataError` for anything else."""
    for split, aliases in SPLIT_ALIASES.items():
        if name in aliases:
            return split
    raise DataError(f"there is no split {name!r}; use 'train' or 'val'")


@dataclass(frozen=True)
class Split:
    """One split as the manifest describes it."""

    num_samples: int
    per_class: tuple[int, ...]
    table: str
    shards: tuple[str, ...] = ()
    beton: str | None = None


@dataclass(frozen=True)
class FileEntry:
    """One file of the data set."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of `dataset.json`."""

    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    files: Mapping[str, FileEntry]
    made: Mapping[str, Any]
    """Source, options and library versions of the conversion."""
    skipped: tuple[Mapping[str, str], ...] = ()
    """Unreadable files left out on request: name and reason."""
    transcoded: tuple[str, ...] = ()
    """Images stored as PNG because no loader reads their own format."""
    warned: tuple[Mapping[str, str], ...] = ()
    """Images that decode, but look damaged to the JPEG library: file and warning."""
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        content = {"format": FORMAT, "format_version": self.format_version, **asdict(self)}
        return json.dumps({**content, "sha256": _digest(content)}, indent=1, ensure_ascii=False) + "\n"


def hash_file(path: Path) -> FileEntry:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        return FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _digest(content: Mapping[str, Any]) -> str:
    """Of a manifest's content, however it is spaced and ordered."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(root: Path) -> tuple[Manifest, str]:
    """The manifest of a converted data set and the sha256 of its text; `DataError` if it is not one."""
    path = root / MANIFEST
    if not path.exists():
        raise DataError(f"{root} holds no {MANIFEST}; convert it with pss-convert first")
    try:
        text = path.read_bytes()
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({in_words(error)}); convert the data set again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path} was not written by pss-convert; point at a converted data set")
    if (version := content.get("format_version")) not in _READ_VERSIONS:
        raise DataError(
            f"{path} has format version {version}, this program reads {' and '.join(map(str, _READ_VERSIONS))}; "
            "convert the data set again, or use a newer pss"
        )
    if content.pop("sha256", None) != _digest(content):
        raise DataError(f"{path} is not as it was written; copy it again or convert anew")
    manifest = Manifest(
        classes=tuple(content["classes"]),
        splits={
            name: Split(
                num_samples=split["num_samples"],
                per_class=tuple(split["per_class"]),
                table=split["table"],
                shards=tuple(split["shards"]),
                beton=split["beton"],
            )
            for name, split in content["splits"].items()
        },
        files={name: FileEntry(**entry) for name, entry in content["files"].items()},
        made=content["made"],
        skipped=tuple(content["skipped"]),
        transcoded=tuple(content["transcoded"]),
        warned=tuple(content["warned"]),
        format_version=version,
    )
    return manifest, hashlib.sha256(text).hexdigest()
