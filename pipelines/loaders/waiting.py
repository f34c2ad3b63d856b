"""Waiting for other threads: how long nothing may happen, what is said of it then, and calls that can be given up."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from pipelines.base import DataError
from pipelines.storage.reading import join

Result = TypeVar("Result")

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.2  # between looks at what has changed
_TOLD_AFTER_SECONDS = 10.0
LONG_SECONDS = 900.0
"""How long preparations, such as compiling, may take: minutes where many processes share few cores."""


def stalled(what: str, seconds: float) -> DataError:
    """The error for something that has done nothing for so long."""
    return DataError(
        f"{what} for {seconds:g} s; see if the disk with the data answers and the machine has cores to spare, then try "
        "again: a run goes on with --resume"
    )


@dataclass(frozen=True)
class _LongPart:
    what: str
    seconds: float
    began: float


class Signs:
    """What those who wait for a thread see of its work: that it goes on, and the part that it is in if one takes long.

    One writes, any number look.
    """

    def __init__(self) -> None:
        self._count = 0
        self._part: _LongPart | None = None

    def advance(self) -> None:
        """Something has been done: whoever waits goes on waiting."""
        self._count += 1

    @property
    def count(self) -> int:
        """How often something was done."""
        return self._count

    @property
    def part(self) -> _LongPart | None:
        """What takes long at the moment, and is no stall."""
        return self._part

    @contextmanager
    def long_part(self, what: str, seconds: float) -> Iterator[None]:
        """Within, `what` ("the compilation of ...") happens, which may take up to `seconds`, and nothing else need."""
        outer, self._part = self._part, _LongPart(what, seconds, time.monotonic())
        try:
            yield
        finally:
            self._part = outer
            self.advance()


def wait_for(
    attempt: Callable[[float], Result | None],
    nothing: str,
    seconds: float,
    *,
    signs: Signs | None = None,
    progress: Callable[[], object] | None = None,
) -> Result:
    """What `attempt` returns, once that is not None. It is called with the seconds that it may wait, again and again.

    `DataError`, whose sentence begins with `nothing` ("... delivered nothing"), after `seconds` in which neither
    `signs` advanced nor what `progress` returns changed; the latter makes `signs` advance, for those who wait for this
    thread. A long part of `signs` has its own limit, is told of in the log, and does not count.
    """
    signs = signs or Signs()
    since, seen, told = time.monotonic(), (signs.count, progress and progress()), False
    while True:
        part = signs.part
        limit, began = (seconds, since) if part is None else (part.seconds, part.began)
        left = began + limit - time.monotonic()
        result = attempt(max(0.0, min(left, _POLL_SECONDS)))
        if result is not None:
            return result
        if part is not None:
            since = time.monotonic()
            if not told and since - part.began > _TOLD_AFTER_SECONDS:
                _log.warning("%s takes its time; it may take %g s", part.what, part.seconds)
                told = True
        done = progress and progress()
        if done != seen[1]:
            signs.advance()
        if (signs.count, done) != seen:
            since, seen = time.monotonic(), (signs.count, done)
        elif left <= 0:
            raise stalled(nothing if part is None else f"{part.what} has not ended", limit)


class WatchedThread:
    """Runs one call at a time, into a library that may never return, in a thread of its own that can be given up."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._outcomes: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lost = False

    def call(self, function: Callable[[], Result], seconds: float, signs: Signs | None = None) -> Result:
        """What `function` returns or raises; `DataError` if it does neither, nor gives `signs`, for `seconds`."""
        if self._lost:
            raise DataError(f"{self._name} does not answer; build a new loader")
        if self._thread is None:
            # A daemon, so that a call which never returns cannot keep the process from ending.
            arguments = (self._calls, self._outcomes)
            self._thread = threading.Thread(target=_serve, args=arguments, name=f"pss-{self._name}", daemon=True)
            self._thread.start()
            self._end = weakref.finalize(self, self._calls.put, None)  # for an owner that is never closed
        self._calls.put(function)
        try:
            result, failure = wait_for(self._outcome, f"{self._name} delivered nothing", seconds, signs=signs)
        except DataError:
            self._lost = True
            raise
        if failure is not None:
            try:
                raise failure
            finally:
                del failure, function  # else this frame and the failure keep each other, and what was called
        returned: Result = result
        return returned

    def _outcome(self, timeout: float) -> tuple[Any, BaseException | None] | None:
        try:
            return self._outcomes.get(timeout=timeout)
        except Empty:
            return None

    def stop(self) -> None:
        """End the thread, unless it is lost in a call; the next call starts another."""
        if self._thread is not None:
            self._end()
            if not self._lost:
                join([self._thread])  # not for ever: it may be in a call that another thread waits for
                self._lost = self._thread.is_alive()
            self._thread = None


def _serve(calls: SimpleQueue[Any], outcomes: SimpleQueue[Any]) -> None:
    while (function := calls.get()) is not None:
        outcome: tuple[Any, BaseException | None]
        try:
            outcome = function(), None
        except BaseException as failure:  # the caller's to handle
            outcome = None, failure
        outcomes.put(outcome)
        del outcome, function
