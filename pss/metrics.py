"""What a run writes down: `log.jsonl` (one JSON object a line) and TensorBoard events; and the meter behind it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from pss.dist import World


class RunLog:
    """Appends rows to `log.jsonl` and TensorBoard. A resumed run first drops what came after its checkpoint."""

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        self._path = folder / "log.jsonl"
        if self._path.exists():
            _drop_rows_after(self._path, resume_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step or None)

    def write(self, kind: str, step: int, **values: Any) -> None:
        row = {"kind": kind, "step": step, **values}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_rows(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of a run's `log.jsonl`, all or of one kind."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if kind in (None, row["kind"])]


def _drop_rows_after(path: Path, step: int) -> None:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that was being written when the run was killed
        if row["step"] <= step:
            kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)
    os.sync()


class Meter:
    """Sums over the steps since the last `reset`: images, loss, time, and how much of it went to waiting for data."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.reset()

    def reset(self) -> None:
        self.steps = 0
        self._images = 0
        self._wait_seconds = 0.0
        self._by_rho: dict[float, list[float]] = {}  # rho -> steps, seconds, seconds of them spent waiting
        # Kept on the device: reading it would make the host wait for every step.
        self._loss = torch.zeros((), device=self._world.device)
        self._began = self._last = time.perf_counter()

    def add(self, images: int, loss: Tensor, wait_seconds: float, rho: float) -> None:
        """Count one step of this process: its images, its loss, how long it waited for its batch, and its rho."""
        now = time.perf_counter()
        level = self._by_rho.setdefault(rho, [0, 0.0, 0.0])
        for number, value in enumerate((1, now - self._last, wait_seconds)):
            level[number] += value
        self._last = now
        self.steps += 1
        self._images += images
        self._wait_seconds += wait_seconds
        self._loss += loss.detach()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def summary(self) -> dict[str, float]:
        """Over all processes (each must call this): mean loss, images per second, share of time waiting for data."""
        seconds, size = max(self.seconds, 1e-9), self._world.size
        means = torch.stack([self._loss, self._loss.new_tensor(self._wait_seconds)])
        loss, wait = (self._world.sum(means) / size).tolist()
        return {
            "loss": loss / max(self.steps, 1),
            "images_per_second": self._images * size / seconds,
            "data_wait": wait / seconds,
        }

    def by_rho(self) -> dict[str, dict[str, float]]:
        """Of this process, for each rho: how many steps, milliseconds a step, and the share that was waiting for data.

        A step lasts from the end of the one before, so on a GPU, which runs behind the host, only averages mean much.
        """
        return {
            f"{rho:g}": {"steps": steps, "ms_per_step": 1e3 * seconds / steps, "data_wait": wait / max(seconds, 1e-9)}
            for rho, (steps, seconds, wait) in sorted(self._by_rho.items())
        }
