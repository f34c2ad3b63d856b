"""Threads that fill batches image by image, and the memory of batches.

Threads suffice for decoding and resizing, which release the interpreter's lock. They end with the process however it
dies, start at once, and share the source's memory.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.loaders.waiting import Signs, wait_for
from pipelines.storage.reading import join

Task = Callable[[], None]


class PixelMemory:
    """Where a loader's batches lie: the memory of those that nobody holds any more is filled again.

    The system takes longer to hand over fresh pages, and to take them back, than FFCV to fill them with raw pixels.
    Pinned memory is torch's to use again, as it knows when copies from it are over.
    """

    def __init__(self, pin_memory: bool = False) -> None:
        self._pin_memory = pin_memory
        self._arrays: list[NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def images(self, count: int, side: int) -> Tensor:
        """Uninitialised images, uint8 (count, 3, side, side), channels last in memory like decoded ones."""
        shape = (count, side, side, 3)
        with torch.inference_mode(False):  # the caller's mode: threads outside it could not write into the batch
            if self._pin_memory:
                stored = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            else:
                stored = torch.from_numpy(self._take(count * side * side * 3)).view(shape)
            return stored.permute(0, 3, 1, 2)

    def _take(self, num_bytes: int) -> NDArray[np.uint8]:
        with self._lock:
            references = _references(self._arrays)
            for number in reversed(range(len(references))):
                if references[number] > _UNUSED:
                    continue
                if len(self._arrays[number]) >= num_bytes:
                    return self._arrays[number][:num_bytes]
                del self._arrays[number]  # of smaller images, whose time has passed
            self._arrays.append(np.empty(num_bytes, dtype=np.uint8))
            return self._arrays[-1][:]

    def clear(self) -> None:
        """Keep nothing; batches that are held keep their own."""
        with self._lock:
            self._arrays.clear()


def _references(arrays: list[NDArray[np.uint8]]) -> list[int]:
    """How many there are to each, a batch's tensor and all its views holding one."""
    return [sys.getrefcount(array) for array in arrays]


_UNUSED = _references([np.empty(0, dtype=np.uint8)])[0]


class FilledBatch:
    """A batch being filled, each image by whichever thread comes to it; `count` images are missing at first."""

    def __init__(self, keys: NDArray[np.int64], count: int, images: Tensor) -> None:
        """`images` are those to be filled, uint8 (B, 3, S, S)."""
        self.keys, self.images = keys, images
        with torch.inference_mode(False):
            self.rows = images[:, None].unbind()
            """Views of `images`, each (1, 3, S, S): made for all at once, they cost least."""
        self._missing = count
        self._done = threading.Event()
        self._failure: BaseException | None = None
        self._lock = threading.Lock()

    def attempt(self, task: Task, *, fills: int = 1) -> None:
        """Run `task`, which fills so many images; whatever it raises is for the reader of this batch."""
        if self._failure is not None:
            return
        try:
            task()
        except BaseException as failure:
            self.fail(failure)
            return
        if fills:
            with self._lock:
                self._missing -= fills
                if self._missing == 0:
                    self._done.set()

    def fail(self, failure: BaseException) -> None:
        """Give the reader `failure` in place of the images."""
        self._failure = failure
        self._done.set()

    def wait(self, threads: Threads, stall_seconds: float, what: str, signs: Signs | None = None) -> Tensor:
        """The images; raises what a task raised, and `DataError` if none is filled for `stall_seconds`. `what` the
        threads wait for then."""

        def done(timeout: float) -> bool | None:
            if self._done.wait(timeout):
                return True
            if not threads.stop.alive:
                raise RuntimeError("the threads that were to fill a batch have been stopped")  # as when Python exits
            return None

        nothing = f"the threads wait for {what}, and no image was decoded"
        wait_for(done, nothing, stall_seconds, signs=signs, progress=lambda: self._missing)
        if self._failure is not None:
            raise self._failure
        return self.images


class Threads:
    """`count` threads that run tasks in the order of submission; ended by `stop`, at the latest when Python exits."""

    def __init__(self, count: int, name: str) -> None:
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        stopping, begun = threading.Event(), threading.Barrier(count + 1)
        arguments = (self._tasks, stopping, begun)
        threads = [
            # Daemons, so that a read which never returns cannot keep the process from ending.
            threading.Thread(target=_work, args=arguments, name=f"pss-{name}-{i}", daemon=True)
            for i in range(count)
        ]
        intra_op = torch.get_num_threads()
        for thread in threads:
            thread.start()
        begun.wait()
        torch.set_num_threads(intra_op)  # a worker's setting is also what threads started later would begin with
        self.stop = weakref.finalize(self, _stop, self._tasks, threads, stopping)

    def submit(self, task: Task) -> None:
        """Have `task` run; it must not raise."""
        self._tasks.put(task)


class LatestThreads:
    """The threads of an iteration, which end when the next one begins."""

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self.stop: Callable[[], object] = lambda: None
        """End them; they need not run."""

    def start(self) -> Threads:
        """New ones."""
        self.stop()
        threads = Threads(self._count, self._name)
        self.stop = threads.stop
        return threads


def _work(tasks: SimpleQueue[Task | None], stopping: threading.Event, begun: threading.Barrier) -> None:
    torch.get_num_threads()  # torch sets up a thread at its first use; later, that would undo the next line
    torch.set_num_threads(1)
    begun.wait()
    while (task := tasks.get()) is not None:
        if not stopping.is_set():
            task()
        del task  # and the batch it holds


def _stop(tasks: SimpleQueue[Task | None], threads: list[threading.Thread], stopping: threading.Event) -> None:
    stopping.set()
    for _ in threads:
        tasks.put(None)
    join(threads)
