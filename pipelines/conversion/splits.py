"""Which samples are for training and which for validation, and in which order they are written."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.base import DataError
from pipelines.sources.columns.samples import Samples
from pipelines.sources.listing import Inspected
from pipelines.sources.sample import UNSPLIT, Listing
from pipelines.storage.manifest import Split, canonical_split

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
) -> dict[str, Samples]:
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


def _hold_out(samples: Samples, classes: Sequence[str], val_fraction: float, seed: int) -> dict[str, Samples]:
    labels = samples.labels
    by_class = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels, minlength=len(classes))).tolist()
    held = np.zeros(len(samples), dtype=np.bool_)
    for label, (name, first, end) in enumerate(zip(classes, [0, *ends], ends, strict=False)):
        count = max(1, round((end - first) * val_fraction))
        if count >= end - first:
            raise DataError(f"class {name!r} has {end - first} image(s), too few to hold out {count} for validation")
        held[by_class[first:end][permutation(end - first, seed, HOLD_OUT + label)[:count]]] = True
    return {
        split: samples.take(np.flatnonzero(chosen).astype(np.int32))
        for split, chosen in (("train", ~held), ("val", held))
    }


def permutation(count: int, seed: int, purpose: int) -> NDArray[np.int32]:
    """0 ... `count` - 1 in a random order that depends on the three numbers alone."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64)))
    order = np.arange(count, dtype=np.int32)
    generator.shuffle(order)  # as generator.permutation(count) would be, in half of the memory
    return order


def account_of(inspected: Inspected, splits: Mapping[str, Split], skipped: int) -> dict[str, Any]:
    """What became of every file of the source, and of every sample in them."""
    account = inspected.account()
    converted = {split: part.num_samples for split, part in splits.items()}
    found = sum(account["samples"].values())
    assert found == sum(converted.values()) + skipped
    return account | {"samples": {"found": found, **converted, "skipped": skipped}}
