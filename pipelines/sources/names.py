"""What the names of files and folders say: which split, which kind of file, which part of how many."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from pipelines.base import DataError, in_words
from pipelines.sources.columns.tree import Tree, shown
from pipelines.storage.json_files import bounded
from pipelines.storage.manifest import in_label_order
from pipelines.storage.source import IMAGE_SUFFIXES

WORDS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val", "eval": "val", "evaluation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""Splits as people call them. Test images are validation only where there is nothing else, or on request."""

UNREAD_IMAGES = frozenset((
    ".heic", ".heif", ".avif", ".jp2", ".j2k", ".jpx", ".jxl", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".psd",
    ".svg", ".eps", ".ps", ".ico", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".exr", ".hdr", ".dcm",
    ".pcx", ".sgi", ".dds", ".fits", ".icns", ".xbm", ".xpm", ".wmf", ".emf", ".ai", ".jpe", ".jfif", ".apng",
    ".mpo",
))  # fmt: skip
COMPRESSED = (
    ".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".zip", ".7z", ".rar",
    ".gz", ".bz2", ".xz", ".zst", ".lz4",
)  # fmt: skip
OTHER_DATA = frozenset((
    ".tfrecord", ".tfrecords", ".record", ".rec", ".lmdb", ".mdb", ".h5", ".hdf5", ".npz", ".npy", ".beton",
    ".feather", ".orc", ".avro", ".mp4", ".avi",
))  # fmt: skip
_MAX_ORDER_FILE = 64 << 20
_SIGNATURES = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+",
)  # fmt: skip
_PART = re.compile(r"(?P<before>.*?)(?P<number>\d+)(?P<word>[-_]of[-_])(?P<of>\d+)(?P<after>\D*)$")


def split_of(name: str) -> str | None:
    """`train`, `val` or `test`, by a word anywhere in a file's or folder's own name; None where there is none.

    Raises:
        DataError: there are two.
    """
    found = {WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in WORDS}
    if len(found) > 1:
        raise DataError(f"{name} is called like two splits, {' and '.join(sorted(found))}; rename it, or --ignore it")
    return found.pop() if found else None


def said_split(path: str) -> str | None:
    """The split that a file or one of its folders is called after; None where they say none, or several."""
    words = {WORDS[word] for word in re.split(r"[^a-z]+", path.lower()) if word in WORDS}
    return words.pop() if len(words) == 1 else None


def by_split(tree: Tree, names: Sequence[str]) -> dict[str | None, list[str]]:
    """Files by the split that their own name or one of their folders is called after; None: not one says it.

    Raises:
        DataError: a file's name and its folder's contradict each other, or some say it and others do not.
    """
    splits: dict[str | None, list[str]] = {}
    for name in names:
        words = {word for part in name.split("/") if (word := split_of(part))}
        if len(words) > 1:
            raise DataError(
                f"{tree.path(name)} is called like two splits, {' and '.join(sorted(words))}; rename it or its folder, "
                "or leave it out with --ignore"
            )
        splits.setdefault(words.pop() if words else None, []).append(name)
    if None in splits and len(splits) > 1:
        raise DataError(
            f"{tree.path(splits[None][0])} is of no known split, others beside it are; rename it, or leave it out with "
            "--ignore"
        )
    return splits


def check_parts(tree: Tree, names: Iterable[str]) -> None:
    """Raise `DataError` where `00000-of-00003` is there and one of its three is not."""
    groups: dict[tuple[str, ...], dict[int, re.Match[str]]] = {}
    for name in names:
        if (match := _PART.match(name)) and len(match["of"]) < 8:
            groups.setdefault(match.group("before", "word", "of", "after"), {})[int(match["number"])] = match
    for (before, word, of, after), found in groups.items():
        first = 1 if int(of) in found else 0  # some number from 1
        missing = [number for number in range(first, int(of) + first) if number not in found]
        if missing:
            digits = len(next(iter(found.values()))["number"])
            lacking = tree.path(f"{before}{missing[0]:0{digits}d}{word}{of}{after}")
            raise DataError(f"{lacking} is missing: {len(found)} of {int(of)} files are there; download it again")


def suffix_of(name: str) -> str:
    """The suffix in small letters; of a compressed tar, both."""
    small = name.lower()
    return next((one for one in COMPRESSED if small.endswith(one)), Path(small).suffix)


def is_image(name: str) -> bool:
    """Whether the name is that of an image that is read."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def kind_of(name: str) -> str | None:
    """What a file that nobody claims would be, by its name: words for a sentence; None if it is no data."""
    suffix = suffix_of(name)
    if name.lower().endswith(IMAGE_SUFFIXES):
        return "an image"
    if suffix in UNREAD_IMAGES:
        return "an image of a kind that is not read"
    if suffix == ".tar":
        return "an archive"
    if suffix in COMPRESSED:
        return "a compressed archive"
    if suffix in (".parquet", ".arrow"):
        return "a table"
    if suffix in OTHER_DATA or (suffix == "" and re.search(r"-\d+-of-\d+$", name)):
        return "data of a kind that is not read"
    return None


def looks_like_image(path: Path) -> bool:
    """Whether the first bytes of a file are those of an image that is read, whatever it is called.

    Raises:
        DataError: they cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise DataError(
            f"{shown(path)} cannot be read ({in_words(error)}), so that nobody knows whether it is an image; change "
            "who may read it, or leave it out with --ignore"
        ) from error
    if head.startswith(b"BM"):  # two letters are little: the size of the file follows
        return int.from_bytes(head[2:6], "little") == path.stat().st_size
    return head.startswith(_SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def by_number(name: str) -> tuple[tuple[int, str], ...]:
    """A key that sorts `img_2` before `img_10`."""
    return tuple(
        (int(part), "") if part.isdecimal() and part.isascii() else (-1, part) for part in re.findall(r"\d+|\D+", name)
    )


def order_is_certain(names: Sequence[str]) -> bool:
    """Whether names sort the same way as text and by the numbers in them."""
    return sorted(names) == sorted(names, key=by_number)


def order_classes(names: Iterable[str], order: str | None, source: Path) -> tuple[str, ...]:
    """Class names in the order of their labels: that of numbers if all are numbers, else by name.

    Args:
        names: those of the folders.
        order: `name`, `number`, a text file with a class per line, or None.
        source: where they were found.

    Raises:
        DataError: two are one number, or the file and the folders do not agree.
    """
    found = list(names)
    numbers = all(name.isascii() and name.isdecimal() for name in found)
    if order == "name":
        return tuple(sorted(found))
    if order in (None, "number"):
        ordered = sorted(found, key=by_number) if order == "number" else list(in_label_order(found))
        for one, other in pairwise(ordered):
            if (numbers or order == "number") and by_number(one) == by_number(other):
                raise DataError(f"classes {one!r} and {other!r} of {source} are one number; rename one of them")
        return tuple(ordered)
    return _in_order_of(Path(order), found)


def order_in_words(classes: Sequence[str], order: str | None) -> str:
    """What `order_classes` went by."""
    if order not in (None, "name", "number"):
        return f"{order}"
    return "their names" if list(classes) == sorted(classes) else "their numbers"


def _in_order_of(path: Path, found: Sequence[str]) -> tuple[str, ...]:
    try:
        if (content := bounded(path, _MAX_ORDER_FILE)) is None:
            raise DataError(
                f"--class-order {path} is no text file of at most {_MAX_ORDER_FILE >> 20} MiB; give one class a line"
            )
        lines = [line.strip() for line in content.decode("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--class-order {path} cannot be read ({in_words(error)}); use name, number, or a text file with a class a "
            "line"
        ) from error
    known = set(found)
    names = [line if line in known else line.split()[0].strip(",") for line in lines]
    if missing := sorted(known - set(names)):
        raise DataError(f"--class-order {path} lacks the class {missing[0]!r}; add it")
    if unknown := sorted(set(names) - known):
        raise DataError(f"--class-order {path} names {unknown[0]!r}, which is no class of the source; remove it")
    if len(set(names)) < len(names):
        raise DataError(f"--class-order {path} names a class twice; mend it")
    return tuple(names)
