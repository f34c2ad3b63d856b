"""Which samples are for training and which for validation, and in which order they are written."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeVar

import numpy as np

from pipelines.base import DataError
from pipelines.sources.sample import UNSPLIT, Listing, Sample
from pipelines.storage.manifest import canonical_split

T = TypeVar("T")
SHUFFLE, HOLD_OUT = 1, 1 << 32  # second Philox keys, keeping the uses of the seed apart


def check_splits(found: Collection[str], source: str, split: str | None, val_fraction: float | None) -> None:
    """Raise `DataError` where the splits that a source has and the options do not agree."""
    if UNSPLIT not in found:
        if split is not None:
            raise DataError(f"--split is for a source that names no split; {source} has {' and '.join(found)} itself")
        if val_fraction is not None and set(found) != {"train"}:
            raise DataError(f"{source} has a validation split of its own; leave --val-fraction out")
    elif (split is None) == (val_fraction is None):
        raise DataError(
            f"{source} holds classes, not splits; give either --val-fraction, to hold some out for validation, "
            "or --split, to say which split they are"
        )


def divide(
    listing: Listing, source: str, split: str | None, val_fraction: float | None, seed: int
) -> dict[str, Sequence[Sample]]:
    """The samples by split; `DataError` as `check_splits`, or for a class that is too small."""
    splits = dict(listing.splits)
    check_splits(splits, source, split, val_fraction)
    if UNSPLIT not in splits and val_fraction is None:
        return splits
    (samples,) = splits.values()
    if split is not None:
        return {canonical_split(split): samples}
    assert val_fraction is not None
    return _hold_out(samples, listing.classes, val_fraction, seed)


def _hold_out(
    samples: Sequence[Sample], classes: Sequence[str], val_fraction: float, seed: int
) -> dict[str, Sequence[Sample]]:
    by_class: list[list[int]] = [[] for _ in classes]
    for i, sample in enumerate(samples):
        by_class[sample.label].append(i)
    chosen: set[int] = set()
    for label, (name, own) in enumerate(zip(classes, by_class, strict=True)):
        count = max(1, round(len(own) * val_fraction))
        if count >= len(own):
            raise DataError(f"class {name!r} has {len(own)} image(s), too few to hold out {count} for validation")
        chosen.update(permuted(own, seed, HOLD_OUT + label)[:count])
    return {
        "train": [sample for i, sample in enumerate(samples) if i not in chosen],
        "val": [sample for i, sample in enumerate(samples) if i in chosen],
    }


def permuted(items: Sequence[T], seed: int, purpose: int) -> list[T]:
    """`items` in a random order that depends on the two numbers alone."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64)))
    return [items[i] for i in generator.permutation(len(items))]
