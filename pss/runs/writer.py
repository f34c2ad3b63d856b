"""Checkpoints of a run, written in a thread while training goes on, into the folder that it began in and no other."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from pss.runs import checkpoint

_LOOK_SECONDS = 1.0
_log = logging.getLogger(__name__)


class Writer:
    """Saves checkpoints of one run in a thread, one at a time and in order, while training goes on."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        epoch_steps: int | None = None,
        continuation: int = 0,
        resume_step: int | None = None,
    ) -> None:
        """Only one writer may work in `folder`: what another left half-written is removed.

        Args:
            folder: where the checkpoints are, or will be; the run's folder is the one above.
            keep: how many of the newest stay.
            epoch_steps: the newest one of the end of an epoch of so many steps stays too.
            continuation: which one of the run this is.
            resume_step: where it begins; checkpoints behind it, of earlier continuations, are abandoned.
        """
        self.folder, self.keep, self.epoch_steps = folder, keep, epoch_steps
        self.continuation, self._resume_step = continuation, resume_step
        self._identity, self._looked = _identity(folder.parent), time.monotonic()
        # While it is open, no folder that is made in its place has its number.
        self._handle = os.open(folder.parent, os.O_RDONLY) if self._identity is not None else None
        for pattern in (".partial-*", ".pss-*.partial"):
            for partial in folder.glob(pattern):
                partial.unlink(missing_ok=True)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pss-checkpoint")
        self._written: Future[Any] | None = None

    def save(self, state: dict[str, Any], *, step: int) -> None:
        """Copy `state` to the host's memory and leave the rest to the thread; see `checkpoint.save`.

        Waits for the checkpoint before it, and raises what that one failed with.
        """
        self.wait()
        self._written = self._thread.submit(self._save, snapshot(state), step)

    def _save(self, state: dict[str, Any], step: int) -> None:
        with self._in_place():
            checkpoint.save(
                self.folder,
                state,
                step=step,
                keep=self.keep,
                epoch_steps=self.epoch_steps,
                continuation=self.continuation,
                resume_step=self._resume_step,
            )
        self._resume_step = None

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """`check_place` before and after: the folder may go away in the middle, and that is why writing fails."""
        self.check_place()
        try:
            yield
        except OSError:
            self.check_place()
            raise
        self.check_place()

    def note_best(self, *, step: int, score: float, weights: str) -> None:
        """Once it is written, hold the checkpoint of `step` against the best one so far; see `checkpoint.note_best`."""
        before = self._written

        def note() -> None:
            if before is not None:
                before.result()
            with self._in_place():
                checkpoint.note_best(
                    self.folder, step=step, continuation=self.continuation, score=score, weights=weights
                )

        self._written = self._thread.submit(note)

    def failed(self) -> bool:
        """Whether nothing can be saved any more; to be asked at every step."""
        if self._written is not None and self._written.done() and self._written.exception() is not None:
            return True
        if time.monotonic() - self._looked < _LOOK_SECONDS:  # a network's file system takes its time
            return False
        self._looked = time.monotonic()
        return _identity(self.folder.parent) != self._identity

    def check_place(self) -> None:
        """Raise `ValueError` where the folder is not the one it was."""
        run = self.folder.parent
        if _identity(run) != self._identity:
            raise ValueError(
                f"{run} was removed, renamed or replaced while the run was writing to it, so nothing more can be "
                "saved; put it back and go on with --resume"
            )

    def wait(self) -> None:
        """Until all is on the disk. Raises `OSError` or `ValueError` where it could not be written."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def close(self) -> None:
        """Let the thread finish and end; what it fails with is only logged, since something else ended the run."""
        try:
            self.wait()
        except (OSError, ValueError) as error:
            _log.warning("%s", error)
        finally:
            self._thread.shutdown()
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def snapshot(state: dict[str, Any]) -> dict[str, Any]:
    """`state` with copies on the CPU in place of its tensors."""
    copied: dict[str, Any] = tree_map_only(
        torch.Tensor, lambda tensor: tensor.detach().to("cpu", non_blocking=True, copy=True), state
    )
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return copied
