"""A run's folder belongs to one run at a time: two that wrote into it would destroy each other's checkpoints."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from pss.runs.board import PATTERN
from pss.runs.log import AUGMENTED, BOARD, LOG, read_rows
from pss.runs.loggers import STATE
from pss.runtime.files import in_words
from pss.runtime.processes import World

CONFIG = "config.json"
SUMMARY = "summary.json"
BUDGET = "budget.json"
CHECKPOINTS = "checkpoints"
CURVES = "curves.png"

LOCK = ".lock"
_PATIENCE_SECONDS = 5.0  # a run that was asked to stop may still be writing its last checkpoint


@contextmanager
def claim(
    folder: Path,
    world: World,
    admit: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[None]:
    """Hold `folder` for the processes of `world`, and make it if it is not there; every one of them must call it.

    The system lets go of it when the main process ends, however it ends. On a file system without locks nothing is
    held. Where not one step was trained, what was written here is removed again, and the folder if it was made here and
    nobody else has put anything into it.

    Args:
        folder: Of the run.
        world: Who wants it.
        admit: Called on the main process once it holds the folder: whether what is in it may be gone on with.
        say: Is told that another run is waited for.

    Raises:
        ValueError: another run holds it, it cannot be made, or `admit` raised one; on every process.
    """
    held, made, refusal, before = None, list[Path](), None, set[Path]()
    try:
        if world.is_main:
            try:
                made = _make(folder)
                before = set(folder.iterdir())
                held = _hold(folder, say)
                admit()
            except ValueError as error:
                refusal = str(error)
            except OSError as error:
                refusal = f"{folder} cannot be used as --output ({in_words(error)}); choose another folder"
        refusal = world.broadcast(refusal)
        if refusal is not None:
            raise ValueError(refusal)
        yield
    finally:
        if held is not None:
            _clean(folder, before)
            held.close()
        with suppress(OSError):
            for path in made:
                path.rmdir()  # not where anybody has left something in it


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it; which ones there were not, the innermost first."""
    missing = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        missing.append(path)
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _clean(folder: Path, before: set[Path]) -> None:
    """Remove what a run has written that never trained a step. A log with steps stays, as it may tell why the run
    failed, and so does whatever somebody else wrote."""
    checkpoints = folder / CHECKPOINTS
    if (checkpoints.is_dir() and any(checkpoints.iterdir())) or any(row["kind"] == "step" for row in read_rows(folder)):
        return
    with suppress(OSError):
        for path in {folder / name for name in (CONFIG, SUMMARY, BUDGET, LOG, LOCK, AUGMENTED, STATE)} - before:
            path.unlink(missing_ok=True)
        if folder / BOARD not in before:
            for path in (folder / BOARD).glob(PATTERN):
                path.unlink()
        for path in (folder / BOARD, checkpoints):
            if path not in before and path.is_dir():
                path.rmdir()


def _hold(folder: Path, say: Callable[[str], None]) -> IO[str] | None:
    """The locked file; None where the file system has no locks. Raises `ValueError` where another run has it."""
    deadline, told = time.monotonic() + _PATIENCE_SECONDS, False
    while True:
        try:
            file = (folder / LOCK).open("a+", encoding="utf-8")
        except FileNotFoundError:
            raise ValueError(f"{folder} was removed by somebody else just now; start again") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "a process that does not say which"
            file.close()
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{folder} is in use by a run ({holder}); wait for it, stop it, or choose another --output"
                ) from None
            if not told:
                say(f"waiting for the run in {folder} ({holder}) to end")
                told = True
            time.sleep(0.1)
            continue
        except OSError:
            file.close()
            return None
        if _is_at(file, folder / LOCK):
            break
        file.close()  # the run before removed its lock with its folder, or its first file; this is another one's
    with suppress(OSError):  # it is held, whether or not there is room to say by whom
        os.truncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    return file


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False
