"""Threads that bring the tars of a split into the cache of the node, in the order in which they are needed.

They follow the plan of the epoch and of the one after, as far ahead as the cache has room: what is needed next is
fetched first, and nothing that is needed sooner makes room for it.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.base import DataError, in_words
from pipelines.remote.cache import PLANS, Cache
from pipelines.remote.plans import AGAIN, NEVER, Plan
from pipelines.remote.store import Store
from pipelines.remote.uses import Uses
from pipelines.storage.manifest import FileEntry
from pipelines.storage.reading import join

Int64 = NDArray[np.int64]
UsesOf = Callable[[], tuple[Uses, Uses | None]]

THREADS = 4
"""Of each reader: so many tars are fetched at once."""
SILENT_SECONDS = 300.0
"""How long nothing may be heard of a tar before its reader gives up."""
_LOOK_AGAIN_SECONDS, _ROOM_AGAIN_SECONDS = 0.2, 1.0  # for what another process fetches, and for what had no room
_FAILED_AGAIN_SECONDS = 30.0  # for what could not be had, and nobody waits for yet


class Fetcher:
    """Brings the tars of one split for one reader.

    Args:
        cache: of the node.
        store: where the data set lies.
        folder: that of the data set in the cache.
        tars: the names of the split's tars.
        entries: what they must be, in the same order.
    """

    def __init__(
        self, cache: Cache, store: Store, folder: Path, tars: Sequence[str], entries: Sequence[FileEntry]
    ) -> None:
        self._cache, self._store, self._folder = cache, store, folder
        self._tars, self._entries = tars, entries
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._stopping = False
        self._failure: BaseException | None = None
        self._plan: Plan | None = None
        self._to_plan: UsesOf | None = None
        self._uses: tuple[Uses, Uses | None] = Uses.none(len(tars)), None
        self._planned = True  # whether those are of the present epoch, and its steps those that are counted
        self._steps = self._now = 0
        self._boundary = -1  # the step from which on other tars are needed
        self._due: Int64 = np.full(len(tars), NEVER, dtype=np.int64)
        self._there: NDArray[np.bool_] = np.zeros(len(tars), dtype=np.bool_)  # as far as this process knows
        self._asked: Counter[int] = Counter()  # tars that somebody waits for
        self._busy: set[int] = set()
        self._reserving: int | None = None  # whose room comes next: tars that are needed later must not take it
        self._not_before: dict[int, float] = {}
        self._room_not_before = 0.0
        self._signs = 0

    def follow(self, uses_of: UsesOf, steps: int, now: int) -> None:
        """Fetch for an epoch of so many steps from step `now` on.

        `uses_of` returns when tars are read in it and in the next one, or None where nobody knows when that is; it is
        called in a thread.
        """
        with self._changed:
            self._to_plan, self._planned, self._steps, self._now = uses_of, False, steps, now
            self._start()
            self._changed.notify_all()

    def advance(self, now: int) -> None:
        """The batches of all steps before `now` have been delivered."""
        with self._changed:
            self._now = now
            if self._plan is not None and self._planned:
                self._plan.advance(now)
            if now >= self._boundary:
                self._changed.notify_all()

    def wait_for(self, tars: Sequence[int], alive: Callable[[], object]) -> None:
        """Until these tars are in the cache. `alive` is called while something is heard of them.

        Raises:
            DataError: one cannot be had.
        """
        with self._changed:
            self._start()
            self._asked.update(tars)
            for tar in tars:
                self._there[tar] = False  # or nobody would ask
                self._not_before.pop(tar, None)
            self._boundary = -1
            self._changed.notify_all()
            heard, since = None, time.monotonic()
            try:
                while missing := [tar for tar in tars if not self._there[tar]]:
                    if self._failure is not None:
                        raise self._failure
                    if self._stopping:
                        raise RuntimeError("the threads that fetch tars have been stopped")  # as when Python exits
                    if heard != (said := self._said(missing)):
                        heard, since = said, time.monotonic()
                    if time.monotonic() - since > SILENT_SECONDS:
                        raise DataError(
                            f"nothing was heard of {self._store.name(self._tars[missing[0]])} for "
                            f"{SILENT_SECONDS:g} s; see that the store answers and --cache-gb has room beside what "
                            "other runs need, and go on with --resume"
                        )
                    alive()
                    self._changed.wait(_LOOK_AGAIN_SECONDS)
            finally:
                self._asked.subtract(tars)
                self._asked = +self._asked

    def stop(self) -> None:
        """End the threads, once what they are at has come, and need nothing any more; reading starts them again."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            threads, self._threads = self._threads, []
            plan, self._plan = self._plan, None
        join(threads)
        if plan is not None:
            plan.close()

    def _said(self, missing: Sequence[int]) -> tuple[int, ...]:
        """What changes while something goes on, in this process or in another one that fetches what is missing."""
        sizes = []
        for tar in missing:
            try:
                sizes.append(self._cache.coming(self._folder, self._tars[tar], self._entries[tar].bytes).stat().st_size)
            except OSError:
                sizes.append(-1)
        return self._signs, len(missing), *sizes

    def _start(self) -> None:
        if self._threads:
            return
        self._stopping, self._failure, self._reserving = False, None, None
        try:
            self._plan = Plan(self._folder / PLANS, self._tars)
        except OSError as error:  # a file system without locks has been refused before
            raise DataError(
                f"--cache-dir {self._cache.folder} cannot be written ({in_words(error)}); name another folder"
            ) from error
        self._boundary = -1
        self._threads = [
            threading.Thread(target=self._work, name=f"pss-fetch-{number}", daemon=True) for number in range(THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while (found := self._next()) is not None:
            tar, steps = found
            outcome, failure = None, None
            try:
                outcome = self._cache.bring(
                    self._store,
                    self._folder,
                    self._tars[tar],
                    self._entries[tar],
                    steps,
                    self._alive,
                    reserved=partial(self._reserved, tar),
                )
            except BaseException as error:  # the reader's to hear of
                failure = error
            with self._changed:
                self._busy.discard(tar)
                if isinstance(failure, DataError) and tar not in self._asked:  # it may yet be had when it is needed
                    self._not_before[tar] = time.monotonic() + _FAILED_AGAIN_SECONDS
                elif failure is not None:
                    self._failure = failure
                elif outcome == "there":
                    self._there[tar] = True
                    self._signs += 1
                elif outcome == "busy" or tar in self._asked:
                    self._not_before[tar] = time.monotonic() + _LOOK_AGAIN_SECONDS
                else:
                    self._room_not_before = time.monotonic() + _ROOM_AGAIN_SECONDS
                self._reserved(tar)  # or it needs no room, or there is none
                self._changed.notify_all()

    def _reserved(self, tar: int) -> None:
        """Let another tar be chosen."""
        with self._changed:
            if self._reserving == tar:
                self._reserving = None
                self._changed.notify_all()

    def _alive(self) -> None:
        self._signs += 1

    def _next(self) -> tuple[int, int] | None:
        """The tar to fetch next, and in how many steps it is needed; None where the threads are to end."""
        with self._changed:
            me = threading.current_thread()
            while not self._stopping and me in self._threads:
                if self._to_plan is not None:
                    self._replan()
                    continue
                if self._now >= self._boundary:
                    self._count()
                found, pause = self._choose()
                if found is not None:
                    self._busy.add(found)
                    self._reserving = found
                    return found, max(0, int(self._due[found]) - self._now)
                self._changed.wait(pause)
            return None

    def _replan(self) -> None:
        """Ask when the tars of an epoch are needed. Nobody waits meanwhile."""
        uses_of, self._to_plan = self._to_plan, None
        assert uses_of is not None
        self._changed.release()
        try:
            uses, failure = uses_of(), None
        except BaseException as error:  # the reader's to hear of
            uses, failure = None, error
        finally:
            self._changed.acquire()
        if uses is None:
            self._failure = failure
        elif self._to_plan is None:  # else another epoch has begun
            self._uses, self._planned, self._boundary = uses, True, -1

    def _count(self) -> None:
        """See what is there, and when each tar is needed next, and tell the other processes."""
        now, (uses, following) = self._now, self._uses
        with os.scandir(self._folder) as entries:
            found = {entry.name for entry in entries}
        self._there = np.array([name in found for name in self._tars], dtype=np.bool_)
        if not self._planned:  # what was said of the epoch before, which looked ahead, stays
            self._due[list(self._asked)] = now
            self._boundary = NEVER
            return
        if following is None:
            later = np.where(uses.first >= 0, now + AGAIN, NEVER)
        else:
            later = np.where(following.first >= 0, self._steps + following.first, NEVER)
        to_come = uses.last >= now
        self._due = np.where(to_come, uses.first, later)
        unforeseen = [tar for tar in self._asked if self._due[tar] - now >= AGAIN]
        self._due[unforeseen] = now
        if self._plan is not None:
            self._plan.write(now, self._due)
        self._boundary = int(uses.last[to_come].min()) + 1 if to_come.any() else NEVER

    def _choose(self) -> tuple[int | None, float | None]:
        """A tar to fetch, or how long to wait before looking again; None for as long as nothing happens."""
        if self._failure is not None or self._reserving is not None:
            return None, None
        time_now = time.monotonic()
        self._not_before = {tar: until for tar, until in self._not_before.items() if until > time_now}
        pauses = [until - time_now for until in self._not_before.values()]
        passed_by = self._busy | self._not_before.keys()
        asked = [tar for tar in self._asked if not self._there[tar] and tar not in passed_by]
        if asked:  # batches are read ahead, and the first of them must not wait for room that the others take
            return min(asked, key=self._due.__getitem__), None
        wanted = ~self._there & (self._due - self._now < AGAIN) & self._planned
        wanted[list(passed_by)] = False
        if not wanted.any():
            return None, min(pauses, default=None)
        if time_now < self._room_not_before:
            return None, min([*pauses, self._room_not_before - time_now])
        candidates = np.flatnonzero(wanted)
        return int(candidates[self._due[candidates].argmin()]), None
