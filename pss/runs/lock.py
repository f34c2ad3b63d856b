"""A run's folder belongs to one run at a time: two that wrote into it would destroy each other's checkpoints."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pss.runs.checkpoint import list_checkpoints
from pss.runtime.processes import World

_LOCK = ".lock"
_PATIENCE_SECONDS = 5.0  # a run that was asked to stop may still be writing its last checkpoint


@contextmanager
def claim(folder: Path, world: World, admit: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold `folder` for the processes of `world`, and make it if it is not there; every one of them must call it.

    The system lets go of it when the main process ends, however it ends. On a file system without locks nothing is
    held. A folder that was made here is removed again if it holds no checkpoint at the end: there is nothing in it to
    go on from.

    Args:
        folder: Of the run.
        world: Who wants it.
        admit: Called on the main process once it holds the folder: whether what is in it may be gone on with.

    Raises:
        ValueError: another run holds it, it cannot be made, or `admit` raised one; on every process.
    """
    held, made, refusal = None, False, None
    try:
        if world.is_main:
            try:
                made = _make(folder)
                held = _hold(folder)
                admit()
            except (ValueError, OSError) as error:
                refusal = str(error)
        refusal = world.broadcast(refusal)
        if refusal is not None:
            raise ValueError(refusal)
        yield
    finally:
        if made and not list_checkpoints(folder / "checkpoints"):
            shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            held.close()


def _make(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def _hold(folder: Path) -> IO[str] | None:
    """The locked file; None where the file system has no locks. Raises `ValueError` where another run has it."""
    file = (folder / _LOCK).open("a+", encoding="utf-8")
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            file.seek(0)
            holder = file.read().strip() or "a process that does not say which"
            file.close()
            raise ValueError(
                f"{folder} is in use by a run ({holder}); wait for it, stop it, or choose another --output"
            ) from None
        except OSError:
            file.close()
            return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file
