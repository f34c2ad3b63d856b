"""Sums over the steps of a run: what was learnt, how fast, and how long was waited for data."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pss.methods import Stage
from pss.runtime.processes import World


class Meter:
    """Sums over the steps since the last `reset`: images, loss, time, and how much of it went to waiting for data."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.reset()

    def reset(self) -> None:
        self.steps = 0
        self._images = 0
        self._macs = 0
        self._wait_seconds = 0.0
        self._by_stage: dict[Stage, _Level] = {}
        # Kept on the device: reading it would make the host wait for every step.
        self._measured = torch.zeros(3, device=self._world.device)
        self._carried_seconds = 0.0
        self._began = self._last = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """All sums, for a checkpoint, of all processes (each must call this). Reads from the device."""
        per_rank = self._measured.new_zeros(self._world.size, 4, dtype=torch.float64)
        per_rank[self._world.rank, :3] = self._measured
        per_rank[self._world.rank, 3] = self._wait_seconds
        return {
            "steps": self.steps,
            "images": self._images,
            "macs": self._macs,
            "seconds": self.seconds,
            "per_rank": self._world.sum(per_rank).tolist(),
            "levels": [
                [stage.rho, stage.name, level.macs, level.steps, level.seconds, level.wait_seconds]
                for stage, level in self._by_stage.items()
            ],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on with the sums of a checkpoint that as many processes wrote; the clock goes on from now."""
        self.reset()
        self.steps, self._images, self._macs = state["steps"], state["images"], state["macs"]
        self._carried_seconds = state["seconds"]
        *measured, self._wait_seconds = state["per_rank"][self._world.rank]
        self._measured.copy_(torch.tensor(measured, dtype=torch.float64))
        self._by_stage = {
            Stage(rho, name): _Level(macs, steps, seconds, wait)
            for rho, name, macs, steps, seconds, wait in state["levels"]
        }

    def start(self) -> None:
        """Start the clock now, after those seconds that `load_state` brought."""
        self._began = self._last = time.perf_counter()

    def add(self, images: int, measured: Tensor, wait_seconds: float, stage: Stage, macs: int) -> None:
        """Count one step of this process.

        Args:
            images: how many it saw.
            measured: loss, gradient norm and 1, or zeros where the step was skipped; see `pss.training.guard`.
            wait_seconds: how long it waited for its batch.
            stage: what it has in common with others.
            macs: of one image, forward and backward.
        """
        now = time.perf_counter()
        level = self._by_stage.get(stage)
        if level is None:
            level = self._by_stage[stage] = _Level(macs)
        level.steps += 1
        level.seconds += now - self._last
        level.wait_seconds += wait_seconds
        self._last = now
        self.steps += 1
        self._images += images
        self._macs += images * macs
        self._wait_seconds += wait_seconds
        self._measured += measured

    @property
    def seconds(self) -> float:
        """Since the last `reset`, with those before a checkpoint."""
        return self._carried_seconds + time.perf_counter() - self._began

    def summary(self) -> dict[str, float]:
        """Over all processes (each must call this): mean loss and gradient norm, images per second, share of time
        waiting for data. Means are NaN where all steps were skipped. Where the device's peak is known, also `mfu`:
        the arithmetic done over what the device could do.
        """
        seconds, size = max(self.seconds, 1e-9), self._world.size
        sums = torch.cat((self._measured, self._measured.new_tensor([self._wait_seconds])))
        loss, norm, good, wait = (self._world.sum(sums) / size).tolist()
        row = {
            "loss": loss / good if good else math.nan,
            "images_per_second": self._images * size / seconds,
            "data_wait": wait / seconds,
            "grad_norm": norm / good if good else math.nan,
        }
        peak = peak_tflops(self._world.device)
        if peak is not None:
            row["mfu"] = 2 * self._macs / seconds / (1e12 * peak)
        return row

    def by_stage(self) -> dict[str, dict[str, float]]:
        """Of this process, for each stage: steps, milliseconds a step, and the share that was waiting for data.

        A step lasts from the end of the one before, so on a GPU, which runs behind the host, only averages mean much.
        """
        return {
            str(stage): {
                "steps": level.steps,
                "ms_per_step": 1e3 * level.seconds / level.steps,
                "data_wait": level.wait_seconds / max(level.seconds, 1e-9),
            }
            for stage, level in sorted(self._by_stage.items())
        }

    def saving(self) -> dict[str, float]:
        """What the schedule saved of this process's time and of its arithmetic, against its steps at rho = 1.

        `saved_time` and `saved_macs` are shares of what all steps would have taken at rho = 1, and `saved_share` is
        the first over the second: 1 is all that the arithmetic allows. Empty where no step was at rho = 1, or they
        cost no less in all.
        """
        if Stage() not in self._by_stage or len(self._by_stage) == 1:
            return {}
        levels, dense = self._by_stage.values(), self._by_stage[Stage()]
        macs_share = sum(level.steps * level.macs for level in levels) / (self.steps * dense.macs)
        if macs_share == 1:  # as many tokens at each rho
            return {}
        time_share = sum(level.seconds for level in levels) / (self.steps * dense.seconds / dense.steps)
        return {
            "saved_time": 1 - time_share,
            "saved_macs": 1 - macs_share,
            "saved_share": (1 - time_share) / (1 - macs_share),
        }


@dataclass
class _Level:
    """What a `Meter` sums for one stage."""

    macs: int
    steps: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0


_PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}


def peak_tflops(device: torch.device) -> float | None:
    """What a GPU can do in bfloat16, dense, by its data sheet; None for what is not in the table, and for a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_TFLOPS.items() if part in name), None)
