"""Threads that read files beside each other, and what they have compared."""

from __future__ import annotations

import resource
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Given = TypeVar("Given")
Result = TypeVar("Result")

_JOIN_SECONDS = 5.0
_BATCHES_AFTER_A_WAIT = 16


class DiskWaits:
    """Whether this process has lately had to wait for pages of a file; to be asked once a batch.

    To tell the system what will be needed costs a call an image, all of it with the interpreter's lock: too much where
    the files are in memory, as they are from the second epoch on if they fit.
    """

    def __init__(self) -> None:
        self._faults, self._left = -1, _BATCHES_AFTER_A_WAIT  # at first they are on the disk

    def __call__(self) -> bool:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        if faults != self._faults:
            self._faults, self._left = faults, _BATCHES_AFTER_A_WAIT
        self._left -= 1
        return self._left >= 0


class Readers:
    """`count` threads, started by the first call of `map` and again by the first one after `stop`.

    They are daemons: a read that never returns cannot keep the process from ending.
    """

    def __init__(self, count: int, name: str = "read") -> None:
        self.count, self._name = count, name
        self._lock = threading.Lock()
        self._tasks: SimpleQueue[Any] | None = None
        self._end: Callable[[], object] = lambda: None
        self._ended = threading.Event()

    def map(self, function: Callable[[Given], Result], items: Iterable[Given]) -> list[Result]:
        """`function` of each item, in their order; raises what the first of them to fail raises. From any thread."""
        items = list(items)
        results: list[Any] = [None] * len(items)
        done: SimpleQueue[tuple[int, BaseException | None]] = SimpleQueue()

        def read(place: int) -> None:
            failure = None
            try:
                results[place] = function(items[place])
            except BaseException as error:  # the caller's to handle
                failure = error
            done.put((place, failure))

        with self._lock:
            tasks = self._started()
            if self._ended.is_set():
                raise RuntimeError("the threads that read files have ended")  # as Python does
            for place in range(len(items)):
                tasks.put((read, place))
        failures = dict(done.get() for _ in items)
        for place in range(len(items)):
            if (failure := failures[place]) is not None:
                raise failure
        return results

    def _started(self) -> SimpleQueue[Any]:
        if self._tasks is None:
            tasks: SimpleQueue[Any] = SimpleQueue()
            threads = [
                threading.Thread(target=_work, args=(tasks,), name=f"pss-{self._name}-{i}", daemon=True)
                for i in range(self.count)
            ]
            for thread in threads:
                thread.start()
            self._ended = threading.Event()
            self._tasks, self._end = tasks, weakref.finalize(self, _end, tasks, threads, self._lock, self._ended)
        return self._tasks

    def stop(self) -> None:
        """End the threads, once they have done what they were given."""
        with self._lock:
            self._tasks, end = None, self._end
        end()


def _work(tasks: SimpleQueue[Any]) -> None:
    while (task := tasks.get()) is not None:
        read, place = task
        read(place)
        del task, read  # and the batch they hold


def _end(
    tasks: SimpleQueue[Any], threads: list[threading.Thread], lock: threading.Lock, ended: threading.Event
) -> None:
    with lock:  # so that nobody waits for what is put behind the end
        ended.set()
        for _ in threads:
            tasks.put(None)
    join(threads)


def join(threads: list[threading.Thread]) -> None:
    """Wait for threads that were told to end, for a few seconds in all."""
    deadline = time.monotonic() + _JOIN_SECONDS
    for thread in threads:
        if thread is not threading.current_thread():  # which may be where the garbage collector runs
            thread.join(max(0.0, deadline - time.monotonic()))


class Unchecked:
    """Which samples have not been compared with their checksums yet: each is when it is first read. A bit a sample.

    Where two threads clear bits of one byte at once, one may be set again: that sample is compared once more.
    """

    def __init__(self, count: int) -> None:
        """All of so many samples; 0 where none is to be compared."""
        self._bits = np.full(-(-count // 8), 255, dtype=np.uint8)

    def of(self, index: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each of some samples has still to be compared, (len(index),)."""
        if not len(self._bits):
            return np.zeros(len(index), dtype=np.bool_)
        found: NDArray[np.bool_] = (self._bits[index >> 3] >> (index & 7).astype(np.uint8) & 1).astype(np.bool_)
        return found

    def clear(self, index: NDArray[np.int64]) -> None:
        """They have been compared."""
        if len(self._bits):
            np.bitwise_and.at(self._bits, index >> 3, ~(1 << (index & 7)).astype(np.uint8))
