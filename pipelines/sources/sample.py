"""Where an encoded image lies: every source is listed as byte ranges of files, which any process can read."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.base import DataError
from pipelines.sources.tree import some
from pipelines.storage.locks import NoLocks, lock

MAX_ENCODED = 256 << 20
"""Bytes of the largest encoded image that is read."""

_LONGEST = 1000  # characters of a class name

UNSPLIT = "all"
"""The key of samples whose source does not say which split they belong to."""


@dataclass(frozen=True, slots=True)  # there are a million of them
class Sample:
    """One encoded image."""

    name: str
    """For messages and lists: the file, or the archive and the member."""
    label: int
    path: str
    offset: int = 0
    length: int | None = None
    """None: the whole file."""

    def read(self) -> bytes:
        """The encoded bytes; `DataError` or `OSError` where they cannot be had."""
        with Path(self.path).open("rb") as file:
            file.seek(self.offset)
            encoded = file.read(MAX_ENCODED + 1 if self.length is None else self.length)
        if len(encoded) > MAX_ENCODED:
            raise DataError(f"larger than {MAX_ENCODED >> 20} MiB")
        if self.length is not None and len(encoded) != self.length:
            raise DataError("its archive ends before it does")
        return encoded


def file_samples(root: Path, names: Sequence[str], labels: Sequence[int]) -> list[Sample]:
    """Whole files as samples."""
    paths = (f"{root}/{name}" for name in names)
    return [Sample(path, label, path) for path, label in zip(paths, labels, strict=True)]


@dataclass(frozen=True)
class Choice:
    """What the user has decided about a source."""

    format: str | None = None
    """Of `listing.FORMATS`: the only reader that is asked."""
    images: str | None = None
    """Which column, or which extension of a sample's members, holds the image; of folders: a pattern of further files
    that are images."""
    label: str | None = None
    """Which column, or which key of a sample's JSON, holds the label."""
    class_order: str | None = None
    """`name`, `number`, or a text file with a class per line."""
    class_level: int | None = None
    """Which folder below the split is the class, from 1."""
    use_test: bool = False
    """Whether test images are the validation split though there are others."""
    one_split: bool = False
    """Whether the user says that all images are of one split."""
    held_out: bool = False
    """Whether some of the training images become validation images."""


class Spool:
    """A folder for images that do not lie in their files as they are: copied once into a file in which they do.

    Training images are written in shuffled order, so every one of them must be within reach at any time. A finished
    file is used again by a conversion that continues.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self, split: str, images: Iterable[tuple[str, int, bytes]], expected_bytes: int = 0) -> list[Sample]:
        """Write the (name, label, encoded image) of `images`, or find that it has been done."""
        data, index = self.folder / f"spool-{split}", self.folder / f"spool-{split}.json"
        with (self.folder / f"spool-{split}.lock").open("w") as file:
            with suppress(NoLocks):  # then there are no other parts of the same conversion that may be at it
                lock(file)
            if not index.exists():
                self._write(data, index, images, expected_bytes)
        rows = json.loads(index.read_text())
        return [Sample(name, label, str(data), offset, length) for name, label, offset, length in rows]

    def _write(self, data: Path, index: Path, images: Iterable[tuple[str, int, bytes]], expected_bytes: int) -> None:
        if (free := shutil.disk_usage(self.folder).free) < expected_bytes:
            raise DataError(
                f"{self.folder.parent.parent} has {free >> 20} MiB left, but a copy of the source needs "
                f"{expected_bytes >> 20} MiB beside the result; make room"
            )
        rows, at = [], 0
        with data.open("wb") as file:
            for name, label, encoded in images:
                file.write(encoded)
                rows.append((name, label, at, len(encoded)))
                at += len(encoded)
            file.flush()
            os.fsync(file.fileno())
        unfinished = index.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(rows))
        unfinished.replace(index)


@dataclass(frozen=True)
class Listing:
    """All samples of a source, in an order that depends on its content alone."""

    classes: tuple[str, ...]
    splits: dict[str, Sequence[Sample]]
    """By `train`, `val` or, alone, `UNSPLIT`."""


@dataclass
class Claim:
    """What a reader would make of a source: all that can be known before an image is looked at."""

    format: str
    """A name of `listing.FORMATS`."""
    described: str
    """The layout in words."""
    classes: tuple[str, ...]
    """In the order of their labels."""
    splits: dict[str, Sequence[int]]
    """The label of every sample, by `train`, `val` or, alone, `UNSPLIT`."""
    places: dict[str, str]
    """Where each split lies."""
    labels: str
    """Where the labels come from, in words."""
    read: Callable[[Spool], dict[str, Sequence[Sample]]]
    """The samples of every split, in the order of `splits`."""
    taken: dict[str, Sequence[str]] = field(default_factory=dict)
    """By folder: the names of the files that hold the samples, images themselves or archives and tables of them."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Files that were used in another way, and for what."""
    unused: dict[str, list[str]] = field(default_factory=dict)
    """By reason: files that the layout is known to bring along and that are not read."""
    notes: list[str] = field(default_factory=list)
    """Sentences that the user should know."""
    uses_test: bool = False
    """Whether test images are the validation split."""
    members: dict[str, Counter[str]] = field(default_factory=dict)
    """Of archives: what else is in them, by suffix."""

    def counts(self, split: str) -> list[int]:
        """Samples per class."""
        found = Counter(self.splits[split])
        return [found[label] for label in range(len(self.classes))]


def check_labels(claim: Claim, source: Path | str) -> None:
    """Look at the labels of a claim as a whole; validation classes without an image get a note.

    Raises:
        DataError: there is no sample, a label has no class, or a class has no training image.
    """
    for split, labels in claim.splits.items():
        where = f"{source}" if split == UNSPLIT else f"the {split} split of {source}"
        if not len(labels):
            raise DataError(f"there is no sample in {where}; check its files, or leave them out with --ignore")
        found = Counter(labels)
        if wrong := [label for label in found if not 0 <= label < len(claim.classes)]:
            raise DataError(
                f"{where} has the label {str(wrong[0])[:20]}, but there are {len(claim.classes)} classes, from 0; mend "
                "the labels"
            )
        empty = [name for label, name in enumerate(claim.classes) if not found[label]]
        if not empty:
            continue
        if split == "val" and "train" in claim.splits:
            claim.notes.append(f"{len(empty)} of {len(claim.classes)} classes have no validation image: {some(empty)}")
        else:
            raise DataError(f"class {empty[0]!r} has no image in {where}; add some or remove the class")


def only_test(source: str) -> DataError:
    """What to raise where there are test images only, and they are not to be the validation split."""
    return DataError(
        f"{source} has test images only, and --val-fraction takes validation images from others; leave it out to "
        "validate on the test images"
    )


def number_classes(source: Path | str, labels: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """Names for classes that are numbered only: their numbers.

    Raises:
        DataError: there are more than training images; a few large numbers must not become a billion names.
    """
    highest = max((max(some_labels) for some_labels in labels.values() if len(some_labels)), default=-1)
    total = sum(map(len, labels.values()))
    if highest >= total:
        raise DataError(
            f"{source} has the label {str(highest)[:20]}, and {total} samples: that number is no class; name the right "
            "label with --label"
        )
    return tuple(str(label) for label in range(highest + 1))


def check_class_names(names: Sequence[str], what: str) -> tuple[str, ...]:
    """`names`, if they can be those of classes. Raises `DataError`: there are none, or one of them twice."""
    if not names or not all(names):
        raise DataError(f"{what} names no class; mend it, or leave it out with --ignore")
    if long := [name for name in names if len(name) > _LONGEST]:
        raise DataError(f"{what} has a class name of {len(long[0])} characters, more than {_LONGEST}; shorten it")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{what} names the class {twice[0]!r} twice; mend it")
    return tuple(names)
