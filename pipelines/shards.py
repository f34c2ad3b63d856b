"""Write images with their original bytes into USTAR tars, each with DALI's index beside it.

A sample is three members with the same key: `.jpg` the image, `.lab` its label (int32 little-endian), `.sid` its
number in the split (int64). Nothing in a tar depends on when or by whom it was written.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.base import DataError
from pipelines.manifest import SAMPLE, FileEntry
from pipelines.processes import map_processes
from pipelines.scan import ImageFile

_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Shard:
    """One tar to be written."""

    tar: str
    number: int
    first: int  # number of its first sample
    images: Sequence[ImageFile]


@dataclass(frozen=True)
class WrittenShard:
    """What a shard contains now."""

    rows: NDArray[Any]  # of SAMPLE
    files: dict[str, FileEntry]  # by file name: the tar and its index


def write_shards(
    folder: Path,
    split: str,
    images: Sequence[ImageFile],
    *,
    shard_size: int,
    jobs: int,
    progress: Callable[[int], None],
) -> list[WrittenShard]:
    """Write `images` in order, `shard_size` a tar; `progress` hears how many more are done."""
    shards = [
        Shard(str(folder / f"{split}-{number:05d}.tar"), number, first, images[first : first + shard_size])
        for number, first in enumerate(range(0, len(images), shard_size))
    ]
    return map_processes(write_shard, shards, jobs, lambda written: progress(len(written.rows)))


def write_shard(shard: Shard) -> WrittenShard:
    """Write one tar and its index."""
    rows = np.zeros(len(shard.images), dtype=SAMPLE)
    tar, index = Path(shard.tar), Path(shard.tar).with_suffix(".idx")
    lines = [f"v1.2 {len(shard.images)}"]
    with tar.open("wb") as file:
        out = _HashedFile(file)
        for i, image in enumerate(shard.images):
            encoded = _encoded(image)
            number = shard.first + i
            members = {
                "jpg": encoded,
                "lab": np.array(image.label, dtype="<i4").tobytes(),
                "sid": np.array(number, dtype="<i8").tobytes(),
            }
            located = []
            for extension, content in members.items():
                name = f"{number:08d}.{extension}"
                offset = _write_member(out, name, content)
                located.append(f"{extension} {offset} {len(content)} {name}")
                if extension == "jpg":
                    crc32 = zlib.crc32(content)
                    size = (image.height, image.width)
                    rows[i] = (image.label, *size, shard.number, offset, len(content), crc32)
            lines.append(" ".join(located))
        out.write(bytes(2 * _BLOCK))  # end of archive
        out.sync()
    index_entry = write_file(index, ("\n".join(lines) + "\n").encode())
    return WrittenShard(rows, {tar.name: out.entry(), index.name: index_entry})


def write_file(path: Path, content: bytes) -> FileEntry:
    """Write a whole file to the disk itself, and say what it is."""
    with path.open("wb") as file:
        out = _HashedFile(file)
        out.write(content)
        out.sync()
    return out.entry()


def hash_file(path: Path) -> FileEntry:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        return FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _encoded(image: ImageFile) -> bytes:
    encoded = Path(image.path).read_bytes()
    if zlib.crc32(encoded) != image.crc32:
        raise DataError(f"{image.path} changed while it was being converted")
    if not image.transcode:
        return encoded
    png = io.BytesIO()
    with Image.open(io.BytesIO(encoded)) as picture:
        picture.convert("RGB").save(png, "PNG")
    return png.getvalue()


def _write_member(out: _HashedFile, name: str, content: bytes) -> int:
    """Append a member; returns where its content starts."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    out.write(member.tobuf(tarfile.USTAR_FORMAT))
    offset = out.bytes
    out.write(content)
    out.write(bytes(-len(content) % _BLOCK))
    return offset


class _HashedFile:
    """Appends, and hashes what it appends."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self.bytes = file, hashlib.sha256(), 0

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self.bytes += len(content)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def entry(self) -> FileEntry:
        return FileEntry(self.bytes, self._hash.hexdigest())
