"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.base import in_words

__all__ = ["in_words", "obstacle", "write", "write_all", "write_folder"]


def write(path: Path, content: bytes | str) -> None:
    """Write a file so that nobody ever reads a part of it, and an older one stays until the new one is on the disk.

    Its folder is made if it is not there. Text is written as UTF-8; what has no place in it, such as the bytes of a
    file name that cannot be decoded, as `\\udcff`.

    Raises:
        OSError: it cannot be written, and all is as it was before. The error names the file.
    """
    write_all(path.parent, {path.name: content})


def write_all(folder: Path, contents: Mapping[str, bytes | str]) -> None:
    """`write` for several files in a folder, in this order, and none of them unless there is room for all.

    Raises:
        OSError: one cannot be written, and all are as they were before. The error names the file.
    """
    staged: list[tuple[Path, Path]] = []
    with _made(folder):
        try:
            for name, content in contents.items():
                with _naming(folder / name):
                    staged.append((folder / _partial(), folder / name))
                    _put(staged[-1][0], content)
                    if (folder / name).is_dir():
                        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            for partial, path in staged:
                with _naming(path):
                    partial.replace(path)
            _sync(folder)
        finally:
            for partial, _ in staged:
                with suppress(OSError):
                    partial.unlink(missing_ok=True)


def write_folder(folder: Path, contents: Mapping[str, bytes | str]) -> None:
    """Write a folder with these files: it is complete or not there. Where it is there already, this is `write_all`.

    Raises:
        OSError: it cannot be written, and all is as it was before. The error names the file or the folder.
    """
    if folder.is_dir():
        write_all(folder, contents)
        return
    partial = folder.parent / _partial()
    with _made(folder.parent):
        try:
            with _naming(folder):
                partial.mkdir()
            for name, content in contents.items():
                with _naming(folder / name):
                    _put(partial / name, content)
            _sync(partial)
            with _naming(folder):
                partial.rename(folder)
            _sync(folder.parent)
        except BaseException:
            for name in contents:
                with suppress(OSError):
                    (partial / name).unlink(missing_ok=True)
            with suppress(OSError):
                partial.rmdir()
            raise


def obstacle(path: Path, *, folder: bool = False) -> str | None:
    """Why a file, or a `folder` and files in it, could not be written; None if they could, should there be room.

    It is found out by trying, and leaves nothing behind.
    """
    place = Path(os.path.abspath(path))  # noqa: PTH100 (a link may be what is in the way)
    try:
        with suppress(FileNotFoundError):
            place.lstat()
            if folder != place.is_dir():
                return "a file is in the way" if folder else "it is a folder"
        if not folder:
            place = place.parent
        names = []
        while not os.path.lexists(place):
            names.append(place.name)
            place = place.parent
        if not place.is_dir():
            return f"a file is in the way, {place}"
        if any(len(os.fsencode(name)) > os.pathconf(place, "PC_NAME_MAX") for name in names):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        handle, name = tempfile.mkstemp(prefix=".pss-", suffix=".partial", dir=place)
        os.close(handle)
        Path(name).unlink()
    except OSError as error:
        return in_words(error)
    return None


def _partial() -> str:
    """A name that no other process takes. The file's own is not in it: that may be as long as names can be."""
    return f".pss-{os.getpid()}-{secrets.token_hex(4)}.partial"


def _put(path: Path, content: bytes | str) -> None:
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Names too are on the disk. Some file systems cannot do that for a folder, and nothing is wrong then."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder and those above it, and take back what was made if it is not filled."""
    made: list[Path] = []
    try:
        with _naming(folder):
            missing = [one for one in (folder, *folder.parents) if not os.path.lexists(one)]
            for one in reversed(missing):
                with suppress(FileExistsError):  # another process may make the same
                    one.mkdir()
                    made.append(one)
            if not folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        yield
    except BaseException:
        for one in reversed(made):
            with suppress(OSError):
                one.rmdir()
        raise


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An `OSError` names `path`: a write names no file, and a partial one is nobody's business."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
