"""Work spread over processes so that a failure or Ctrl-C ends it at once and leaves nothing running."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from pipelines.base import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")


def map_processes(
    function: Callable[[Task], Result], tasks: Sequence[Task], jobs: int, on_result: Callable[[Result], None]
) -> list[Result]:
    """`[function(task) for task in tasks]` in `jobs` processes; `on_result` hears of each as it is done.

    The processes come from a fork server: forked from here, they could inherit a lock that some thread holds.
    """
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context, initializer=_ignore_interrupt)
    try:
        futures = [pool.submit(function, task) for task in tasks]
        for future in as_completed(futures):
            on_result(future.result())
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise DataError("a conversion process was killed, perhaps for want of memory; try a smaller --jobs") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent alone reacts
