"""A conversion as pieces that are finished one by one, so that it can be interrupted, continued and shared.

.DEST.partial/journal.json   what is being converted, and how
.DEST.partial/work/          results of finished pieces, and files in the making
.DEST.partial/set/           becomes DEST

If DEST is an address, the folder is on a disk of this machine, and only what it needs at the moment is in it: tars and
results go to the store as they are finished.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.base import DataError
from pipelines.conversion.engines import Engine, map_tasks
from pipelines.conversion.processes import Kept, beat
from pipelines.remote.depot import PARTIAL, Depot
from pipelines.storage.json_files import read_json
from pipelines.storage.locks import NoLocks, lock
from pipelines.storage.manifest import FileEntry

Task = TypeVar("Task")


class Busy(Kept):
    """Another conversion is at work here: nothing of it may be touched."""


@dataclass(frozen=True)
class Finished:
    """The result of a piece of work: it fits in memory and in a small file."""

    rows: NDArray[Any]  # structured, one row per sample
    notes: dict[str, Any] = field(default_factory=dict)  # for JSON


class Workplace:
    """The partial folder beside `dest`, held by this process."""

    def __init__(
        self, dest: Path, purpose: Mapping[str, Any], *, restart: bool, shared: bool, shown: str | None = None
    ) -> None:
        """`purpose` says what is converted and how, `shown` what the destination is called in messages.

        `Busy` if the folder serves another conversion or is in use.
        """
        self.shown = shown or str(dest)
        self.folder = dest.with_name(f".{dest.name}.partial")
        self.dest, self.set, self.work = dest, self.folder / "set", self.folder / "work"
        self._made = [parent for parent in dest.parents if not parent.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        self.locked = True
        """False where the file system has no locks; nothing then keeps two conversions apart."""
        try:
            lock(self._lock, shared=shared, wait=False)
        except NoLocks as error:
            self.locked = False
            if shared:
                self._lock.close()
                raise Busy(
                    f"{dest.parent} lies on a file system without locks, which --part needs; write to another one, or "
                    "leave --part out"
                ) from error
        except OSError as error:
            self._lock.close()
            raise Busy(f"another pss-convert is writing {self.shown}; wait for it, or end it") from error
        if restart:
            self._drop()
        self.continued = self._enter(json.loads(json.dumps(purpose)), shared=shared)
        self.set.mkdir(exist_ok=True)
        self.work.mkdir(exist_ok=True)
        if not shared:
            for left in self.work.glob("*.unfinished"):  # by processes that were killed
                left.unlink(missing_ok=True)

    def _drop(self) -> None:
        """Forget what an earlier conversion has left here."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.rmtree(self.set, ignore_errors=True)
        self._journal.unlink(missing_ok=True)

    @property
    def _journal(self) -> Path:
        return self.folder / "journal.json"

    def _enter(self, purpose: dict[str, Any], *, shared: bool) -> bool:
        """Whether this continues a conversion, which must be the same one; else begin it."""
        if self._journal.exists():
            try:
                self._compare(read_json(self._journal, dict[str, Any], remedy="begin again with --restart"), purpose)
            except ValueError:
                self.leave()
                raise
            return True
        write_whole(self._journal, json.dumps(purpose, indent=1).encode())
        return False

    def agree(self, name: str, content: bytes) -> bool:
        """Whether this is what the conversion has under `name` in `work`; it is from now on, if it had nothing."""
        path = self.work / name
        if path.exists():
            return path.read_bytes() == content
        write_whole(path, content)
        return True

    def check_room(self, needed: int) -> None:
        """Raise `Kept` where so many bytes, those in `set` among them, do not fit on the disk."""
        there = sum(map(_size, self.set.iterdir()))
        free = shutil.disk_usage(self.folder).free
        if needed > free + there:
            raise Kept(
                f"{self.folder.parent} has {free / 1e6:,.1f} MB left, and the result needs "
                f"{(needed - there) / 1e6:,.1f} MB at least; make room, and the same command continues, or choose "
                "another disk with --restart"
            )

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        differing = [
            f"{name.replace('_', '-')} was {before.get(name)!r}, is {now.get(name)!r}"
            for name in {**before, **now}
            if before.get(name) != now.get(name)
        ]
        if differing:
            raise Busy(
                f"an unfinished conversion to {self.shown} differs from this one: {'; '.join(differing)}; repeat its "
                "command to continue it, or give --restart to drop it"
            )

    @property
    def keeps(self) -> str:
        """Where what is finished is, for messages."""
        return str(self.folder)

    def leave(self, *, done: bool = False) -> None:
        """Let others have the folder as it is; `done` if all that there was to do here is."""
        self._lock.close()

    def remove(self) -> None:
        """Delete all that was made for the conversion."""
        self._remove()

    def _remove(self) -> None:
        """Delete the folder with all that is in it, and the folders that were made for it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()
        for parent in self._made:
            with contextlib.suppress(OSError):
                parent.rmdir()

    def finish(self, files: Mapping[str, FileEntry]) -> None:
        """Make the set, which has these files, appear at the destination."""
        sync_folder(self.set)
        self.set.rename(self.dest)
        sync_folder(self.dest.parent)
        self._made = []
        self._remove()

    @contextlib.contextmanager
    def merging(self) -> Any:
        """Yields whether this process may merge: the first that asks."""
        with (self.folder / "merge-lock").open("w") as file:
            try:
                lock(file, wait=False)
            except NoLocks:
                pass  # and no other part, which needs them
            except OSError:
                yield False
                return
            yield True


class DepotPlace(Workplace):
    """The partial folder of this machine for a destination at an address, where others may be at work, too."""

    def __init__(self, depot: Depot, below: Path, purpose: Mapping[str, Any], *, restart: bool, shared: bool) -> None:
        """As `Workplace`; the folder is made in `below`."""
        self.depot, self._restart = depot, restart
        dest = depot.scratch(below, purpose)
        super().__init__(dest, purpose, restart=restart, shared=shared, shown=depot.url)

    def _enter(self, purpose: dict[str, Any], *, shared: bool) -> bool:
        self.depot.serve(purpose)
        try:
            before = None if self._restart else self.depot.journal()
            if self._restart:
                self._clear()
            if before is None:
                if self._alone(shared=shared):
                    self._drop()  # of a conversion that somebody has removed from the store
                self.depot.begin(purpose, self.folder)
            else:
                self._compare(before, purpose)
        except ValueError:
            self.leave(done=True)
            raise
        return before is not None

    def _clear(self) -> None:
        """Remove what earlier conversions to this address have left in the store and on this machine; `Busy` if one of
        them is at work here."""
        others = set(self.dest.parent.parent.iterdir()) - {self.dest.parent}
        with contextlib.ExitStack() as held:
            for other in others:
                with contextlib.suppress(FileNotFoundError, NoLocks):
                    file = held.enter_context((other / self.folder.name / "lock").open("a"))
                    try:
                        lock(file, wait=False)
                    except BlockingIOError as error:
                        raise Busy(f"another pss-convert is writing {self.shown}; wait for it, or end it") from error
            self.depot.clear()
            for other in others:
                shutil.rmtree(other, ignore_errors=True)

    @property
    def keeps(self) -> str:
        return f"{self.depot.url}/{PARTIAL}"

    def leave(self, *, done: bool = False) -> None:
        if done and not self._lock.closed:
            with contextlib.suppress(OSError):
                lock(self._lock, wait=False)
                self._remove()
        super().leave()

    def _remove(self) -> None:
        super()._remove()
        for folder in list(self.dest.parents)[:3]:  # of this conversion, of this address, of conversions
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _alone(self, *, shared: bool) -> bool:
        """Whether no other part of the conversion is at work on this machine."""
        try:
            lock(self._lock, wait=False)
        except NoLocks:
            return True  # and no parts, which need them
        except OSError:
            lock(self._lock, shared=shared)  # which the attempt has given up
            return False
        lock(self._lock, shared=shared)
        return True

    def agree(self, name: str, content: bytes) -> bool:
        with reaching():
            return self.depot.note(name, content, self.work) == content

    def remove(self) -> None:
        self.depot.clear()
        self._remove()

    def finish(self, files: Mapping[str, FileEntry]) -> None:
        with reaching():
            self.depot.finish(self.set, files)
        self._remove()


def begun(dest: Path) -> dict[str, Any] | None:
    """What is being converted to a folder, and how; None if nothing is."""
    journal = dest.with_name(f".{dest.name}.partial") / "journal.json"
    return read_json(journal, dict[str, Any], remedy="begin again with --restart") if journal.exists() else None


@contextlib.contextmanager
def reaching() -> Iterator[None]:
    """Within, what is wrong with a store ends a conversion so that it can be continued."""
    try:
        yield
    except DataError as error:
        raise Kept(str(error)) from error


@dataclass(frozen=True)
class Crew:
    """Who does the work: `jobs` processes here or a Ray cluster; as part `part[0]` of `part[1]`, from 1."""

    work: Path
    jobs: int
    engine: Engine
    part: tuple[int, int] | None
    patience: float
    depot: Depot | None = None
    """Where tars and results go, if that is not this machine."""

    def run(
        self,
        phase: str,
        function: Callable[[Task], Finished],
        tasks: Sequence[Task],
        progress: Callable[[int], None],
        *,
        take_over: bool = False,
    ) -> None:
        """Do this part's share of `tasks`. `progress` hears of samples.

        What has been finished before, or elsewhere, is read, not done again. With `take_over`, what the other parts
        have not finished when this one's share is done is done here too, so that none has to wait for another.
        """
        paths = self.paths(phase, len(tasks))
        number, of = self.part or (1, 1)
        shares = [[k for k in range(len(tasks)) if k % of == number - 1]]
        if take_over and of > 1:
            shares.append(list(reversed(range(len(tasks)))))
        self.learn(paths)
        for k in (k for k, path in enumerate(paths) if path.exists()):
            progress(len(load_finished(paths[k]).rows))
        for share in shares:
            todo = [(tasks[k], str(paths[k])) for k in share if not paths[k].exists()]
            piece = partial(_run_piece, function, self.depot)
            map_tasks(piece, todo, self.jobs, progress, self.engine, self.patience)
            self.learn(paths)

    def learn(self, paths: Sequence[Path]) -> None:
        """Have the results that others have finished at their paths."""
        if self.depot is not None:
            with reaching():
                self.depot.fetch_results(paths)

    def paths(self, phase: str, num_tasks: int) -> list[Path]:
        """Where the results of a phase are, or will be."""
        return [self.work / f"{phase}-{k:06d}" for k in range(num_tasks)]

    def results(self, phase: str, num_tasks: int) -> Iterator[Finished]:
        """All results of a phase that is done, one after the other."""
        return map(load_finished, self.paths(phase, num_tasks))


def _run_piece(function: Callable[[Task], Finished], depot: Depot | None, piece: tuple[Task, str]) -> int:
    """Do one piece unless someone else has meanwhile; returns its number of samples."""
    task, path = piece[0], Path(piece[1])
    folder = path.parent.with_name("set")
    if depot is not None:
        path.parent.mkdir(parents=True, exist_ok=True)  # on another node of a Ray cluster
        folder.mkdir(exist_ok=True)
        if not path.exists():
            with reaching():
                depot.fetch_result(path, beat)
    if path.exists():
        return len(load_finished(path).rows)
    finished = function(task)
    stream = io.BytesIO()
    np.save(stream, finished.rows)
    content = stream.getvalue() + json.dumps(finished.notes).encode()
    if depot is None:
        write_whole(path, content)
    else:
        with reaching():
            depot.deliver([folder / name for name in finished.notes.get("files", ())], path, content, beat)
    return len(finished.rows)


def load_finished(path: Path) -> Finished:
    """The result of a piece."""
    with path.open("rb") as file:
        return Finished(np.load(file), json.loads(file.read()))


def write_whole(path: Path, content: bytes) -> None:
    """The file appears with its content on the disk, or not at all."""
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.unfinished")
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):  # another part has just moved it to the store
        return path.stat().st_size
    return 0


def sync_folder(folder: Path) -> None:
    """Put the names of a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def chunks_of(total: int, least: int, most: int) -> list[slice]:
    """Pieces of work: 64 of them if their size then lies in `least` ... `most`. Does not depend on who does them."""
    size = max(least, min(most, total // 64))
    return [slice(first, first + size) for first in range(0, total, size)]
