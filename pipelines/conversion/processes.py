"""Work spread over processes so that a failure or Ctrl-C ends it at once and leaves nothing running."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol, TypeVar

from pipelines.base import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")


class Progress(Protocol):
    """Hears how a conversion is getting on."""

    def start(self, phase: str, total: int) -> None:
        """A phase of `total` images or files begins."""

    def advance(self, images: int) -> None:
        """So many more are done."""


class WorkerLost(DataError):
    """A process died under its work. What the others finished is good."""


def map_processes(
    function: Callable[[Task], Result], tasks: Sequence[Task], jobs: int, on_result: Callable[[Result], None]
) -> list[Result]:
    """`[function(task) for task in tasks]`, `jobs` at a time; `on_result` hears of each as it is done.

    The processes come from a fork server: forked from here, they could inherit a lock that some thread holds. It has
    imported what they use, once for all of them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "pipelines.conversion.convert"])
    pool = ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context, initializer=_prepare_worker)
    try:
        futures = [pool.submit(function, task) for task in tasks]
        for future in as_completed(futures):
            on_result(future.result())
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise WorkerLost(
            "a process of pss-convert was killed, perhaps for want of memory; the same command continues"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent alone reacts
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """End this process when the one that uses it is gone, however that ended.

    Workers hold the fork server's life line open for each other, so neither would notice by itself.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
