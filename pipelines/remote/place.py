"""A converted data set at an address: its manifest and tables in the cache of this node, and whether the cache can
serve the order in which its samples are to be read."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.base import DataConfig, DataError, in_words
from pipelines.remote.cache import Cache, is_whole
from pipelines.remote.store import Store, is_url, usual_folder
from pipelines.remote.windows import deal
from pipelines.storage.manifest import MANIFEST, Manifest, MapsEntry, canonical_split, read_manifest

USUAL_WINDOW = 8
"""Tars of a window where nobody says how many; more hardly make the order better (docs/remote.md)."""

_OPENING_TRIES = 4
_BATCHES_AT_ONCE = 4  # that may have been begun before the first of them is delivered


@dataclass(frozen=True)
class RemoteSet(os.PathLike[str]):
    """Stands for the folder of a data set wherever one is named: as a path, it is where its manifest and tables are."""

    url: str
    folder: Path
    """In the cache; tars come and go."""
    cache: Cache

    def __fspath__(self) -> str:
        return os.fspath(self.folder)

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.url.rpartition("/")[2]

    @property
    def store(self) -> Store:
        return Store(self.url)

    def maps(self, split: str, named: str | Path) -> Path | None:
        """The label maps of its own that a split is to have, fetched; None where others are named.

        Raises:
            DataError: it has none, or they cannot be had.
        """
        if str(named) != "auto":
            return None
        manifest, _ = read_manifest(self.folder)
        entry: MapsEntry | None = manifest.label_maps.get(canonical_split(split))
        if entry is None:
            raise DataError(
                f"{self.url} has no label maps of its {split} split; make them in a copy of it, with pss-convert "
                "--token-labels, and upload that"
            )
        self._bring(manifest, entry.file)
        return self.folder / entry.file

    def check(self, split: str, config: DataConfig, *, train: bool, batch_size: int, world_size: int) -> None:
        """Raise `DataError` unless the cache can serve a split: all of the data set, or what windows need.

        `batch_size` is the global one.
        """
        limit = self.cache.limit_bytes
        manifest, _ = read_manifest(self.folder)
        if split not in manifest.splits or not manifest.splits[split].shards:
            return
        if limit is None:
            self._check_disk(manifest, split)
            return
        if not train:
            needed = _tables(manifest) + _streamed(manifest, split, batch_size, world_size)
            what = f"its tables, and the tars of some batches of {split} for each process"
        elif config.window is None:
            needed = _all(manifest)
            if needed <= limit:
                return
            fitting = usual_window(manifest, config.groups, limit, batch_size, world_size)
            remedy = f"or set data.window={fitting}" if fitting else "or set data.window and fewer data.groups"
            raise DataError(
                f"{self.url} has {_gb(needed)} GB and --cache-gb is {limit / 1e9:g}, and a permutation of all samples "
                f"needs the whole set; raise --cache-gb, {remedy}"
            )
        else:
            needed = windowed_bytes(manifest, config.groups, config.window, batch_size, world_size)
            spans = _windows_at_once(manifest, config.groups, config.window, batch_size)
            groups = _groups_here(config.groups, world_size)
            what = f"{spans} x {config.window} tars (data.window) of each of the {groups} groups that this node serves"
        if needed > limit:
            raise DataError(
                f"--cache-gb is {limit / 1e9:g} and this node needs {_gb(needed)} GB of {self.url} at once: {what}; "
                "raise it, or lower data.window or data.groups"
            )

    def _check_disk(self, manifest: Manifest, split: str) -> None:
        """Raise `DataError` where a split is to be kept whole, and the disk has no room for what is not there yet."""
        missing = sum(
            manifest.files[name].bytes
            for name in manifest.splits[split].shards
            if not is_whole(self.folder / name, manifest.files[name].bytes)
        )
        free = shutil.disk_usage(self.folder).free
        if missing > free:
            raise DataError(
                f"--cache-dir {self.cache.folder} has {_gb(free)} GB left, and {_gb(missing)} GB of the {split} split "
                f"of {self.url} are yet to come; bound it with --cache-gb (a training set that does not fit is then "
                "read in windows), or name another disk"
            )

    def choose_window(self, config: DataConfig, batch_size: int, world_size: int) -> int | None:
        """The window of the training order, where the set does not fit the cache and none is set; else that of the
        settings. `batch_size` is the global one."""
        limit = self.cache.limit_bytes
        manifest, _ = read_manifest(self.folder)
        if config.window is not None or limit is None or "train" not in manifest.splits or _all(manifest) <= limit:
            return config.window
        return usual_window(manifest, config.groups, limit, batch_size, world_size)

    def _bring(self, manifest: Manifest, name: str) -> None:
        store = self.store
        self.cache.bring(store, self.folder, name, manifest.files[name], 0, lambda: None, wait=True)


def open_remote(url: str, cache_dir: Path | None = None, cache_gb: float | None = None) -> RemoteSet:
    """Fetch the manifest and the tables of the data set at an address.

    Args:
        url: anything that fsspec reads: s3://bucket/set, https://host/set, file:///set.
        cache_dir: the cache of this node; `pss` in the user's cache folder if None.
        cache_gb: its limit, in GB (10^9 bytes); as much as the disk has if None.

    Raises:
        DataError: there is no data set, it cannot be read, or the cache cannot be written.
    """
    if cache_gb is not None and not 0 < cache_gb <= 1e9:
        raise DataError(f"--cache-gb is {cache_gb:g}; it must be a number above 0")
    limit = None if cache_gb is None else round(1e9 * cache_gb)
    cache, store = Cache(cache_dir or usual_folder(), limit), Store(url)
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.folder, prefix=".opening-") as found:
            arrived = Path(found) / MANIFEST
            store.fetch(MANIFEST, arrived, None, lambda: None, _OPENING_TRIES)
            manifest, sha256 = _read(store, Path(found))
            folder = cache.set_folder(sha256)
            arrived.replace(folder / MANIFEST)
    except OSError as error:
        raise DataError(
            f"--cache-dir {cache.folder} cannot be written ({in_words(error)}); name a folder on a disk of this machine"
        ) from error
    opened = RemoteSet(store.url, folder, cache)
    if limit is not None and (tables := _tables(manifest)) > limit:
        raise DataError(f"--cache-gb is {limit / 1e9:g}, and the tables of {url} alone have {_gb(tables)} GB; raise it")
    for split in manifest.splits.values():
        opened._bring(manifest, split.table)
    return opened


def find_data(
    data: str | os.PathLike[str], cache_dir: str | Path | None = None, cache_gb: float | None = None
) -> Path | RemoteSet:
    """What a data set is named by, a folder or an address, as what `pipelines.build` reads it from.

    Raises:
        DataError: as `open_remote`; or a cache is asked for that nothing needs.
    """
    if isinstance(data, RemoteSet):
        return data
    if is_url(data):
        return open_remote(str(data), None if cache_dir is None else Path(cache_dir), cache_gb)
    if cache_dir is not None or cache_gb is not None:
        option = "--cache-dir" if cache_dir is not None else "--cache-gb"
        raise DataError(
            f"{option} is for --data at an address, such as s3://bucket/set, and {data} is none; leave it out"
        )
    return Path(data)


def usual_window(manifest: Manifest, groups: int, limit: int, batch_size: int, world_size: int) -> int | None:
    """The largest window, up to `USUAL_WINDOW`, that a cache of `limit` bytes serves; None where not even one tar."""
    window = USUAL_WINDOW
    while window and windowed_bytes(manifest, groups, window, batch_size, world_size) > limit:
        window //= 2
    return window or None


def windowed_bytes(manifest: Manifest, groups: int, window: int, batch_size: int, world_size: int) -> int:
    """Bytes that a node needs at once: tables, the windows of each of its groups, and what validation needs.

    These are two windows, the present one and the next: batches take the last samples of one and the first of the
    other. More, where batches take more of a group than a window has.
    """
    tars = np.array([manifest.files[name].bytes for name in manifest.splits["train"].shards])
    # Groups are dealt by samples, of which all tars of a conversion but the last have equally many.
    hands, spans = deal(np.ones(len(tars), np.int64), groups), _windows_at_once(manifest, groups, window, batch_size)
    largest = sorted((int(np.sort(tars[hand])[-spans * window :].sum()) for hand in hands), reverse=True)
    validation = _streamed(manifest, "val", batch_size, world_size)
    return _tables(manifest) + sum(largest[: _groups_here(groups, world_size)]) + validation


def _windows_at_once(manifest: Manifest, groups: int, window: int, batch_size: int) -> int:
    """Windows of a group that the batches take samples of which are read at once."""
    return 1 + math.ceil(_BATCHES_AT_ONCE * batch_size / groups / (window * _samples_of_a_tar(manifest, "train")))


def _samples_of_a_tar(manifest: Manifest, split: str) -> float:
    return manifest.splits[split].num_samples / max(1, len(manifest.splits[split].shards))


def _processes_here(world_size: int) -> int:
    """Of this node, as torchrun says."""
    return min(world_size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _groups_here(groups: int, world_size: int) -> int:
    """Groups that the processes of a node read."""
    return -(-groups * _processes_here(world_size) // world_size)


def _streamed(manifest: Manifest, split: str, batch_size: int, world_size: int) -> int:
    """What the processes of the node need at once as they read a split in order, though not in step: the tars of some
    batches each."""
    if split not in manifest.splits or not manifest.splits[split].shards:
        return 0
    sizes = sorted(manifest.files[name].bytes for name in manifest.splits[split].shards)
    at_once = 1 + math.ceil(_BATCHES_AT_ONCE * batch_size / _samples_of_a_tar(manifest, split))
    return sum(sizes[-at_once * _processes_here(world_size) :])


def _tables(manifest: Manifest) -> int:
    return sum(manifest.files[split.table].bytes for split in manifest.splits.values())


def _all(manifest: Manifest) -> int:
    """Bytes of all that is read of a set: its tables and tars."""
    tars = (name for split in manifest.splits.values() for name in split.shards)
    return _tables(manifest) + sum(manifest.files[name].bytes for name in tars)


def _read(store: Store, folder: Path) -> tuple[Manifest, str]:
    try:
        return read_manifest(folder)
    except DataError as error:
        told = str(error).replace(str(folder / MANIFEST), store.name(MANIFEST)).replace(str(folder), store.url)
        raise DataError(told) from error


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g}"
