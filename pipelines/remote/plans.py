"""What the processes of a node still need of the tars in their cache, told to each other in small files.

Each reader of a split keeps one: the names of its tars, where it is, and when it will need each tar next, in steps.
Whoever has to make room reads them all, so that no tar goes that anybody needs sooner than what is to come. A file
counts while its owner holds a lock on it, which the system lifts however a process dies.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from pipelines.storage.locks import lock

Int64 = NDArray[np.int64]

NEVER = 1 << 62
AGAIN = 1 << 40
"""When a tar is needed of which only that is known; in steps, and more than a run has."""

_WORD = 8
_PARTIAL = ".partial"


class Plan:
    """The file of one reader, which alone writes it."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        """`folder` is that of the plans of a data set, and is there. Raises `OSError`, and `NoLocks` as `lock` does."""
        head = json.dumps(list(names)).encode()
        head += b" " * (-(len(head) + 1) % _WORD) + b"\n"  # numbers begin at a whole word
        path = folder / f"{os.getpid()}-{secrets.token_hex(4)}.plan"
        content = head + np.array([0] + [NEVER] * len(names), dtype="<i8").tobytes()
        while (made := _made(path, content)) is None:
            pass
        self._file: IO[bytes] = made
        self._memory = mmap.mmap(self._file.fileno(), len(content))
        self._words: Int64 = np.frombuffer(self._memory, dtype="<i8", offset=len(head))
        self.close = weakref.finalize(self, _close, self._file, path)
        """Need nothing any more."""

    def advance(self, now: int) -> None:
        """Say where the reader is."""
        self._words[0] = now

    def write(self, now: int, due: Int64) -> None:
        """Say where the reader is and when it needs each tar next, both by its own count of steps."""
        # Read by halves, it is wrong for a moment about what is needed a step earlier or later.
        self._words[0] = now
        self._words[1:] = due


def steps_until(folder: Path) -> dict[str, int]:
    """In how many steps somebody will need each tar of a data set; those that nobody needs may be missing. Removes the
    files of dead readers."""
    remove_dead(folder)
    soonest: dict[str, int] = {}
    for path in sorted(folder.glob("*.plan")):
        try:
            head, _, rest = path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            continue
        words = np.frombuffer(rest[: len(rest) // _WORD * _WORD], dtype="<i8")
        for name, steps in zip(json.loads(head), np.maximum(words[1:] - words[0], 0).tolist(), strict=False):
            soonest[name] = min(steps, soonest.get(name, NEVER))
    return soonest


def remove_dead(folder: Path) -> None:
    """Remove the files of dead readers, those that were not even whole too."""
    for path in (*folder.glob("*.plan"), *folder.glob(f"*{_PARTIAL}")):
        with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
            lock(file, shared=True, wait=False)  # or its reader lives
            path.unlink(missing_ok=True)


def _made(path: Path, content: bytes) -> IO[bytes] | None:
    """A new file that is locked, and appears whole; None where it was taken for that of a dead reader before that."""
    partial = path.with_suffix(_PARTIAL)
    file = partial.open("w+b")
    try:
        lock(file)
        file.write(content)
        file.flush()
        partial.replace(path)
    except BaseException as error:
        file.close()
        if isinstance(error, FileNotFoundError) and path.parent.is_dir():
            return None
        raise
    return file


def _close(file: IO[bytes], path: Path) -> None:
    path.unlink(missing_ok=True)
    file.close()
