"""Threads for operations on a CPU that consist of many small ones.

For every operation, torch wakes the threads of its OpenMP team and waits for all of them. Where they sleep in between
(OMP_WAIT_POLICY=PASSIVE, as the commands have it), waking them takes as long as a small matrix product. The threads
here are woken once, do their share of all the small operations each on its own, and are waited for once.
"""

import os
import threading
import weakref
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

import torch

# Python lets one thread at a time ask torch for an operation; many of them would wait for each other.
_MOST = 8

# torch loads OpenMP, which reads this once. Threads that wait for work by spinning would keep ours from their cores.
_openmp_sleeps = os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"

_Task = Callable[[], None]

_lock = threading.Lock()
_threads: "_Threads | None" = None


def num_shares() -> int:
    """How many shares an operation should be divided into: one, for torch's own threads, or as many as those are."""
    intra_op = torch.get_num_threads()
    return intra_op if _openmp_sleeps and intra_op <= _MOST else 1


def run_shares(work: Callable[[int], None], count: int) -> None:
    """Call `work` with 0 to `count` - 1, each in a thread that has torch to itself; a single one in the caller's.

    Nothing is recorded for autograd, and inference mode is not known in those threads. What a share raises is raised
    here, when all of them have ended.
    """
    if count == 1:
        work(0)
        return
    ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def run(share: int) -> None:
        failure = None
        try:
            work(share)
        except BaseException as error:
            failure = error
        ended.put(failure)

    failures: list[BaseException | None] = []
    with _lock:
        tasks = _at_least(count).tasks
        for share in range(count):
            tasks.put(partial(run, share))
        try:
            while len(failures) < count:
                failures.append(ended.get())
        finally:  # after Ctrl-C, too, nobody may be left at work on the caller's tensors
            while len(failures) < count:
                failures.append(ended.get())
    for failure in failures:
        if failure is not None:
            raise failure


def _at_least(count: int) -> "_Threads":
    global _threads
    if _threads is None or _threads.count < count:
        _threads = _Threads(count)  # the last ones end when nobody refers to them
    return _threads


class _Threads:
    """`count` threads that run what is put into `tasks`, which must not raise."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.tasks: SimpleQueue[_Task | None] = SimpleQueue()
        begun = threading.Barrier(count + 1)
        threads = [
            threading.Thread(target=_serve, args=(self.tasks, begun), name=f"pss-operation-{i}", daemon=True)
            for i in range(count)
        ]
        intra_op = torch.get_num_threads()
        for thread in threads:
            thread.start()
        begun.wait()
        torch.set_num_threads(intra_op)  # what one of ours has set is also what threads started later would begin with
        weakref.finalize(self, _stop, self.tasks, threads)


def _serve(tasks: SimpleQueue[_Task | None], begun: threading.Barrier) -> None:
    torch.get_num_threads()  # torch sets up a thread at its first use; later, that would undo the next line
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    begun.wait()
    while (task := tasks.get()) is not None:
        task()
        del task  # and the tensors it holds


def _stop(tasks: SimpleQueue[_Task | None], threads: list[threading.Thread]) -> None:
    for _ in threads:
        tasks.put(None)
    for thread in threads:
        thread.join(5)


def _forget() -> None:
    global _threads, _lock
    _threads, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)  # a forked process has no threads but the one that forked
