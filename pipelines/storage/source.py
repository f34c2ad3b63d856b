"""Random access to the encoded images of one split, whether it lies in tars or in a plain folder.

A source knows each sample's label, size and name, and returns its bytes; it decodes nothing. Sources can be sent to
other processes: what they keep open is opened again there.
"""

from __future__ import annotations

import hashlib
import os
import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.base import DataError, choose_loader, in_words
from pipelines.storage.images import open_image
from pipelines.storage.manifest import (
    MANIFEST,
    SAMPLE,
    SPLIT_ALIASES,
    Manifest,
    Split,
    canonical_split,
    hash_file,
    in_label_order,
    load_rows,
    read_manifest,
    take_rows,
)
from pipelines.storage.mapping import map_file, will_need
from pipelines.storage.reading import DiskWaits, Readers, Unchecked
from pipelines.storage.unlocked import differing, differing_at, fetch_at
from pipelines.storage.unreadable import UNREADABLE, has_stray_marker, unreadable

Bytes = NDArray[np.uint8]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Files of a class folder that count as images, whatever their case. Others are not looked at."""

_READ_THREADS = 8


class Table(Protocol):
    """What is known of a split without reading an image."""

    classes: tuple[str, ...]
    num_samples: int
    labels: NDArray[np.signedinteger]  # (N,), as they are stored; `labels_of` is for batches
    fingerprint: str  # of a conversion: every byte of it; of a plain folder: the names of classes and images

    def labels_of(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Labels of a batch, (len(index),)."""
        ...

    def sizes(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Heights and widths of the original images, each (len(index),)."""
        ...

    def name(self, i: int) -> str:
        """Where sample `i` is to be found, for messages."""
        ...


class Source(Table, Protocol):
    """A split whose encoded images can be read."""

    def read(self, i: int) -> Bytes:
        """The encoded image of sample `i`. The array may be read-only."""
        ...

    def read_many(self, index: NDArray[np.int64]) -> list[Bytes]:
        """The encoded images of a batch. `sizes` of samples that have been read costs nothing."""
        ...

    def close(self) -> None:
        """Stop threads; reading starts them again."""
        ...


class ConvertedTable:
    """The sample table of one split of a converted data set, mapped: a machine's processes share its memory."""

    def __init__(self, root: Path, split: str) -> None:
        self.root, self.split = root, canonical_split(split)
        self.manifest, self.fingerprint = read_manifest(root)
        self.entry: Split = _split_entry(self.manifest, root, self.split)
        self.classes = self.manifest.classes
        self.num_samples = self.entry.num_samples
        self._rows = self.load_table(self.entry.table, SAMPLE)
        self.labels: NDArray[np.int32] = self._rows["label"]
        if self.num_samples and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise DataError(f"{root / self.entry.table} has labels that are no classes; copy it again or convert anew")

    def load_table(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Table `name` with a row of `dtype` per sample; `DataError` unless it has the checksum of the manifest.

        Labels, places and checksums of the images are taken from it. About 0.1 s for a million samples.
        """
        path = self.root / name
        self.check_size(name)
        if hash_file(path) != self.manifest.files[name]:
            raise DataError(f"{path} is damaged or belongs to another data set; copy it again")
        return load_rows(path, dtype, self.num_samples)

    def check_size(self, name: str) -> None:
        """Raise `DataError` unless file `name` is present with the size the manifest gives."""
        path, expected = self.root / name, self.manifest.files[name].bytes
        try:
            found = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path} cannot be read ({in_words(error)}); copy it again") from error
        if found != expected:
            raise DataError(f"{path} has {found} bytes instead of {expected}; copy it again")

    def labels_of(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        return take_rows(self._rows, index)["label"].astype(np.int64)

    def tar_counts(self) -> NDArray[np.int64]:
        """Samples of each tar, (tars,); they follow each other in the split. `DataError` where it has no tars."""
        tars = self._rows["shard"]
        if not self.entry.shards or not len(tars):
            raise DataError(
                f"the {self.split} split of {self.root} has no tars, which data.window deals out; leave that out, or "
                "convert it again with --format dali"
            )
        # Looked up and not counted: the column of a large set is a read of the whole table.
        ends = np.array([bisect_left(tars, number) for number in range(len(self.entry.shards) + 1)], dtype=np.int64)
        counts: NDArray[np.int64] = ends[1:] - ends[:-1]
        if ends[0] or ends[-1] != len(tars) or not counts.all():
            raise DataError(f"{self.root / self.entry.table} has its tars in another order; copy it again")
        return counts

    def sizes(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        rows = take_rows(self._rows, index)
        return rows["height"].astype(np.int64), rows["width"].astype(np.int64)

    def name(self, i: int) -> str:
        return f"{self.root / self.entry.table}, sample {i}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.root, self.split)


class TarSource(ConvertedTable):
    """The original bytes of a converted split: the tars are mapped into memory and the table says where to look."""

    def __init__(self, root: Path, split: str, check_bytes: bool = True) -> None:
        super().__init__(root, split)
        self.check_bytes = check_bytes
        if not self.entry.shards:
            raise DataError(
                f"the {self.split} split of {root} holds FFCV data only; use {choose_loader('ffcv')}, or "
                "convert it again with --format ffcv,dali"
            )
        for shard in self.entry.shards:
            self.check_size(shard)
        self._mapping = threading.Lock()
        self._tars = [np.zeros(0, np.uint8)] * len(self.entry.shards)  # their bytes, once they are mapped
        self._tar_bytes = np.zeros(len(self.entry.shards), dtype=np.int64)  # 0: not mapped yet
        self._tar_address = np.zeros(len(self.entry.shards), dtype=np.int64)
        self._unchecked = Unchecked(self.num_samples if check_bytes else 0)
        self._waiting = DiskWaits()
        self._readers = Readers(_READ_THREADS)

    def read(self, i: int) -> Bytes:
        (shard,), (first,), (length,) = self._located(np.array([i]))
        encoded: Bytes = self._tars[shard][first : first + length]
        if self._unchecked.of(np.array([i])).any():
            self._check(np.array([i]), partial(differing, [encoded]))
        return encoded

    def read_many(self, index: NDArray[np.int64]) -> list[Bytes]:
        shards, first, length = self._located(index)
        if self._waiting():  # let the system fetch the whole batch while its first images are decoded
            for shard, begin, end in zip(shards.tolist(), first.tolist(), (first + length).tolist(), strict=True):
                will_need(self._tars[shard][begin:end])
        tars = self._tars
        bounds = zip(shards.tolist(), first.tolist(), (first + length).tolist(), strict=True)
        encoded = [tars[shard][begin:end] for shard, begin, end in bounds]
        if (new := np.flatnonzero(self._unchecked.of(index))).size:
            self._check(index[new], partial(differing, [encoded[place] for place in new.tolist()]))
        return encoded

    def locate(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Addresses and lengths in memory of the encoded images, each (len(index),), for code without the interpreter.

        For where `unlocked.knows_addresses`. They are compared with their checksums like those of `read_many`, and are
        there as long as the source is.
        """
        shards, first, length = self._located(index)
        address = self._tar_address[shards] + first
        if self._waiting():
            fetch_at(address, length)
        if (new := np.flatnonzero(self._unchecked.of(index))).size:
            self._check(index[new], partial(differing_at, address[new], length[new]))
        return address, length

    def _check(self, index: NDArray[np.int64], search: Callable[..., int | None]) -> None:
        """Raise `DataError` naming the first of `index` whose bytes are not those of the conversion."""
        place = search(take_rows(self._rows, index)["crc32"].copy(), self._readers)
        if place is not None:
            raise self._damaged(int(index[place]))
        self._unchecked.clear(index)

    def _damaged(self, i: int) -> DataError:
        return DataError(f"{self.name(i)} has been damaged since the conversion; copy the file again")

    def _located(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        """Tar, first byte in it, and length of each image; the tars are mapped."""
        rows = take_rows(self._rows, index)
        shards, first, length = (rows[name].copy() for name in ("shard", "offset", "length"))
        if not self._tar_bytes[shards].all():
            for shard in np.unique(shards).tolist():
                self._map(shard)
        outside = (first < 0) | (length < 1) | (first + length > self._tar_bytes[shards])
        if outside.any():
            name = self.name(index[outside.argmax()])
            raise DataError(f"{name} lies outside its file; copy the table and the tar again")
        return shards, first, length

    def _map(self, shard: int) -> None:
        with self._mapping:  # a tar has one address
            if self._tar_bytes[shard]:
                return
            mapped = self._tars[shard] = map_file(self.root / self.entry.shards[shard])
            self._tar_address[shard] = mapped.ctypes.data
            self._tar_bytes[shard] = len(mapped)  # last: other threads look here

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.root, self.split, self.check_bytes)

    def close(self) -> None:
        """The operating system unmaps the tars when the last view of them is gone."""
        self._readers.stop()

    def name(self, i: int) -> str:
        shard = int(self._rows["shard"][i])
        return f"{self.root / self.entry.shards[shard]}, member {i:08d}.jpg"


class FileSource:
    """Image files of a folder, read as they lie."""

    def __init__(self, folder: Path, names: Sequence[str], labels: NDArray[np.int64], classes: tuple[str, ...]) -> None:
        """`names` are relative to `folder`, with as many `labels`."""
        self.folder, self.names, self.classes = folder, names, classes
        self.labels: NDArray[np.signedinteger] = labels
        self.num_samples = len(names)
        told = "\n".join((*classes, "", *names))
        self.fingerprint = hashlib.sha256(os.fsencode(told)).hexdigest()  # as they are on the disk
        self._sizes = np.zeros((self.num_samples, 2), dtype=np.int32)  # filled as samples are first asked for
        self._readers = Readers(_READ_THREADS)

    def labels_of(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.labels[index].astype(np.int64)

    def sizes(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        missing = index[self._sizes[index, 0] == 0]
        if len(missing):
            self.read_many(missing)
        sizes = self._sizes[index].astype(np.int64)
        return sizes[:, 0], sizes[:, 1]

    def read(self, i: int) -> Bytes:
        try:
            encoded = np.fromfile(self.folder / self.names[i], dtype=np.uint8)
        except OSError as error:
            raise DataError(f"{self.name(i)} cannot be read ({in_words(error)}); restore it or remove it") from error
        if not self._sizes[i, 0]:
            try:
                with open_image(encoded.data) as image:
                    if image.mode in ("I", "F"):
                        raise DataError(f"{self.name(i)} has 32-bit pixels, whose range is not known; remove it")
                    if image.format == "JPEG" and has_stray_marker(encoded.data):
                        image.load()  # which raises if it is one
                    self._sizes[i] = image.height, image.width
            except DataError:
                raise
            except UNREADABLE as error:
                raise unreadable(self.name(i), len(encoded), error) from error
        return encoded

    def read_many(self, index: NDArray[np.int64]) -> list[Bytes]:
        return self._readers.map(self.read, index)

    def close(self) -> None:
        self._readers.stop()

    def name(self, i: int) -> str:
        return str(self.folder / self.names[i])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_readers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_readers": Readers(_READ_THREADS)}


class FolderSource(FileSource):
    """`<root>/<split>/<class>/<image>`, read as it lies. Samples come in the order of class and file name."""

    def __init__(self, root: Path, split: str) -> None:
        folder = split_folder(root, split)
        train = find_split_folder(root, "train")
        classes = class_names(train or folder)
        number = {name: label for label, name in enumerate(classes)}
        found = class_names(folder)
        if unknown := [name for name in found if name not in number]:
            raise DataError(f"{folder} has the class {unknown[0]!r}, which {train} has not; the classes must agree")
        files = [(f"{name}/{file}", number[name]) for name in found for file in image_files(folder / name)]
        if not files:
            raise DataError(f"there is no image in {folder}; expected <class>/*.jpg")
        labels = np.array([label for _, label in files], dtype=np.int64)
        super().__init__(folder, [name for name, _ in files], labels, classes)


def open_source(root: Path, split: str, check_bytes: bool = True) -> Source:
    """The encoded images of `split`; raises `DataError` where there are none.

    With `check_bytes` each image of a conversion is compared with its checksum when it is first read.
    """
    return TarSource(root, split, check_bytes) if (root / MANIFEST).exists() else FolderSource(root, split)


def find_split_folder(root: Path, split: str) -> Path | None:
    """The folder of a split under any of its names."""
    folders = (root / name for name in SPLIT_ALIASES[canonical_split(split)])
    return next((folder for folder in folders if folder.is_dir()), None)


def split_folder(root: Path, split: str) -> Path:
    """The folder of a split; `DataError` where it is missing."""
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; name the one that holds the data set")
    if folder := find_split_folder(root, split):
        return folder
    split = canonical_split(split)
    raise DataError(
        f"{root} has no {split} split; expected {root}/{MANIFEST} (see pss-convert) or {root}/{split}/<class>/*.jpg"
    )


def class_names(folder: Path) -> tuple[str, ...]:
    """The class folders of a split, in the order of their labels."""
    with os.scandir(folder) as entries:
        return in_label_order(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def image_files(folder: Path) -> Sequence[str]:
    """The image files of a class folder, sorted by name."""
    with os.scandir(folder) as entries:
        found = [
            entry for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.name.startswith(".")
        ]
        for entry in found:
            if not _is_file(entry):  # to open a pipe would wait for ever
                raise DataError(f"{entry.path} is no plain file, nor a link to one; remove it")
        return sorted(entry.name for entry in found)


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that goes in circles
        return False


def _split_entry(manifest: Manifest, root: Path, split: str) -> Split:
    if split not in manifest.splits:
        raise DataError(f"{root} has no {split} split, only {', '.join(manifest.splits)}")
    return manifest.splits[split]
