"""Where an encoded image lies: every source is listed as byte ranges of files, which any process can read."""

from __future__ import annotations

import json
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.base import DataError
from pipelines.sources.columns.names import FullNames
from pipelines.sources.columns.samples import RangeColumns, Sample, Samples
from pipelines.sources.columns.tree import some
from pipelines.storage.locks import NoLocks, lock

_LONGEST = 1000  # characters of a class name

UNSPLIT = "all"
"""The key of samples whose source does not say which split they belong to."""


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
        self.told: Callable[[str], str] = lambda name: name
        """What the names of images are kept as."""

    def fill(self, split: str, images: Iterable[tuple[str, int, bytes]], expected_bytes: int = 0) -> Samples:
        """Write the (name, label, encoded image) of `images`, or find that it has been done."""
        data, index = self.folder / f"spool-{split}", self.folder / f"spool-{split}.json"
        with (self.folder / f"spool-{split}.lock").open("w") as file:
            with suppress(NoLocks):  # then there are no other parts of the same conversion that may be at it
                lock(file)
            if not index.exists():
                self._write(data, index, images, expected_bytes)
        return Samples(RangeColumns(Sample(name, label, str(data), *place) for name, label, *place in _rows(index)))

    def _write(self, data: Path, index: Path, images: Iterable[tuple[str, int, bytes]], expected_bytes: int) -> None:
        if (free := shutil.disk_usage(self.folder).free) < expected_bytes:
            raise DataError(
                f"{self.folder.parent.parent} has {free >> 20} MiB left, but a copy of the source needs "
                f"{expected_bytes >> 20} MiB beside the result; make room"
            )
        at, unfinished = 0, index.with_suffix(".unfinished")
        with data.open("wb") as file, unfinished.open("w") as rows:
            rows.write("[")
            for number, (name, label, encoded) in enumerate(images):
                file.write(encoded)
                rows.write(f"{',' if number else ''}\n{json.dumps((self.told(name), label, at, len(encoded)))}")
                at += len(encoded)
            rows.write("\n]")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(index)


def _rows(index: Path) -> Iterator[Any]:
    """Those of a list in JSON, a row a line, one after the other; or all in one line, as earlier versions wrote it."""
    with index.open() as file:
        for line in file:
            if (told := line.strip().rstrip(",")) not in ("[", "]"):
                found = json.loads(told)
                yield from found if not found or isinstance(found[0], list) else [found]


@dataclass(frozen=True)
class Listing:
    """All samples of a source, in an order that depends on its content alone."""

    classes: tuple[str, ...]
    splits: dict[str, Samples]
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
    read: Callable[[Spool], dict[str, Samples]]
    """The samples of every split, in the order of `splits`."""
    taken: dict[str, Sequence[str]] = field(default_factory=dict)
    """By folder: the names of the files that hold the samples, images themselves or archives and tables of them."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Files that were used in another way, and for what."""
    unused: dict[str, Sequence[str]] = field(default_factory=dict)
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


def ordered_files(
    root: Path, files: Mapping[str, FullNames], classes: Sequence[str], split: str
) -> tuple[FullNames, array[int]]:
    """The files in class folders by class and name, and their labels; `DataError` for a class that is not known."""
    if unknown := sorted(set(files).difference(classes)):
        raise DataError(
            f"{root} has the class {unknown[0]!r} in the {split} split, which is no training class; mend it, or leave "
            "it out with --ignore"
        )
    number = {name: label for label, name in enumerate(classes)}
    names, labels = FullNames(), array("i")
    for name in sorted(files, key=number.__getitem__):
        names.extend(files[name].in_order())
        labels.extend(array("i", [number[name]]) * len(files[name]))
    return names, labels


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
