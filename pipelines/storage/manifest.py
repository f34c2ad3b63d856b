"""What a converted data set consists of: `dataset.json`, and for each split a table with one row per sample.

DEST/dataset.json          classes, splits, how it was made, size and sha256 of every other file, and its own
DEST/<split>.samples.npy   the table, rows of `SAMPLE`
DEST/<split>-00000.tar     original bytes (a split has these, or a .beton file, or both)
DEST/<split>-00000.idx     DALI's index of that tar, for its own reader
DEST/train.beton           the FFCV file
DEST/train.beton.npy       place and crc32 of each of its images
DEST/_info.json, README.md, classes.txt   for other programs
DEST/train.maps.<8 digits>.npy   label maps (`pss-convert DEST --token-labels`), entered into the manifest later
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
from annotated_types import Ge, Le, Len
from numpy.typing import NDArray
from typing_extensions import TypedDict  # pydantic reads that of typing from Python 3.12 on only

from pipelines.base import DataError, in_words
from pipelines.storage.json_files import checked, read_json

_Count = Annotated[int, Ge(0), Le(1 << 48)]
_Name = Annotated[str, Len(1, 255)]

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

SPLIT_ALIASES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev", "test")}
"""The two splits, and the names under which a folder or a caller may give them."""


def in_label_order(names: Iterable[str]) -> tuple[str, ...]:
    """Class names as their labels count them: by name, or, where all are numbers, by number."""
    found = list(names)
    if all(name.isascii() and name.isdecimal() for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))


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
class MapsEntry:
    """The label maps of a split, as the manifest describes them."""

    file: str
    """int16 (samples, 2, top_k, *grid): bits of logits in float16, largest first, and of their classes in uint16."""
    teacher: str
    """As its name was given."""
    teacher_sha256: str
    """Of its weights."""
    side: int
    """Of the square images that it was shown, in pixels."""
    covers: Literal["whole", "square"]
    """What of a stored image: all, both sides scaled; or the central square, as in the authors' code."""
    grid: tuple[int, int]
    top_k: int
    num_classes: int
    top1: float
    """Share of the split's images that it classifies as they are labelled, seen so."""


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
    account: Mapping[str, Any] = field(default_factory=dict)
    """What became of every file of the source; empty in sets of earlier versions."""
    label_maps: Mapping[str, MapsEntry] = field(default_factory=dict)
    """By split; programs that know of none read the rest as ever."""
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        content = {"format": FORMAT, "format_version": self.format_version, **asdict(self)}
        if not self.label_maps:
            del content["label_maps"]
        return _text(content)


def hash_file(path: Path) -> FileEntry:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        return FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def load_rows(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    """A table of `count` rows, mapped; `DataError` for anything else."""
    try:
        rows: NDArray[Any] = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path} is no table ({in_words(error)}); copy it again") from error
    if rows.shape != (count,) or rows.dtype != dtype:
        raise DataError(f"{path} is no table of {count} samples; copy it again")
    return rows


def take_rows(rows: NDArray[Any], index: NDArray[np.int64]) -> NDArray[Any]:
    """Rows `index` of a table, (len(index),): the bytes of a row at once, which takes a quarter of the time of looking
    in a column of its own for each of its numbers, and a seventh of numpy's own way with rows."""
    taken = rows.view(np.uint8).reshape(len(rows), rows.dtype.itemsize).take(index, axis=0)
    return taken.view(rows.dtype)[:, 0]


def _text(content: Mapping[str, Any]) -> str:
    """A manifest as it is written."""
    return json.dumps({**content, "sha256": _digest(content)}, indent=1, ensure_ascii=False) + "\n"


def _digest(content: Mapping[str, Any]) -> str:
    """Of a manifest's content, however it is spaced and ordered."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(root: Path) -> tuple[Manifest, str]:
    """The manifest of a converted data set and the sha256 of its text, which is that from before there were label maps:
    the images are the same. `DataError` if it is not one."""
    content, path = _read(root), root / MANIFEST
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
        account=content.get("account", {}),
        label_maps={
            name: MapsEntry(**{**{key: maps[key] for key in _MapsPart.__annotations__}, "grid": tuple(maps["grid"])})
            for name, maps in content.get("label_maps", {}).items()
        },
        format_version=content["format_version"],
    )
    if not manifest.label_maps:
        return manifest, hash_file(path).sha256
    return manifest, hashlib.sha256(_text(_without_maps(content)).encode()).hexdigest()


def find_maps(root: Path, split: str, named: str | Path) -> Path:
    """The file of label maps that is meant for a split of the data set at `root`: the one named, or, for `auto`, what
    its manifest names. Raises `DataError` where that names none, or the file has another size than it says."""
    if str(named) != "auto":
        return Path(named)
    split = canonical_split(split)
    remedy = f"make them with pss-convert {root} --token-labels TEACHER"
    if not (root / MANIFEST).exists():
        raise DataError(f"{root} is no converted data set, and has no label maps of its own; convert it, and {remedy}")
    manifest, _ = read_manifest(root)
    if split not in manifest.label_maps:
        split_option = "" if split == "train" else f" --split {split}"
        raise DataError(f"{root} has no label maps of its {split} split; {remedy}{split_option}")
    path = root / manifest.label_maps[split].file
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read ({in_words(error)}); copy it again") from error
    if found != (expected := manifest.files[path.name].bytes):
        raise DataError(f"{path} has {found} bytes instead of {expected}; copy it again")
    return path


def with_label_maps(root: Path, split: str, maps: MapsEntry, file: FileEntry) -> str:
    """The text of a data set's manifest once the split has these label maps, in the place of any it has had."""
    content = _read(root)
    others = {name: entry for name, entry in content.get("label_maps", {}).items() if name != split}
    gone = content.get("label_maps", {}).get(split, {}).get("file")
    files = {name: entry for name, entry in content["files"].items() if name != gone}
    content["files"] = dict(sorted({**files, maps.file: asdict(file)}.items()))
    content["label_maps"] = dict(sorted({**others, split: asdict(maps)}.items()))
    return _text(content)


def _without_maps(content: Mapping[str, Any]) -> dict[str, Any]:
    named = {entry["file"] for entry in content["label_maps"].values()}
    rest = {name: value for name, value in content.items() if name != "label_maps"}
    return rest | {"files": {name: entry for name, entry in content["files"].items() if name not in named}}


def _read(root: Path) -> dict[str, Any]:
    """What a manifest holds, all but its own checksum, which is right."""
    path = root / MANIFEST
    if not path.exists():
        raise DataError(f"{root} holds no {MANIFEST}; convert it with pss-convert first")
    content: dict[str, Any] = read_json(path, dict[str, Any], remedy="convert the data set again")
    if content.get("format") != FORMAT:
        raise DataError(f"{path} was not written by pss-convert; point at a converted data set")
    version = content.get("format_version")
    if not isinstance(version, int) or version not in _READ_VERSIONS:
        raise DataError(
            f"{path} has format version {str(version)[:20]}, this program reads "
            f"{' and '.join(map(str, _READ_VERSIONS))}; convert the data set again, or use a newer pss"
        )
    if content.pop("sha256", None) != _digest(content):
        raise DataError(f"{path} is not as it was written; copy it again or convert anew")
    checked(content, _Content, f"{path}", remedy="copy it again or convert anew")
    _check_agreement(content, path)
    return content


class _Part(TypedDict):
    num_samples: _Count
    per_class: list[_Count]
    table: _Name
    shards: list[_Name]
    beton: _Name | None


class _MapsPart(TypedDict):
    file: _Name
    teacher: str
    teacher_sha256: str
    side: Annotated[int, Ge(1), Le(1 << 14)]
    covers: Literal["whole", "square"]
    grid: Annotated[list[Annotated[int, Ge(1), Le(1 << 10)]], Len(2, 2)]
    top_k: Annotated[int, Ge(1), Le(1 << 16)]
    num_classes: Annotated[int, Ge(1), Le(1 << 16)]
    top1: Annotated[float, Ge(0), Le(1)]


class _File(TypedDict):
    bytes: _Count
    sha256: str


class _Options(TypedDict):
    max_size: Annotated[int, Ge(1), Le(1 << 20)]


class _Made(TypedDict):
    options: _Options


class _Content(TypedDict):
    classes: list[str]
    splits: dict[Literal["train", "val"], _Part]
    files: dict[_Name, _File]
    made: _Made
    skipped: list[dict[str, str]]
    transcoded: list[str]
    warned: list[dict[str, str]]
    label_maps: NotRequired[dict[Literal["train", "val"], _MapsPart]]


def _check_agreement(content: Mapping[str, Any], path: Path) -> None:
    """Raise `DataError` unless what the parts of a manifest say of each other is so."""
    if paths := [one for one in content["files"] if one in (".", "..") or "/" in one or "\0" in one]:
        raise DataError(f"{path} lists {paths[0]!r}, which is no file in its folder; copy it again or convert anew")
    for name, split in content["splits"].items():
        named = [split["table"], *split["shards"], *([split["beton"]] if split["beton"] else [])]
        if missing := [one for one in named if one not in content["files"]]:
            raise DataError(f"{path} says nothing of {missing[0]!r}, a file of its {name} split; copy it again")
        if len(split["per_class"]) != len(content["classes"]) or sum(split["per_class"]) != split["num_samples"]:
            raise DataError(f"{path} counts other samples in the {name} split than in its classes; copy it again")
    for name, maps in content.get("label_maps", {}).items():
        if name not in content["splits"] or maps["file"] not in content["files"]:
            raise DataError(
                f"{path} says nothing of {maps['file']!r}, the label maps of its {name} split; copy it again"
            )
        if maps["num_classes"] != len(content["classes"]) or maps["top_k"] > maps["num_classes"]:
            raise DataError(f"{path} has label maps of other classes than its own; copy it again")
