"""A conversion as pieces that are finished one by one, so that it can be interrupted, continued and shared.

.DEST.partial/journal.json   what is being converted, and how
.DEST.partial/work/          results of finished pieces, and files in the making
.DEST.partial/set/           becomes DEST
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

from pipelines.conversion.engines import Engine, map_tasks
from pipelines.conversion.processes import Kept
from pipelines.storage.json_files import read_json
from pipelines.storage.locks import NoLocks, lock

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

    def __init__(self, dest: Path, purpose: Mapping[str, Any], *, restart: bool, shared: bool) -> None:
        """`purpose` says what is converted and how; `Busy` if the folder serves another one or is in use."""
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
            raise Busy(f"another pss-convert is writing {dest}; wait for it, or end it") from error
        journal = self.folder / "journal.json"
        if restart:
            shutil.rmtree(self.work, ignore_errors=True)
            shutil.rmtree(self.set, ignore_errors=True)
            journal.unlink(missing_ok=True)
        self.continued = journal.exists()
        if self.continued:
            self._compare(
                read_json(journal, dict[str, Any], remedy="begin again with --restart"), json.loads(json.dumps(purpose))
            )
        else:
            write_whole(journal, json.dumps(purpose, indent=1).encode())
        self.set.mkdir(exist_ok=True)
        self.work.mkdir(exist_ok=True)
        if not shared:
            for left in self.work.glob("*.unfinished"):  # by processes that were killed
                left.unlink(missing_ok=True)

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        differing = [
            f"{name.replace('_', '-')} was {before.get(name)!r}, is {now.get(name)!r}"
            for name in {**before, **now}
            if before.get(name) != now.get(name)
        ]
        if differing:
            self.leave()
            raise Busy(
                f"an unfinished conversion to {self.dest} differs from this one: {'; '.join(differing)}; repeat its "
                "command to continue it, or give --restart to drop it"
            )

    def leave(self) -> None:
        """Let others have the folder as it is."""
        self._lock.close()

    def remove(self) -> None:
        """Delete it with all that is in it, and the folders that were made for it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()
        for parent in self._made:
            with contextlib.suppress(OSError):
                parent.rmdir()

    def finish(self) -> None:
        """Make the set appear at the destination."""
        sync_folder(self.set)
        self.set.rename(self.dest)
        sync_folder(self.dest.parent)
        self._made = []
        self.remove()

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


@dataclass(frozen=True)
class Crew:
    """Who does the work: `jobs` processes here or a Ray cluster; as part `part[0]` of `part[1]`, from 1."""

    work: Path
    jobs: int
    engine: Engine
    part: tuple[int, int] | None
    patience: float

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

        What has been finished before is read, not done again. With `take_over`, what the other parts have not
        finished when this one's share is done is done here too, so that none has to wait for another.
        """
        paths = self.paths(phase, len(tasks))
        number, of = self.part or (1, 1)
        shares = [[k for k in range(len(tasks)) if k % of == number - 1]]
        if take_over and of > 1:
            shares.append(list(reversed(range(len(tasks)))))
        for k in (k for k, path in enumerate(paths) if path.exists()):
            progress(len(load_finished(paths[k]).rows))
        for share in shares:
            todo = [(tasks[k], str(paths[k])) for k in share if not paths[k].exists()]
            map_tasks(partial(_run_piece, function), todo, self.jobs, progress, self.engine, self.patience)

    def paths(self, phase: str, num_tasks: int) -> list[Path]:
        """Where the results of a phase are, or will be."""
        return [self.work / f"{phase}-{k:06d}" for k in range(num_tasks)]

    def results(self, phase: str, num_tasks: int) -> Iterator[Finished]:
        """All results of a phase that is done, one after the other."""
        return map(load_finished, self.paths(phase, num_tasks))


def _run_piece(function: Callable[[Task], Finished], piece: tuple[Task, str]) -> int:
    """Do one piece unless someone else has meanwhile; returns its number of samples."""
    task, path = piece
    if Path(path).exists():
        return len(load_finished(Path(path)).rows)
    finished = function(task)
    content = io.BytesIO()
    np.save(content, finished.rows)
    write_whole(Path(path), content.getvalue() + json.dumps(finished.notes).encode())
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
