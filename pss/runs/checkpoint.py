"""Checkpoints that survive anything: atomic, self-verifying, read without unpickling code.

A checkpoint is one file, `step-<step>-<hash>.pt`, where `<hash>` begins the SHA-256 of its content: a file that was
cut short or damaged is recognised by its name alone, and the newest one that is whole is used. `best.json` names the
one of the best validation.

A run that other processes or another loader go on with may have to go back to the end of an epoch. It is then another
continuation, whose number is in the names from then on (`step-<step>-c<number>-<hash>.pt`): the newest checkpoint of
the newest continuation counts. What is behind it in the old one is moved to `abandoned/` once the new one has saved.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pss.runs import records
from pss.runtime.files import in_words

_NAME = re.compile(r"step-(?P<step>\d{9})(?:-c(?P<continuation>\d+))?-(?P<hash>[0-9a-f]{16})\.pt")
_BEST = "best.json"
ABANDONED = "abandoned"
_log = logging.getLogger(__name__)


def save(
    folder: Path,
    state: dict[str, Any],
    *,
    step: int,
    keep: int,
    epoch_steps: int | None = None,
    continuation: int = 0,
    resume_step: int | None = None,
) -> Path:
    """Write `state` durably, then abandon what is behind `resume_step` in earlier continuations, if that is given, and
    remove the checkpoints that need not be kept.

    Kept are the `keep` newest, the best one, and the newest one whose step is a multiple of `epoch_steps`. `state` may
    hold tensors, numbers, strings, None, and lists, tuples and dicts of these.

    Raises:
        OSError: it cannot be written; the message names the disk, and all earlier checkpoints are as they were.
    """
    assert_plain(state)
    partial = folder / f".partial-{os.getpid()}"
    try:
        folder.mkdir(exist_ok=True)  # a run's folder that is gone is not made anew
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        number = f"c{continuation}-" if continuation else ""
        path = folder / f"step-{step:09d}-{number}{_digest(partial)}.pt"
        partial.replace(path)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch.save wraps what the file raises
        partial.unlink(missing_ok=True)
        raise OSError(_cannot_write(folder, step, error)) from error
    if resume_step is not None:
        _abandon(folder, path, resume_step, keep=keep)
    _remove_old(folder, path, keep, epoch_steps)
    return path


def _cannot_write(folder: Path, step: int, error: Exception) -> str:
    reason = error
    while not isinstance(reason, OSError) and isinstance(cause := reason.__cause__ or reason.__context__, Exception):
        reason = cause
    what = reason.strerror or str(reason) if isinstance(reason, OSError) else str(reason)
    usage = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.is_dir()))
    earlier = list_checkpoints(folder)
    left = f"{earlier[0].name} is untouched" if earlier else "there is no earlier one"
    return (
        f"the checkpoint of step {step} cannot be written to {folder} ({what}; {usage.free / 1e9:.2f} of "
        f"{usage.total / 1e9:.2f} GB are free on that disk); {left}: make room and go on with --resume"
    )


def note_best(folder: Path, *, step: int, continuation: int, score: float, weights: str) -> None:
    """Note in `best.json` that a checkpoint was validated, unless one with as high a score is noted already.

    Args:
        folder: where the checkpoints are.
        step: of the checkpoint.
        continuation: the newest one that it may belong to.
        score: higher is better.
        weights: what scored so: `method`, the weights, or `ema`, their average.

    Raises:
        OSError: it cannot be written; the message names the disk.
    """
    noted = read_best(folder)
    if noted is not None and noted["score"] >= score:
        return
    of_step = [path for path in list_checkpoints(folder) if step_of(path) == step]
    path = next((path for path in of_step if continuation_of(path) <= continuation), None)
    if path is None:
        return
    try:
        records.write(folder / _BEST, {"file": path.name, "step": step, "score": score, "weights": weights})
        _sync_folder(folder)
    except OSError as error:
        raise OSError(
            f"{folder / _BEST} cannot be written ({in_words(error)}), which names the best checkpoint; make room and "
            "go on with --resume"
        ) from error


def read_best(folder: Path) -> records.Best | None:
    """What `best.json` says, if it is whole and the file it names is there. A damaged one is logged.

    Raises:
        ValueError: a later version wrote it.
    """
    path = folder / _BEST
    try:
        noted: records.Best = records.read(path, records.Best, remedy="the next validation writes it anew")
    except FileNotFoundError:
        return None
    except records.LaterVersion:
        raise
    except ValueError as error:
        _log.warning("%s", error)
        return None
    name = noted["file"]
    return noted if _NAME.fullmatch(name) and (folder / name).is_file() else None


def best(folder: Path) -> Path | None:
    """The checkpoint of the best validation in `folder`; None where none has been noted."""
    noted = read_best(folder)
    return None if noted is None else folder / noted["file"]


def _abandon(folder: Path, first: Path, resume_step: int, *, keep: int) -> None:
    """Move what earlier continuations than that of `first` saved after `resume_step` out of its way; the `keep` newest
    of all that was ever moved stay."""
    behind = [
        path
        for path in list_checkpoints(folder)
        if step_of(path) > resume_step and continuation_of(path) < continuation_of(first)
    ]
    noted = read_best(folder)
    if noted is not None and folder / noted["file"] in behind:
        (folder / _BEST).unlink()
    aside = folder / ABANDONED
    moved = []
    for path in behind:
        aside.mkdir(exist_ok=True)
        moved.append(path.replace(aside / path.name))
    for old in list_checkpoints(aside)[keep:]:
        old.unlink()
    if moved:
        _log.warning(
            "moved to %s, as the run went on from before them: %s", aside, ", ".join(path.name for path in moved)
        )


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
    """The checkpoints in `folder`, newest first, damaged ones included; those of a newer continuation are newer."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(named, key=lambda path: (continuation_of(path), step_of(path), _time_of(path)), reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.split("-")[1])


def continuation_of(path: Path) -> int:
    """The number of the continuation in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    return int(match["continuation"] or 0) if match is not None else 0


def _time_of(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # it is being removed
        return 0


def load(path: Path) -> dict[str, Any]:
    """Read one checkpoint on the CPU. Raises `ValueError` where it is damaged or no checkpoint."""
    match = _NAME.fullmatch(path.name)
    if match is not None and _digest(path) != match["hash"]:
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
    records.refuse_later(state, path)
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
