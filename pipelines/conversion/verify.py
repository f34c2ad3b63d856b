"""Whether a converted data set is as it was written: in seconds by a sample of it, or byte for byte."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.base import DataError, in_words
from pipelines.conversion.engines import Engine, map_tasks
from pipelines.conversion.processes import PATIENCE, Kept, Progress, beat, check_patience
from pipelines.conversion.shards import BLOCK, Shard, member_header, members_behind, write_shard
from pipelines.conversion.work import Finished
from pipelines.sources.columns.samples import MAX_ENCODED
from pipelines.storage.beton import RAW, STORED, damaged_frame, stored_path
from pipelines.storage.images import open_image
from pipelines.storage.manifest import SAMPLE, FileEntry, Manifest, MapsEntry, Split, load_rows, read_manifest
from pipelines.storage.unreadable import UNREADABLE

LISTED = 10  # damaged files or samples named in a message
_SAMPLED = 64  # of each file format of a split, in a quick verification
_CHUNK = 256  # samples per task
_LARGE = (".tar", ".beton")
_READ = 16 << 20  # bytes at a time
_LARGEST_PAYLOAD = 1 << 30  # bytes: pixels of the largest image that --max-size allows


def verify(root: Path, jobs: int, progress: Progress, *, full: bool = False, patience: float = PATIENCE) -> Manifest:
    """Compare a converted data set with its manifest; `DataError` names the files and samples that differ.

    Quickly: all sizes, everything but the images themselves and label maps, and 64 random samples of each split and
    format. With `full`, every sample and the checksum of every file.
    """
    check_patience(patience)
    manifest, _ = read_manifest(root)
    names = sorted(manifest.files)
    large = {maps.file for maps in manifest.label_maps.values()}
    checked = [name for name in names if full or not (name.endswith(_LARGE) or name in large)]
    progress.start("verifying files", len(checked))
    paths = [root / name for name in checked]
    entries = map_tasks(_entry, paths, jobs, lambda _: progress.advance(1), patience=patience)
    found = dict(zip(checked, entries, strict=True))
    bad = [
        name for name in names if found.get(name, _same_size(root / name, manifest.files[name])) != manifest.files[name]
    ]
    tables_good = {
        split: entry
        for split, entry in manifest.splits.items()
        if entry.table not in bad and (entry.beton is None or f"{entry.beton}.npy" not in bad)
    }
    max_size = manifest.made["options"]["max_size"]
    sampled, decimal = None if full else _SAMPLED, manifest.format_version > 2
    problems = check_samples(
        root, tables_good, jobs, progress, max_size, sampled=sampled, decimal=decimal, patience=patience
    )
    for split, maps in manifest.label_maps.items():
        if maps.file not in bad:
            problems.extend(_damaged_maps(root, maps, manifest.splits[split].num_samples, sampled))
    if bad or problems:
        named = {problem.split(",")[0] for problem in problems}
        which = listed([*problems, *(name for name in bad if name not in named)])
        raise DataError(f"{root}: {which} are not as they were written; copy them again or convert anew")
    return manifest


def listed(names: Sequence[str]) -> str:
    """The first few of many."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{', '.join(names[:LISTED])}{more}"


def check_samples(
    root: Path,
    splits: Mapping[str, Split],
    jobs: int,
    progress: Progress,
    max_size: int,
    *,
    sampled: int | None = None,
    decimal: bool = True,
    engine: Engine = "processes",
    patience: float = PATIENCE,
) -> list[str]:
    """What is wrong with the samples in the tars and .beton files, by file and number.

    `max_size` is the option the .beton files were written with, `decimal` whether the tars have `.cls` members.
    """
    tasks: list[_Task] = []
    problems: list[str] = []
    for split in splits.values():
        chunks = _some(split.num_samples, sampled)
        if split.shards:
            tasks.extend(_Task(root, split, chunk, False, decimal) for chunk in chunks)
        if split.beton is not None:
            labels = load_rows(root / split.table, SAMPLE, split.num_samples)["label"]
            rows = load_rows(stored_path(root / split.beton), STORED, split.num_samples)
            if problem := damaged_frame(root / split.beton, rows, labels, max_size):
                problems.append(f"{split.beton}, {problem}")
            tasks.extend(_Task(root, split, chunk, True, decimal) for chunk in chunks)
    progress.start("verifying samples", sum(len(task.index) for task in tasks))
    results = map_tasks(_check_chunk, tasks, jobs, lambda result: progress.advance(result[0]), engine, patience)
    for _, found in results:
        problems.extend(found)
    return problems


def _damaged_maps(root: Path, maps: MapsEntry, num_samples: int, sampled: int | None) -> list[str]:
    """What is wrong with label maps, by sample; all are looked at where `sampled` is None."""
    try:
        rows = np.load(root / maps.file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        return [f"{maps.file}, no whole .npy file ({in_words(error)})"]
    if rows.shape != (num_samples, 2, maps.top_k, *maps.grid) or rows.dtype != np.dtype("<i2"):
        return [f"{maps.file}, no label maps as dataset.json has them"]
    damaged = []
    for index in _some(num_samples, sampled):
        logits = rows[index, 0].view("<f2").astype(np.float32)  # (some, top_k, h, w)
        sound = np.isfinite(logits) & (rows[index, 1].view("<u2") < maps.num_classes)
        sound[:, 1:] &= logits[:, 1:] <= logits[:, :-1]  # the largest is first
        damaged += [f"{maps.file}, sample {i}" for i in index[~sound.all(axis=(1, 2, 3))].tolist()]
        beat()
    return damaged


def _some(num_samples: int, sampled: int | None) -> list[NDArray[np.int32]]:
    """Samples in chunks: so many random ones, or all."""
    index = np.arange(num_samples, dtype=np.int32)
    if sampled is not None and sampled < len(index):
        seed = int.from_bytes(os.urandom(8), "little")
        index = np.sort(np.random.default_rng(seed).choice(index, sampled, replace=False))
    return [index[i : i + _CHUNK] for i in range(0, len(index), _CHUNK)]


@dataclass(frozen=True)
class _Task:
    root: Path
    split: Split
    index: NDArray[np.int32]
    beton: bool
    decimal: bool


def _entry(path: Path) -> FileEntry | None:
    try:
        return hashed(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({in_words(error)}); change who may read it, or mend the disk"
        ) from error


def hashed(path: Path) -> FileEntry:
    """Size and sha256 of a file, however long it takes to read."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while content := file.read(_READ):
            digest.update(content)
            size += len(content)
            beat()
    return FileEntry(size, digest.hexdigest())


def _same_size(path: Path, expected: FileEntry) -> FileEntry | None:
    try:
        return expected if path.stat().st_size == expected.bytes else None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({in_words(error)}); change who may read it, or mend the disk"
        ) from error


def _check_chunk(task: _Task) -> tuple[int, list[str]]:
    """The number of samples, and those that are damaged."""
    check = _damaged_in_beton if task.beton else _damaged_in_tars
    return len(task.index), check(task)


def _damaged_in_tars(task: _Task) -> list[str]:
    rows = load_rows(task.root / task.split.table, SAMPLE, task.split.num_samples)
    damaged = []
    for i in task.index.tolist():
        row = rows[i]
        shard, offset, length = int(row["shard"]), int(row["offset"]), int(row["length"])
        if not 0 <= shard < len(task.split.shards) or offset < BLOCK or not 0 < length <= MAX_ENCODED:
            damaged.append(f"{task.split.table}, sample {i}")
            continue
        tar = task.split.shards[shard]
        if not _member_sound(task.root / tar, i, row, decimal=task.decimal):
            damaged.append(f"{tar}, member {i:08d}.jpg")
    return damaged


def _member_sound(tar: Path, number: int, row: np.void, *, decimal: bool) -> bool:
    """Whether sample `number` is in a tar as its row of SAMPLE says."""
    length = int(row["length"])
    behind = b"".join(
        member_header(f"{number:08d}.{name}", len(content)) + content + bytes(-len(content) % BLOCK)
        for name, content in members_behind(int(row["label"]), number, decimal=decimal).items()
    )
    padding = bytes(-length % BLOCK)
    content = _read(tar, int(row["offset"]) - BLOCK, BLOCK + length + len(padding) + len(behind))
    return (
        content.startswith(member_header(f"{number:08d}.jpg", length))
        and zlib.crc32(content[BLOCK : BLOCK + length]) == row["crc32"]
        and content[BLOCK + length :] == padding + behind
    )


def write_checked(shard: Shard) -> Finished:
    """As `write_shard`, and read it back; `Kept` if it is not as it was written: what has left before is good."""
    finished, tar = write_shard(shard), Path(shard.tar)
    bad = [
        f"{tar.name}, member {number:08d}.jpg"
        for number, row in enumerate(finished.rows, shard.first)
        if not _member_sound(tar, number, row, decimal=True)
    ]
    if bad:
        raise Kept(f"{listed(bad)} cannot be read back as written; check the disk of {tar.parent}")
    return finished


def _damaged_in_beton(task: _Task) -> list[str]:
    assert task.split.beton is not None
    path = task.root / task.split.beton
    rows = load_rows(stored_path(path), STORED, task.split.num_samples)
    return [f"{path.name}, sample {i}" for i in task.index.tolist() if not _decodes(path, rows[i])]


def _decodes(path: Path, row: np.void) -> bool:
    if not 0 < int(row["size"]) <= _LARGEST_PAYLOAD:
        return False
    payload = _read(path, int(row["ptr"]), int(row["size"]))
    if zlib.crc32(payload) != row["crc32"]:
        return False
    size = (int(row["width"]), int(row["height"]))
    if row["mode"] == RAW:
        return len(payload) == 3 * size[0] * size[1]
    try:
        with open_image(payload) as image:
            image.load()
            return (image.size, image.mode) == (size, "RGB")
    except UNREADABLE:
        return False


def _read(path: Path, offset: int, length: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(length)
    except FileNotFoundError:
        content = b""
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({in_words(error)}); change who may read it, or mend the disk"
        ) from error
    beat()
    return content
