"""Checkpoints that survive anything: atomic, self-verifying, read without unpickling code.

A checkpoint is one file, `step-<step>-<hash>.pt`, where `<hash>` begins the SHA-256 of its content: a file that was
cut short or damaged is recognised by its name alone, and the newest one that is whole is used. `best.json` names the
one of the best validation.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from pss.runtime.files import in_words

_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.pt")
_BEST = "best.json"
_log = logging.getLogger(__name__)


class Writer:
    """Saves checkpoints of one run in a thread, one at a time and in order, while training goes on."""

    def __init__(self, folder: Path, *, keep: int, epoch_steps: int | None = None) -> None:
        """Only one writer may work in `folder`: what another left half-written is removed.

        Args:
            folder: where the checkpoints are.
            keep: how many of the newest stay.
            epoch_steps: the newest one of the end of an epoch of so many steps stays too.
        """
        self.folder, self.keep, self.epoch_steps = folder, keep, epoch_steps
        for partial in folder.glob(".partial-*"):
            partial.unlink(missing_ok=True)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pss-checkpoint")
        self._written: Future[Path] | None = None

    def save(self, state: dict[str, Any], *, step: int, score: float | None = None) -> None:
        """Copy `state` to the host's memory and leave the rest to the thread; see the function `save`.

        Waits for the checkpoint before it, and raises what that one failed with.
        """
        self.wait()
        copied = snapshot(state)
        self._written = self._thread.submit(
            save, self.folder, copied, step=step, keep=self.keep, epoch_steps=self.epoch_steps, score=score
        )

    def wait(self) -> None:
        """Until all is on the disk. Raises `OSError` where it could not be written."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def close(self) -> None:
        """Let the thread finish and end; what it fails with is only logged, since something else ended the run."""
        try:
            self.wait()
        except OSError as error:
            _log.warning("%s", error)
        finally:
            self._thread.shutdown()


def snapshot(state: dict[str, Any]) -> dict[str, Any]:
    """`state` with copies on the CPU in place of its tensors."""
    copied: dict[str, Any] = tree_map_only(
        torch.Tensor, lambda tensor: tensor.detach().to("cpu", non_blocking=True, copy=True), state
    )
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return copied


def save(
    folder: Path,
    state: dict[str, Any],
    *,
    step: int,
    keep: int,
    epoch_steps: int | None = None,
    score: float | None = None,
) -> Path:
    """Write `state` durably, then remove the checkpoints that need not be kept.

    Kept are the `keep` newest, the one of the best `score`, and the newest one whose step is a multiple of
    `epoch_steps`. `state` may hold tensors, numbers, strings, None, and lists, tuples and dicts of these.

    Raises:
        OSError: it cannot be written; the message names the disk, and all earlier checkpoints are as they were.
    """
    assert_plain(state)
    partial = folder / f".partial-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        path = folder / f"step-{step:09d}-{_digest(partial)}.pt"
        partial.replace(path)
        _sync_folder(folder)
        if score is not None:
            _note_best(path, step, score)
    except (OSError, RuntimeError) as error:  # torch.save wraps what the file raises
        partial.unlink(missing_ok=True)
        raise OSError(_cannot_write(folder, step, error)) from error
    _remove_old(folder, path, keep, epoch_steps)
    return path


def _cannot_write(folder: Path, step: int, error: Exception) -> str:
    reason = error
    while not isinstance(reason, OSError) and isinstance(cause := reason.__cause__ or reason.__context__, Exception):
        reason = cause
    what = reason.strerror or str(reason) if isinstance(reason, OSError) else str(reason)
    usage = shutil.disk_usage(folder if folder.is_dir() else folder.parent)
    earlier = list_checkpoints(folder)
    left = f"{earlier[0].name} is untouched" if earlier else "there is no earlier one"
    return (
        f"the checkpoint of step {step} cannot be written to {folder} ({what}; {usage.free / 1e9:.2f} of "
        f"{usage.total / 1e9:.2f} GB are free on that disk); {left}: make room and go on with --resume"
    )


def _note_best(path: Path, step: int, score: float) -> None:
    noted = _read_best(path.parent)
    if noted is not None and noted["score"] >= score:
        return
    partial = path.parent / f".partial-best-{os.getpid()}"
    with partial.open("w", encoding="utf-8") as file:
        json.dump({"file": path.name, "step": step, "score": score}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path.parent / _BEST)
    _sync_folder(path.parent)


def _read_best(folder: Path) -> dict[str, Any] | None:
    """What `best.json` says, if the file it names is there."""
    try:
        noted: dict[str, Any] = json.loads((folder / _BEST).read_text(encoding="utf-8"))
        return noted if (folder / noted["file"]).is_file() and noted["score"] is not None else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def best(folder: Path) -> Path | None:
    """The checkpoint of the best validation in `folder`; None where none has been noted."""
    noted = _read_best(folder)
    return None if noted is None else folder / noted["file"]


def _remove_old(folder: Path, newest: Path, keep: int, epoch_steps: int | None) -> None:
    listed = list_checkpoints(folder)
    kept = {newest, best(folder), *listed[:keep]}
    if epoch_steps is not None:
        kept |= set([path for path in listed if step_of(path) % epoch_steps == 0][:1])
    for old in listed:
        if old not in kept:
            old.unlink()


def assert_plain(value: Any, where: str = "state") -> None:
    """A checkpoint that holds anything else could be written but never read again, so this is checked on writing."""
    if isinstance(value, dict):
        for key, inner in value.items():
            assert type(key) in (str, int), f"{where} has a key of {type(key)}"
            assert_plain(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            assert_plain(inner, f"{where}[{number}]")
    else:
        plain = type(value) in (int, float, str, bool, type(None)) or isinstance(value, torch.Tensor)
        assert plain, f"{where} is a {type(value)}"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest step first, damaged ones included."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(named, key=lambda path: (step_of(path), path.stat().st_mtime_ns), reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.split("-")[1])


def load(path: Path) -> dict[str, Any]:
    """Read one checkpoint on the CPU. Raises `ValueError` where it is damaged or no checkpoint."""
    match = _NAME.fullmatch(path.name)
    if match is not None and _digest(path) != match[2]:
        raise ValueError(f"{path} is damaged: its content does not match the hash in its name")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it holds more than tensors and plain values"
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint ({in_words(error)}); name another one") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is no checkpoint of a pss run; name another one")
    return state


def load_latest(folder: Path, usable: Callable[[int], bool] = lambda step: True) -> tuple[dict[str, Any], Path] | None:
    """The newest whole checkpoint in `folder`, or None where there is none; logs each damaged one it passed over.

    Args:
        folder: where the checkpoints are.
        usable: which steps to consider.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    damaged: list[str] = []
    for path in list_checkpoints(folder):
        if not usable(step_of(path)):
            continue
        try:
            state = load(path)
        except ValueError as error:
            damaged.append(str(error))
            continue
        for sentence in damaged:
            _log.warning("%s; %s is used in its place", sentence, path.name)
        return state, path
    if damaged:
        raise ValueError(f"{'; '.join(damaged)}; there is no other: restore one, or remove them to start anew")
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
