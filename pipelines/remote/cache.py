"""A folder on a node's own disk that holds files of data sets from elsewhere, shared by all processes of the node.

CACHE/.opening-…/               a manifest that is being fetched, and a lock
CACHE/room.lock                 held while somebody makes room
CACHE/SHA256/dataset.json, …    a data set, named by the sha256 of its manifest
CACHE/SHA256/train-00000.tar    a tar, whole and verified: it is moved here in one step
CACHE/SHA256/locks/             a lock for each file, held by whoever fetches it
CACHE/SHA256/coming/            what is being fetched; a name ends with the bytes that are set aside for it
CACHE/SHA256/plans/             what the processes still need (`pipelines.remote.plans`)

Tars are left out when room is needed: first those that nobody needs, then those that are needed last. What is needed
sooner than what is to come stays. What processes that were killed were at is removed by the next one that comes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from pipelines.base import DataError, in_words
from pipelines.remote.plans import NEVER, remove_dead, steps_until
from pipelines.remote.store import Store
from pipelines.storage.locks import NoLocks, lock
from pipelines.storage.manifest import MANIFEST, FileEntry

_LOCKS, _COMING, PLANS = "locks", "coming", "plans"
_OPENING, _LOCK = ".opening-", "lock"
Outcome = Literal["there", "busy", "full"]


@dataclass(frozen=True)
class Cache:
    """The cache of this node; `limit_bytes` None is as much as the disk has."""

    folder: Path
    limit_bytes: int | None = None

    @contextmanager
    def opening(self) -> Iterator[Path]:
        """A folder for a manifest, before anybody knows which data set it is of; it is gone afterwards. What dead
        processes have left in the cache is removed."""
        self._remove_dead()
        while True:
            with (
                tempfile.TemporaryDirectory(dir=self.folder, prefix=_OPENING, ignore_cleanup_errors=True) as made,
                self._locked(Path(made) / _LOCK, wait=True),
            ):
                if (Path(made) / _LOCK).exists():  # else it was taken for that of a dead process before it was locked
                    yield Path(made)
                    return

    def _remove_dead(self) -> None:
        """What cannot be removed is not in the way."""
        for left in self.folder.glob(f"{_OPENING}*/{_LOCK}"):
            with suppress(DataError), self._locked(left, wait=False) as nobody:
                if nobody:
                    shutil.rmtree(left.parent, ignore_errors=True)
        for folder in self._set_folders():
            with suppress(OSError, DataError):
                self._coming_bytes(folder)
                remove_dead(folder / PLANS)

    def _set_folders(self) -> Iterator[Path]:
        return self.folder.glob("[0-9a-f]" * 64)

    def set_folder(self, sha256: str) -> Path:
        """The folder of a data set, made if it is not there. Raises `DataError` where nothing can be written."""
        made = self.folder / sha256
        try:
            for part in (_LOCKS, _COMING, PLANS):
                (made / part).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"--cache-dir {self.folder} cannot be written ({in_words(error)}); name a folder on a disk of this "
                "machine"
            ) from error
        return made

    def bring(
        self,
        store: Store,
        folder: Path,
        name: str,
        expected: FileEntry,
        steps: int,
        alive: Callable[[], object],
        *,
        reserved: Callable[[], object] = lambda: None,
        wait: bool = False,
    ) -> Outcome:
        """Have a file of a data set in its folder.

        Args:
            store: where it is fetched from.
            folder: of the data set, here.
            name: of the file.
            expected: what it is.
            steps: how soon it is needed; nothing goes for it that is needed as soon.
            alive: see `Store.fetch`.
            reserved: called once its room is set aside.
            wait: for another process that fetches it, and for room.

        Returns:
            `there`; or, without `wait`, `busy` where another process is at it, and `full` where there is no room yet.

        Raises:
            DataError: it cannot be had, or the cache is no place for it.
        """
        path = folder / name
        if is_whole(path, expected.bytes):
            return "there"
        with self._locked(folder / _LOCKS / name, wait=wait) as got:
            if not got:
                return "busy"
            if is_whole(path, expected.bytes):
                return "there"
            part = self._reserve(folder, name, expected.bytes, steps)
            if part is None:
                if wait:
                    raise DataError(
                        f"--cache-gb {self._gigabytes(self.limit_bytes)} has no room for {name} of {store.url} beside "
                        "what other processes need; raise it, or name another --cache-dir"
                    )
                return "full"
            try:
                reserved()
                store.fetch(name, part, expected, alive)
                with part.open("rb") as file:
                    os.fsync(file.fileno())
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        return "there"

    def _reserve(self, folder: Path, name: str, num_bytes: int, steps: int) -> Path | None:
        """A place for a file that is to come, counted as large as it will be; None while there is no room for it."""
        part = self.coming(folder, name, num_bytes)
        part.unlink(missing_ok=True)  # of a process that died
        with self._locked(self.folder / "room.lock", wait=True):
            if self.limit_bytes is not None and not self._make_room(num_bytes, steps):
                return None
            part.touch()
        return part

    def _make_room(self, num_bytes: int, steps: int) -> bool:
        """Remove tars until so many bytes fit, unless those are needed in so many steps or sooner."""
        assert self.limit_bytes is not None
        kept, used = [], 0
        for folder in self._set_folders():
            used += self._coming_bytes(folder)
            needed = steps_until(folder / PLANS)
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not entry.is_file() or entry.name == MANIFEST:  # which is small, and in nobody's plans
                        continue
                    about = entry.stat()
                    used += about.st_size
                    if entry.name.endswith(".tar"):
                        due = needed.get(entry.name, NEVER)
                        kept.append((-due, about.st_mtime, entry.path, about.st_size))
        going, freed = [], 0
        for due, _, path, size in sorted(kept):
            if used - freed + num_bytes <= self.limit_bytes or -due <= steps:
                break
            going.append(path)
            freed += size
        if used - freed + num_bytes > self.limit_bytes:
            return False
        for path in going:
            Path(path).unlink(missing_ok=True)
        return True

    def _coming_bytes(self, folder: Path) -> int:
        """What is set aside for files that are being fetched; what dead processes left behind is removed."""
        total = 0
        for part in (folder / _COMING).glob("*"):
            name, _, size = part.name.rpartition(".")
            with self._locked(folder / _LOCKS / name, wait=False) as nobody:
                if nobody:
                    part.unlink(missing_ok=True)
                else:
                    total += int(size)
        return total

    @contextmanager
    def _locked(self, path: Path, *, wait: bool) -> Iterator[bool]:
        """Hold a lock; says whether it is held, which it may not be without `wait`."""
        file: IO[bytes] | None = None
        try:
            try:
                file = path.open("ab")
                lock(file, wait=wait)
                held = True
            except BlockingIOError:
                held = False
            except NoLocks as error:
                raise DataError(
                    f"--cache-dir {self.folder} is on a file system without locks; name a folder on a disk of this "
                    "machine"
                ) from error
            except OSError as error:
                raise DataError(
                    f"{path} cannot be written ({in_words(error)}); name another folder with --cache-dir"
                ) from error
            yield held
        finally:
            if file is not None:
                with suppress(OSError):
                    file.close()

    @staticmethod
    def coming(folder: Path, name: str, num_bytes: int) -> Path:
        """Where a file of a data set is while it is fetched."""
        return folder / _COMING / f"{name}.{num_bytes}"

    @staticmethod
    def _gigabytes(num_bytes: int | None) -> str:
        return "without a limit" if num_bytes is None else f"{num_bytes / 1e9:g}"


def is_whole(path: Path, num_bytes: int) -> bool:
    """Whether a file is there, as large as it must be."""
    try:
        return path.stat().st_size == num_bytes
    except OSError:
        return False
