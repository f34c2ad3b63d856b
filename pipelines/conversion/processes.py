"""Work spread over processes so that a failure or Ctrl-C ends it at once and leaves nothing running."""

from __future__ import annotations

import multiprocessing.util
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Protocol, TypeVar

from pipelines.base import DataError, in_words

PATIENCE = 60.0
"""Seconds in which something must be done, unless somebody says otherwise."""

_LOOK_SECONDS = 0.2
_ENDING = (signal.SIGINT, signal.SIGTERM)
_LEAVE_SECONDS = 1.0
_LONGEST_FOLDER = 60  # bytes; a socket's name has at most 107, and multiprocessing adds 30

Task = TypeVar("Task")
Result = TypeVar("Result")


class Progress(Protocol):
    """Hears how a conversion is getting on."""

    def start(self, phase: str, total: int) -> None:
        """A phase of `total` images or files begins."""

    def advance(self, images: int) -> None:
        """So many more are done."""


class Kept(DataError):
    """An end after which what is finished stays, so that the same command continues."""


class Spoilt(DataError):
    """An end after which what is finished is of no use: it would be believed, and is not so."""


class WorkerLost(Kept):
    """A process died under its work, or stopped answering. What the others finished is good."""


def map_processes(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    jobs: int,
    on_result: Callable[[Result], None],
    patience: float = PATIENCE,
) -> list[Result]:
    """`[function(task) for task in tasks]`, `jobs` at a time; `on_result` hears of each as it is done.

    The processes come from a fork server: forked from here, they could inherit a lock that some thread holds. It has
    imported what they use, once for all of them. Whatever ends this, none of them is left.

    Raises:
        WorkerLost: one was killed, or in `patience` seconds none has called `beat`.
        DataError: the system has no place for what processes share.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "pipelines.conversion.convert"])
    _make_room_for_sockets()
    heard, beats = context.Pipe(duplex=False)
    try:
        pool = ProcessPoolExecutor(
            min(jobs, len(tasks)), mp_context=context, initializer=_prepare_worker, initargs=(beats, dict(os.environ))
        )
    except OSError as error:
        raise DataError(
            f"/dev/shm, where processes keep the locks that they share, cannot be used ({in_words(error)}); make room "
            "there, or mount it (containers have --shm-size)"
        ) from error
    finished = False
    try:
        with signals_later():
            futures = [pool.submit(function, task) for task in tasks]
        waiting, last = set(futures), time.monotonic()
        while waiting:
            done, waiting = wait(waiting, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                on_result(future.result())
            if done or _drained(heard):
                last = time.monotonic()
            elif time.monotonic() - last > patience:
                raise WorkerLost(
                    f"nothing has been done for {patience:g} s: a disk or a process of pss-convert does not answer; "
                    "the same command continues, and --patience SECONDS waits longer"
                )
        finished = True
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise WorkerLost(
            "a process of pss-convert was killed, perhaps for want of memory; the same command continues"
        ) from error
    finally:
        _end(pool, gently=finished)
        heard.close()
        beats.close()


@contextmanager
def signals_later() -> Iterator[None]:
    """Within, Ctrl-C and SIGTERM are kept for the end: they could leave a lock of the pool's behind, for which its own
    thread would then wait for ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _end(pool: ProcessPoolExecutor, *, gently: bool) -> None:
    """End the processes of a pool; gently, they get a moment to leave by themselves.

    The pool's own end waits for each of them, also for one that is stopped or waits for a disk, and so does the
    interpreter's exit: neither may be reached while one is left.
    """
    manager: threading.Thread | None = pool._executor_manager_thread  # type: ignore[assignment]  # typeshed errs
    workers = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    if manager is None:
        return  # nothing was started
    try:
        if gently:
            manager.join(_LEAVE_SECONDS)
    finally:
        for process in workers:
            process.kill()  # one that does not answer would not hear anything else
        manager.join(_LEAVE_SECONDS)
        if manager.is_alive():  # what should report their end does not answer itself, or one cannot die yet
            server = vars(forkserver._forkserver)["_forkserver_pid"]
            os.kill(server, signal.SIGKILL)  # the next pool starts another
            manager.join()


def check_patience(seconds: float) -> None:
    """Raise `ValueError` for a patience that is none."""
    if not 1 <= seconds <= 86400:
        raise ValueError(f"--patience is {seconds:g}; it must lie in 1 ... 86400 seconds")


def beat() -> None:
    """Say that this process gets on: to be called for every image that is done, and while a long file is read."""
    if _beats is not None:
        with suppress(OSError):  # a full pipe has not been looked at yet, and says the same
            os.write(_beats.fileno(), b".")


_beats: Connection | None = None


def _drained(heard: Connection) -> bool:
    """Whether some process has called `beat` since the last time."""
    found = False
    while heard.poll():
        found = bool(os.read(heard.fileno(), 1 << 16)) or found
    return found


def _make_room_for_sockets() -> None:
    """Have multiprocessing keep its socket in a folder whose name is short enough, whatever TMPDIR says."""
    if len(os.fsencode(tempfile.gettempdir())) <= _LONGEST_FOLDER:
        return
    for folder in ("/tmp", "/var/tmp", "/dev/shm"):  # mkdtemp makes a private one in it
        if os.access(folder, os.W_OK | os.X_OK):
            before, tempfile.tempdir = tempfile.tempdir, folder
            try:
                multiprocessing.util.get_temp_dir()  # which it keeps from now on
            finally:
                tempfile.tempdir = before
            return
    raise DataError(
        f"the folder that TMPDIR names has a path of {len(tempfile.gettempdir())} characters, too long for a socket in "
        "it; set TMPDIR to a shorter one"
    )


def _prepare_worker(beats: Connection, environment: Mapping[str, str]) -> None:
    global _beats
    os.environ.clear()  # the fork server has that of its start, and stores take their settings from it
    os.environ.update(environment)
    os.set_blocking(beats.fileno(), False)
    _beats = beats
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
