"""Write images with their original bytes into USTAR tars, each with DALI's index beside it.

A sample is four members with the same key: `.jpg` the image, `.lab` its label (int32 little-endian) and `.sid` its
number in the split (int64) for DALI, and `.cls` the label in decimal for everyone else. Nothing in a tar depends on
when or by whom it was written.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import uuid
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.conversion.processes import beat
from pipelines.conversion.scan import ImageFile, Images, decode_rgb
from pipelines.conversion.work import Finished
from pipelines.sources.columns.samples import reading
from pipelines.storage.manifest import FORMAT_VERSION, SAMPLE, FileEntry

BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Shard:
    """One tar to be written."""

    tar: str
    work: str  # folder for files in the making
    number: int
    first: int  # number of its first sample
    images: Sequence[ImageFile]


def plan_shards(folder: Path, work: Path, split: str, images: Sequence[ImageFile], shard_size: int) -> list[Shard]:
    """`images` in order, `shard_size` a tar."""
    return [
        Shard(str(folder / f"{split}-{number:05d}.tar"), str(work), number, first, images[first : first + shard_size])
        for number, first in enumerate(range(0, len(images), shard_size))
    ]


def write_shard(shard: Shard) -> Finished:
    """Write one tar and its index: rows of SAMPLE, and what the files are."""
    rows = np.zeros(len(shard.images), dtype=SAMPLE)
    tar, index = Path(shard.tar), Path(shard.tar).with_suffix(".idx")
    unfinished = Path(shard.work) / f"{tar.name}.{uuid.uuid4().hex}.unfinished"
    lines = [f"v1.2 {len(shard.images)}"]
    with unfinished.open("wb") as file:
        out = HashedFile(file)
        reads = reading([image.sample for image in shard.images], beat)
        for i, (image, read) in enumerate(zip(shard.images, reads, strict=True)):
            encoded = _encoded(image, read)
            number = shard.first + i
            label = image.sample.label
            members = {"jpg": encoded, **members_behind(label, number)}
            located = []
            for extension, content in members.items():
                name = f"{number:08d}.{extension}"
                offset = _write_member(out, name, content)
                located.append(f"{extension} {offset} {len(content)} {name}")
                if extension == "jpg":
                    rows[i] = (
                        label, image.height, image.width, shard.number, offset, len(content), zlib.crc32(content)
                    )  # fmt: skip
            lines.append(" ".join(located))
            beat()
        out.write(bytes(2 * BLOCK))  # end of archive
        out.sync()
    unfinished.replace(tar)
    index_entry = write_file(index, ("\n".join(lines) + "\n").encode())
    return Finished(rows, {"files": {tar.name: asdict(out.entry()), index.name: asdict(index_entry)}})


def tar_phase(split: str) -> str:
    """What the pieces of work are called that write the tars of a split.

    Tars that an older version of the program has begun differ in their members: none of them may be taken over.
    """
    return f"tar-{FORMAT_VERSION}-{split}"


def rows_without_tars(images: Images) -> NDArray[Any]:
    """The table of a split that has no tars."""
    rows = np.zeros(len(images), dtype=SAMPLE)
    rows["shard"] = -1
    rows["label"] = images.labels
    for name in ("height", "width", "crc32"):
        rows[name] = images.column(name)
    return rows


def members_behind(label: int, number: int, *, decimal: bool = True) -> dict[str, bytes]:
    """What follows the image of sample `number`, by extension; sets of format version 2 have no `decimal` label."""
    members = {"lab": np.array(label, dtype="<i4").tobytes(), "sid": np.array(number, dtype="<i8").tobytes()}
    return {**members, "cls": str(label).encode()} if decimal else members


def member_header(name: str, size: int) -> bytes:
    """The block in front of a member's content."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT)


def write_file(path: Path, content: bytes) -> FileEntry:
    """Write a whole file to the disk itself, and say what it is."""
    with path.open("wb") as file:
        out = HashedFile(file)
        out.write(content)
        out.sync()
    return out.entry()


def write_rows(path: Path, dtype: np.dtype[Any], count: int, pieces: Iterable[NDArray[Any]]) -> FileEntry:
    """Write a table of `count` rows as `np.save` would, piece by piece: the whole of it need not fit into memory."""
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, described)
    with path.open("wb") as file:
        out = HashedFile(file)
        out.write(header.getvalue())
        for rows in pieces:
            out.write(rows.tobytes())
        out.sync()
    return out.entry()


def _encoded(image: ImageFile, read: Callable[[], bytes]) -> bytes:
    encoded = image.read(read)
    if not image.transcode:
        return encoded
    png = io.BytesIO()
    Image.fromarray(decode_rgb(encoded)).save(png, "PNG")
    return png.getvalue()


def _write_member(out: HashedFile, name: str, content: bytes) -> int:
    """Append a member; returns where its content starts."""
    out.write(member_header(name, len(content)))
    offset = out.bytes
    out.write(content)
    out.write(bytes(-len(content) % BLOCK))
    return offset


class HashedFile:
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
