"""Synthetic data: converted sets whose tars are empty space, and class folders whose files are links to a few."""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from pathlib import Path

import numpy as np

from pipelines.conversion.shards import BLOCK, write_file
from pipelines.storage.manifest import MANIFEST, SAMPLE, FileEntry, Manifest, Split

_IMAGE_BYTES = 3000
_BEHIND = 6 * BLOCK  # label twice and number, each with its header
_MOST_LINKS = 60_000  # to one file; ext4 allows 65,000


def converted_set(root: Path, num_samples: int, num_classes: int, num_tars: int) -> Path:
    """A set whose manifest, table and places of images are such as pss-convert writes. Its images are zeros with the
    right checksum, and its tars take no room. One that is there is used again."""
    if (root / MANIFEST).exists():
        return root
    root.mkdir(parents=True)
    shard_size = -(-num_samples // num_tars)
    in_tar = BLOCK + -(-_IMAGE_BYTES // BLOCK) * BLOCK + _BEHIND
    number = np.arange(num_samples)
    rows = np.zeros(num_samples, dtype=SAMPLE)
    rows["label"] = np.random.default_rng(0).permutation(number % num_classes)
    rows["height"], rows["width"], rows["length"] = 375, 500, _IMAGE_BYTES
    rows["shard"], rows["offset"] = number // shard_size, number % shard_size * in_tar + BLOCK
    rows["crc32"] = zlib.crc32(bytes(_IMAGE_BYTES))
    content = io.BytesIO()
    np.save(content, rows)
    files = {"train.samples.npy": write_file(root / "train.samples.npy", content.getvalue())}
    shards = [f"train-{shard:05d}.tar" for shard in range(-(-num_samples // shard_size))]
    for shard, name in enumerate(shards):
        samples = min(shard_size, num_samples - shard * shard_size)
        size = samples * in_tar + 2 * BLOCK
        with (root / name).open("wb") as file:
            file.truncate(size)
        files[name] = FileEntry(size, hashlib.sha256(name.encode()).hexdigest())  # only --verify --full compares it
        index = f"v1.2 {samples}\n".encode()
        (root / name).with_suffix(".idx").write_bytes(index)
        files[name.replace(".tar", ".idx")] = FileEntry(len(index), hashlib.sha256(index).hexdigest())
    per_class = np.bincount(rows["label"], minlength=num_classes).tolist()
    manifest = Manifest(
        classes=tuple(f"n{label:08d}" for label in range(num_classes)),
        splits={"train": Split(num_samples, tuple(per_class), "train.samples.npy", tuple(shards))},
        files=dict(sorted(files.items())),
        made={"source": "synthetic", "options": {"max_size": 500}, "versions": {}},
    )
    write_file(root / MANIFEST, manifest.to_json().encode())
    return root


def class_folders(root: Path, num_files: int, num_classes: int) -> Path:
    """train/CLASS/CLASS_NUMBER.JPEG, called as ImageNet's are. Files that are there are used again."""
    done = root.with_name(f"{root.name}.done")
    if done.exists():
        return root
    beside = root.with_name(f"{root.name}.files")
    beside.mkdir(parents=True)
    for number in range(num_files):
        if number % _MOST_LINKS == 0:
            file = beside / str(number)
            file.write_bytes(b"no image: nobody looks")
        if number * num_classes // num_files != (number - 1) * num_classes // num_files:  # the first of its class
            name = f"n{number * num_classes // num_files:08d}"
            folder = root / "train" / name
            folder.mkdir(parents=True)
        os.link(file, f"{folder}/{name}_{number}.JPEG")
    done.touch()
    return root
