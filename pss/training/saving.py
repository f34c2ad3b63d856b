"""Checkpoints of a run: which one it goes on from, what is in one, and when one is due."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3

from pipelines.base import DataError, Loader
from pss.config import Config, check_same_run
from pss.methods import Method
from pss.runs import checkpoint, records
from pss.runs.lock import CHECKPOINTS
from pss.runs.writer import Writer
from pss.runtime.processes import World
from pss.training.guard import Guard
from pss.training.sharding import gather


class Saver:
    """Reads and writes the checkpoints of one run. Every process has one; the main one writes."""

    def __init__(
        self, config: Config, output: Path, *, classes: list[str], loader: Loader, world: World, sharded: bool
    ) -> None:
        """Args:
        config: Of the run.
        output: Its folder.
        classes: Names of the classes.
        loader: Of the training images.
        world: The processes.
        sharded: Whether tensors are shards, which all processes gather together.
        """
        self.config, self.output, self.classes = config, output, classes
        self.loader, self.world, self.sharded = loader, world, sharded
        self.moved: str | None = None
        """Why a resumed run goes on from the end of an epoch, where its newest checkpoint is from the middle of one."""
        self.continuation = 0
        """How often the run has gone back to the end of an epoch."""
        self._resume_step: int | None = None
        self._writer: Writer | None = None
        self._last = time.monotonic()
        self._asked = False

    @property
    def _folder(self) -> Path:
        return self.output / CHECKPOINTS

    def open(self) -> None:
        """Begin to write, on the main process."""
        if self.world.is_main:
            self._writer = Writer(
                self._folder,
                keep=self.config.train.keep_checkpoints,
                epoch_steps=self.loader.steps_per_epoch,
                continuation=self.continuation,
                resume_step=self._resume_step,
            )

    def failed(self) -> bool:
        """Whether nothing can be saved any more; the main process knows."""
        return self._writer is not None and self._writer.failed()

    def raise_failure(self) -> None:
        """Raise what `failed` says that there is."""
        if self._writer is not None:
            self._writer.wait()
            self._writer.check_place()
        raise ValueError(f"the main process cannot save to {self.output} any more; see what it says of it")

    def wait(self) -> None:
        """Until what was saved is on the disk. Raises `OSError` where it could not be written."""
        if self._writer is not None:
            self._writer.wait()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def find(self) -> records.Checkpoint | None:
        """The state to go on from; None for a new run.

        It is the newest whole checkpoint of the newest continuation, or, where other processes or another loader go
        on, the newest of the end of an epoch; then this is another continuation.

        Raises:
            ValueError: it belongs to a run with other settings, or to a later version, or all are damaged.
        """
        state = self._load(lambda step: True)
        if state is None:
            return None
        self.continuation, self._resume_step = state.get("continuation", 0), state["step"]
        own = {
            "processes": self.world.size,
            "parts": self.config.train.accumulate,
            "parallel": self.config.train.parallel,
            "loader": self.loader.state_dict().get("backend"),
        }
        theirs = {
            "processes": state["world_size"],
            "parts": state["config"]["train"]["accumulate"],
            "parallel": state["config"]["train"].get("parallel", "ddp"),
            "loader": state["loader"].get("backend"),
        }
        epoch_steps = self.loader.steps_per_epoch
        if own == theirs or state["step"] % epoch_steps == 0:
            return state
        earlier = self._load(lambda step: step % epoch_steps == 0)
        self.continuation += 1
        self._resume_step = 0 if earlier is None else earlier["step"]
        changed = ", ".join(
            f"{name} {theirs[name]} before and {own[name]} now" for name in own if own[name] != theirs[name]
        )
        self.moved = (
            f"{changed}: the run goes on from the end of an epoch, step {self._resume_step}, and not from step "
            f"{state['step']}"
        )
        return earlier

    def _load(self, usable: Callable[[int], bool]) -> records.Checkpoint | None:
        found = checkpoint.load_latest(self._folder, usable)
        if found is None:
            return None
        state, path = found
        remedy = "restore it, or remove it to go on from an earlier one"
        checked: records.Checkpoint = records.check(state, records.Checkpoint, path, remedy=remedy)
        check_same_run(checked["config"], self.config, path)
        return checked

    def restore(self, saved: records.Checkpoint, method: Method, ema: ModelEmaV3 | None, guard: Guard) -> None:
        """Put a state back into the run's parts.

        Raises:
            DataError: the run was begun on other data.
            ValueError: a teacher has other weights than it had.
        """
        if saved["classes"] != self.classes:
            raise DataError(
                f"the run in {self.output} was trained on {len(saved['classes'])} classes "
                f"and the data has {len(self.classes)}, or other ones; resume with the data it began with"
            )
        known = saved.get("teachers", {})
        for name, teacher in method.teachers.items():
            if known.get(name) != teacher.digest:
                raise ValueError(
                    f"the {name} {teacher.source} does not hold the weights that the run in {self.output} began with; "
                    "put those back, or begin a new run"
                )
        loader = saved["loader"]
        if "backend" in loader:
            loader = loader | {"backend": self.loader.backend}
        self.loader.load_state_dict(loader)
        try:
            method.load_state_dict(saved["method"])
            if ema is not None:
                ema.module.load_state_dict(saved["ema"] or {})
            guard.counts.copy_(saved["skipped"])
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"the checkpoint of step {saved['step']} in {self._folder} does not hold the model that its settings "
                f"describe ({str(error).strip().splitlines()[-1].strip()}); it was edited: restore it, or remove it"
            ) from error

    def is_due(self) -> bool:
        """Whether to ask for a checkpoint. All processes write it together, so the main one asks, once."""
        due = time.monotonic() - self._last > 60 * self.config.train.checkpoint_every_minutes
        if not due or self._asked or not self.world.is_main:
            return False
        self._asked = True
        return True

    def save(
        self,
        *,
        step: int,
        epoch: int,
        phase: int,
        method: Method,
        ema: ModelEmaV3 | None,
        optimizer: torch.optim.Optimizer,
        guard: Guard,
        measured: dict[str, Any],
    ) -> None:
        """Write a checkpoint of this step. Every process must call it."""
        tensors = {}
        if self._writer is not None or self.sharded:
            tensors = {
                "method": method.state_dict(),
                "ema": None if ema is None else ema.module.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
        if self.sharded:
            tensors = gather(tensors, self.world)
        if self._writer is not None:
            state = {
                **records.STAMP,
                "config": self.config.to_dict(),
                "classes": self.classes,
                "step": step,
                "epoch": epoch,
                "phase": phase,
                "world_size": self.world.size,
                "continuation": self.continuation,
                "loader": self.loader.state_dict(),
                "skipped": guard.counts,
                "teachers": {name: teacher.digest for name, teacher in method.teachers.items()},
                "measured": measured,
                **tensors,
            }
            self._writer.save(state, step=step)
        self._last = time.monotonic()
        self._asked = False

    def note_best(self, *, step: int, score: float, weights: str) -> None:
        """Hold the checkpoint of `step` against the best one so far; see `checkpoint.note_best`."""
        if self._writer is not None:
            self._writer.note_best(step=step, score=score, weights=weights)
