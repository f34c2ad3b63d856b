"""Tars read in place: members are found and named, never extracted."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipelines.base import DataError, in_words
from pipelines.sources.columns.samples import MAX_ENCODED
from pipelines.sources.columns.tree import shown

_MAX_HEADER = 1 << 20  # bytes of a name or an extension
_MAX_EXPANDED = 2 << 30  # bytes that a compressed archive may expand to; the largest known one has 190 MB


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar."""

    name: str
    offset: int  # of its first byte in the tar's file
    length: int


def tar_members(path: Path, inside: Member | None = None) -> Iterator[Member]:
    """The members of the uncompressed tar `path`, or of the tar that is its member `inside`, in their order.

    `DataError` for a tar that is cut short, for links, and for names that point out of it.
    """
    what = f"{path}" if inside is None else f"{path}, {inside.name}"
    start, length = (0, path.stat().st_size) if inside is None else (inside.offset, inside.length)
    end = 0
    with path.open("rb") as file:
        window = _Window(file, start, length)
        try:
            buffered = io.BufferedReader(window, 1 << 16)
            with tarfile.open(fileobj=buffered, mode="r:", tarinfo=_Bounded, errors="surrogateescape") as tar:
                for info in tar:
                    end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    if info.isdir():
                        continue
                    check_member(info, what)
                    yield Member(shown(info.name), start + info.offset_data, info.size)
                    tar.members.clear()  # type: ignore[attr-defined]  # a million of them
        except tarfile.TarError as error:
            raise DataError(f"{what} is damaged or no tar ({in_words(error)}); download it again") from error
        # tarfile takes a broken header in the middle for the end
        window.seek(end)
        if window.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(f"{what} is cut short or damaged at byte {end}; download it again")
        while block := window.read(1 << 20):
            if block.count(0) != len(block):
                raise DataError(
                    f"{what} goes on behind its end at byte {end}, as if two archives had been joined; unpack both "
                    "with tar --ignore-zeros, or leave it out with --ignore"
                )


class _Bounded(tarfile.TarInfo):
    """A header whose long names and extensions are as long as names can be: tarfile reads them whole."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        kinds = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
        if self.type in (*kinds, tarfile.SOLARIS_XHDTYPE) and self.size > _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc,no-any-return]


def check_member(info: tarfile.TarInfo, what: str) -> None:
    """Raise `DataError` for a member that is no plain file inside the archive."""
    name = PurePosixPath(info.name)
    if name.is_absolute() or ".." in name.parts:
        raise DataError(f"{what} holds the member {info.name!r}, which points out of the archive; it is not used")
    if not info.isreg() or info.issparse():
        raise DataError(f"{what} holds {info.name!r}, which is no plain file; it is not used")


def image_member(member: Member, what: Path | str) -> Member:
    """`member`, if its size can be that of an image."""
    if member.length > MAX_ENCODED:
        raise DataError(f"{what}, {member.name} has {member.length} bytes; images have at most {MAX_ENCODED}")
    return member


def read_compressed(path: Path, wanted: set[str]) -> dict[str, bytes]:
    """The members of a small .tar.gz whose last name is in `wanted`, by that name."""
    found: dict[str, bytes] = {}
    try:
        with gzip.open(path) as file, tarfile.open(fileobj=_Limited(file, path), mode="r|", tarinfo=_Bounded) as tar:
            for info in tar:
                if not info.isdir():
                    check_member(info, str(path))
                    if (name := PurePosixPath(info.name).name) in wanted:
                        content = tar.extractfile(info)
                        assert content is not None
                        found[name] = content.read()
    except PermissionError:
        raise
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, OSError) as error:
        raise DataError(f"{path} is damaged ({in_words(error)}); download it again") from error
    return found


class _Limited(io.RawIOBase):
    """A stream that refuses to grow without bound."""

    def __init__(self, file: gzip.GzipFile, path: Path) -> None:
        super().__init__()
        self._file, self._path, self._left = file, path, _MAX_EXPANDED

    def read(self, size: int = -1) -> bytes:
        self._left -= size
        if self._left < 0:
            raise DataError(f"{self._path} expands to more than {_MAX_EXPANDED >> 30} GiB; download it again")
        return self._file.read(size)


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._file.seek(self._start + self._at)
        content = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)
