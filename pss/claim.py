"""A run's folder belongs to one run at a time: two that wrote into it would destroy each other's checkpoints."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pss.dist import World

_LOCK = ".lock"


@contextmanager
def claim(folder: Path, world: World) -> Iterator[None]:
    """Hold `folder`, which exists, for the processes of `world`; every one of them must call it.

    The system lets go of it when the main process ends, however it ends, so there is never a claim to clean up. On a
    file system without locks nothing is held.

    Raises:
        ValueError: another run holds it; on every process.
    """
    held, refusal = _hold(folder) if world.is_main else (None, None)
    try:
        refusal = world.broadcast(refusal)
        if refusal is not None:
            raise ValueError(refusal)
        yield
    finally:
        if held is not None:
            held.close()


def _hold(folder: Path) -> tuple[IO[str] | None, str | None]:
    """The locked file, or why there is none."""
    file = (folder / _LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "a process that does not say which"
        file.close()
        return None, f"{folder} is in use by a run ({holder}); wait for it, stop it, or choose another --output"
    except OSError:
        file.close()
        return None, None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file, None
