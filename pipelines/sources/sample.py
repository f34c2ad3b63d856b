"""Where an encoded image lies: every source is listed as byte ranges of files, which any process can read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.base import DataError

MAX_ENCODED = 256 << 20
"""Bytes of the largest encoded image that is read."""

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


@dataclass(frozen=True)
class Listing:
    """All samples of a source, in an order that depends on its content alone."""

    classes: tuple[str, ...]
    splits: dict[str, Sequence[Sample]]
    """By `train`, `val` or, alone, `UNSPLIT`."""


def check_labels(listing: Listing, source: Path | str) -> None:
    """Raise `DataError` unless every label has a class and every class has a sample in every split."""
    for split, samples in listing.splits.items():
        counts = [0] * len(listing.classes)
        for sample in samples:
            if not 0 <= sample.label < len(counts):
                raise DataError(
                    f"{sample.name} has label {sample.label}, but {source} has the classes 0 ... {len(counts) - 1}"
                )
            counts[sample.label] += 1
        if 0 in counts:
            name = listing.classes[counts.index(0)]
            where = source if split == UNSPLIT else f"the {split} split of {source}"
            raise DataError(f"class {name!r} has no image in {where}; add some or remove the class")
