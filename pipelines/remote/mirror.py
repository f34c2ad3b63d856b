"""A copy on this machine of files of a source elsewhere, for as long as a conversion needs it.

WORKDIR/sources/HASH/files/     what has been fetched, under the names that it has in the source
WORKDIR/sources/HASH/coming/    what is being fetched
WORKDIR/sources/HASH/fetching   locked by the process that fetches
WORKDIR/sources/HASH/used       locked, shared, by all processes that need the copy

HASH is that of the address, and of names, sizes and versions: a file that changes there makes another copy here.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from pipelines.base import DataError, in_words
from pipelines.remote.store import Entry, Stopped, Store, StoreError, usual_folder
from pipelines.storage.locks import NoLocks, lock

TELL_SECONDS = 10.0  # between sentences on how it is getting on
_FETCHED_AT_ONCE = 8
_LOOK_SECONDS = 1.0
_CERTAIN = ("s3", "s3a")
"""Stores whose versions are known to be the same whoever is asked, for the file or for its folder."""

Task = TypeVar("Task")
Result = TypeVar("Result")
Alive = Callable[[], object]


@dataclass(frozen=True)
class Reach:
    """Where copies of a source elsewhere are kept, and who hears how they are made."""

    work_dir: Path | None = None
    start: Callable[[str, int], object] = lambda phase, total: None
    advance: Callable[[int], object] = lambda count: None
    tell: Callable[[str], object] = lambda message: None


class Mirror:
    """The copy of some files of a source."""

    def __init__(self, store: Store, files: Mapping[str, Entry], query: str, reach: Reach) -> None:
        """`files` by their names in `store`, each one a path; over HTTP, `query` is asked for with them."""
        self.store, self._files, self._query, self._reach = store, files, query, reach
        self._below = (reach.work_dir or usual_folder()).absolute()
        told = hashlib.sha256(f"{store.url}\n".encode())
        for name, entry in sorted(files.items()):
            told.update(f"{name}\0{entry.size}\0{entry.version}\n".encode())
        self._folder = self._below / "sources" / told.hexdigest()[:32]
        self._used: IO[str] | None = None

    @property
    def root(self) -> Path:
        """The folder that stands for the source."""
        return self._folder / "files"

    def fetch(self) -> None:
        """Have all of it here; what an interrupted call, or another process, has fetched stays.

        Raises:
            StoreError: something cannot be had, or changes meanwhile.
            DataError: there is no room for it, or it cannot be written.
        """
        if not self._files:
            return
        try:
            self._used = _held(self._folder / "used", shared=True)
            weakref.finalize(self, self._used.close)
            for folder in (self.root, self._folder / "coming"):
                folder.mkdir(exist_ok=True)
            with _held(self._folder / "fetching"):
                self._bring()
        except OSError as error:
            raise DataError(
                f"--work-dir {self._below} cannot be written ({in_words(error)}); name a folder on a disk of this "
                "machine"
            ) from error

    def remove(self) -> None:
        """Delete the copy, unless another process needs it."""
        if self._used is None:
            return
        self._used.close()
        with suppress(OSError), (self._folder / "used").open("a") as file:
            with suppress(NoLocks):
                lock(file, wait=False)
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.parent.rmdir()

    def _bring(self) -> None:
        for left in (self._folder / "coming").iterdir():  # by a process that was killed
            left.unlink(missing_ok=True)
        missing = {name: entry for name, entry in self._files.items() if not self._is_here(name, entry)}
        if not missing:
            return
        needed, free = sum(entry.size or 0 for entry in missing.values()), shutil.disk_usage(self._folder).free
        if needed > free:
            raise DataError(
                f"--work-dir {self._below} has {free / 1e6:,.1f} MB left, and the files of {self.store.url} that are "
                f"read from the disk need {needed / 1e6:,.1f} MB; make room, name another disk, or leave some out with "
                "--ignore"
            )
        what = f"{len(missing):,} files" if len(missing) > 1 else next(iter(missing))
        self._reach.tell(f"fetching {what} of {self.store.url}, {needed / 1e6:,.1f} MB, to {self._folder}")
        self._reach.start("fetching", len(missing))
        arrived, told = 0, time.monotonic()

        def done(size: int) -> None:
            nonlocal arrived
            arrived += size
            self._reach.advance(1)

        def look() -> None:
            nonlocal told
            if time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                there = arrived + sum(map(_size, (self._folder / "coming").iterdir()))
                self._reach.tell(f"fetching: {there / 1e6:,.1f} of {needed / 1e6:,.1f} MB")

        at_once(lambda item, alive: self._one(*item, alive), deque(missing.items()), _FETCHED_AT_ONCE, done, look)

    def _is_here(self, name: str, entry: Entry) -> bool:
        """A file has its name once it is whole; its size is looked at for what a disk may lose when the power goes."""
        try:
            return (self.root / name).stat().st_size == entry.size or entry.size is None
        except FileNotFoundError:
            return False

    def _one(self, name: str, entry: Entry, alive: Alive) -> int:
        """Fetch a file; returns its size."""
        coming, there = self._folder / "coming" / uuid.uuid4().hex, self.root / name
        there.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.store.fetch(f"{name}{self._query}", coming, None, alive)
            size, now = coming.stat().st_size, self.store.find(f"{name}{self._query}", alive)
            changed = now is None or (self.store.protocol in _CERTAIN and now.version != entry.version)
            if changed or entry.size not in (None, size):
                raise StoreError(
                    f"{self.store.name(name)} has changed since the source was listed; see that nothing is written "
                    "there, and begin again: the same command continues"
                )
            with coming.open("rb") as file:
                os.fsync(file.fileno())
            coming.replace(there)
        finally:
            coming.unlink(missing_ok=True)
        return size


def at_once(
    work: Callable[[Task, Alive], Result],
    todo: deque[Task],
    threads: int,
    done: Callable[[Result], object],
    look: Callable[[], object],
) -> None:
    """`work(task, alive)` of all tasks, in some threads.

    Args:
        work: is to call `alive` now and then, which ends it where another has failed.
        todo: the tasks; `done` may add to them.
        threads: so many at a time.
        done: hears, in this thread, of each result.
        look: called now and then.
    """
    ending = threading.Event()

    def alive() -> None:
        if ending.is_set():
            raise Stopped

    pool = ThreadPoolExecutor(threads, thread_name_prefix="pss-source")
    running: set[Future[Result]] = set()
    try:
        while todo or running:
            while todo and len(running) < 2 * threads:
                running.add(pool.submit(work, todo.popleft(), alive))
            finished, running = wait(running, _LOOK_SECONDS, FIRST_COMPLETED)
            for future in finished:
                done(future.result())
            look()
    finally:
        ending.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _held(path: Path, *, shared: bool = False) -> IO[str]:
    """A file that is locked until it is closed; where there are no locks, it is only open."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
        try:
            with suppress(NoLocks):
                lock(file, shared=shared)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:  # it has been removed meanwhile, with all of the copy
            pass
        except BaseException:
            file.close()
            raise
        file.close()


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0
