"""Checkpoints that survive anything: atomic, self-verifying, read without unpickling code.

A checkpoint is one file, `step-<step>-<hash>.pt`, where `<hash>` begins the SHA-256 of its content: a file that was
cut short or damaged is recognised by its name alone, and the newest one that is whole is used.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.pt")


def save(folder: Path, state: dict[str, Any], *, step: int, keep: int) -> Path:
    """Write `state` durably, then remove all but the `keep` newest checkpoints.

    `state` may hold tensors, numbers, strings, None, and lists, tuples and dicts of these.
    """
    assert_plain(state)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".partial-{os.getpid()}"
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        path = folder / f"step-{step:09d}-{_digest(partial)}.pt"
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(folder)
    for old in list_checkpoints(folder)[keep:]:
        if old != path:
            old.unlink()
    return path


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
    return sorted(named, key=lambda path: (path.name.split("-")[1], path.stat().st_mtime_ns), reverse=True)


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
        raise ValueError(f"{path} cannot be read as a checkpoint ({error})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is no checkpoint of a pss run")
    return state


def load_latest(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The newest whole checkpoint in `folder`, or None; warns about each damaged one that was passed over."""
    for path in list_checkpoints(folder):
        try:
            return load(path), path
        except ValueError as error:
            warnings.warn(f"{error}; trying the one before it", stacklevel=2)
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
