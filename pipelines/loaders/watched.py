"""Calls into libraries that may never return, made in a thread that can be given up."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from pipelines.base import DataError

Result = TypeVar("Result")

_JOIN_SECONDS = 5.0


def stalled(what: str, seconds: float) -> DataError:
    """The error for something that has done nothing for so long."""
    return DataError(
        f"{what} for {seconds:g} s; see if the disk with the data answers and the machine has cores to spare, then try "
        "again: a run goes on with --resume"
    )


class WatchedThread:
    """Runs one call at a time in a thread of its own, started at the first one."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._outcomes: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lost = False

    def call(self, function: Callable[[], Result], timeout: float) -> Result:
        """What `function` returns or raises; `DataError` if it does neither within `timeout` seconds."""
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
            result, failure = self._outcomes.get(timeout=timeout)
        except Empty:
            self._lost = True
            raise stalled(f"{self._name} delivered nothing", timeout) from None
        if failure is not None:
            try:
                raise failure
            finally:
                del failure, function  # else this frame and the failure keep each other, and what was called
        returned: Result = result
        return returned

    def stop(self) -> None:
        """End the thread, unless it is lost in a call; the next call starts another."""
        if self._thread is not None:
            self._end()
            if not self._lost:
                self._thread.join(_JOIN_SECONDS)  # not for ever: it may be in a call that another thread waits for
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
