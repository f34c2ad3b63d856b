"""What a conversion keeps of every image is a few dozen bytes, so that a machine of any size converts 13 million."""

from __future__ import annotations

import itertools
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipelines.conversion.options import Options
from pipelines.conversion.scan import CHECKED, checked_images
from pipelines.conversion.shards import plan_shards, write_rows
from pipelines.conversion.splits import SHUFFLE, divide, permutation
from pipelines.conversion.work import Finished, chunks_of
from pipelines.sources.columns.samples import Samples
from pipelines.sources.listing import Spool
from pipelines.storage.manifest import SAMPLE, hash_file

IN_A_CLASS = 1000


def class_folders(root: Path, num_classes: int) -> Path:
    """Files that nobody looks into: links to one."""
    root.mkdir()
    (file := root / "one.txt").write_text("no image")
    for label in range(num_classes):
        folder = root / "train" / f"n{label:08d}"
        folder.mkdir(parents=True)
        for number in range(IN_A_CLASS):
            os.link(file, folder / f"n{label:08d}_{number * 7919 % 100_003}.JPEG")
    file.unlink()
    return root


def found_good(samples: Samples) -> Iterator[Finished]:
    for chunk in chunks_of(len(samples), 8, 1024):
        rows = np.zeros(len(samples[chunk]), CHECKED)
        rows["height"], rows["width"], rows["bytes"], rows["good"] = 375, 500, 110_000, True
        yield Finished(rows, {"reasons": {}, "warned": {}})


def peak_bytes(source: Path, work: Path) -> int:
    """Of all that happens before the first image is written, but for the look at the images."""
    options = Options(formats=("dali",))
    tracemalloc.start()
    found = options.inspect(str(source))
    samples = divide(found.listing(Spool(work)), str(source), None, None, options.seed)["train"]
    images, _ = checked_images(samples, found_good(samples), None, "")
    images = images.take(permutation(len(images), options.seed, SHUFFLE))
    shards = plan_shards(work, work, "train", images, options.shard_size)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(len(shard.images) for shard in shards) == len(samples)
    return peak


def test_an_image_takes_less_than_75_bytes(tmp_path: Path) -> None:
    """A thousand million bytes for 13 million images. Lists of objects would take ten times as many."""
    small, large = (class_folders(tmp_path / f"{count}", count) for count in (2, 42))
    peaks = [peak_bytes(source, tmp_path) for source in (small, large)]
    assert (peaks[1] - peaks[0]) / (40 * IN_A_CLASS) < 75


def test_held_out_images_take_as_little(tmp_path: Path) -> None:
    """Views of the same columns."""
    source = class_folders(tmp_path / "source", 20)
    listing = Options(formats=("dali",), split="train").inspect(str(source)).listing(Spool(tmp_path))
    listing.splits["all"] = listing.splits.pop("train")
    tracemalloc.start()
    splits = divide(listing, str(source), None, 0.25, 7)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [len(splits[split]) for split in ("train", "val")] == [15_000, 5_000]
    assert sorted(one.name for one in itertools.chain(*splits.values())) == [one.name for one in listing.splits["all"]]
    assert kept / 20_000 < 6
    assert peak / 20_000 < 40


@pytest.mark.parametrize("pieces", [[], [5], [3, 0, 70_000]])
def test_a_table_is_written_as_numpy_writes_it(pieces: list[int], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = random.integers(0, 256, (sum(pieces), SAMPLE.itemsize), np.uint8).view(SAMPLE)[:, 0]
    np.save(tmp_path / "whole.npy", rows)
    entry = write_rows(tmp_path / "pieces.npy", SAMPLE, len(rows), np.split(rows, np.cumsum(pieces)))
    content = (tmp_path / "pieces.npy").read_bytes()
    assert content == (tmp_path / "whole.npy").read_bytes()
    assert entry == hash_file(tmp_path / "whole.npy")
