"""Runs of pss-train that take turns, so that whatever else the machine does falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pss.runs.log import read_rows
from tools.demo import command


@dataclass(frozen=True)
class Training:
    """One run of pss-train."""

    folder: Path
    recipe: str
    settings: tuple[str, ...]
    """As after `--set`, without epochs and steps."""
    epochs: int
    after: Path | None = None
    """A run that has to be over first, as this one starts from its weights."""

    @property
    def name(self) -> str:
        return self.folder.name

    def rows(self) -> list[dict[str, Any]]:
        """What its log says of every epoch so far."""
        return read_rows(self.folder, "epoch") if (self.folder / "log.jsonl").exists() else []

    def whole_epochs(self, steps: int) -> dict[int, float]:
        """Seconds of training by epoch, of those that one process trained from beginning to end."""
        whole = [row for row in self.rows() if sum(level["steps"] for level in row["by_rho"].values()) == steps]
        return {row["epoch"]: row["train_seconds"] for row in whole}

    def train(self, target: int, data: Path, loader: str, steps_per_epoch: int) -> None:
        """Go on up to the end of epoch `target`."""
        settings = (*self.settings, f"train.epochs={self.epochs}", f"train.max_steps={target * steps_per_epoch}")
        options = [word for setting in settings for word in ("--set", setting)]
        where = ["--data", str(data), "--output", str(self.folder), "--loader", loader]
        command("train", self.recipe, *where, "--resume", *options)


def take_turns(
    runs: Sequence[Training], turn: int, *, data: Path, loader: str, steps_per_epoch: int, what: str = "all runs"
) -> None:
    """Train `runs` to their ends, each `turn` epochs at a time, in an order that is reversed every time.

    A run whose `after` is not over yet passes. Runs are resumed to the bit, so that turns change nothing that is
    learnt, and what was stopped goes on here.
    """
    by_folder = {run.folder: run for run in runs}
    done = {run.folder: len(run.rows()) for run in runs}
    total, first, began = sum(run.epochs for run in runs), sum(done.values()), time.monotonic()
    number = 0

    def is_over(folder: Path | None) -> bool:
        return folder is None or folder not in by_folder or done[folder] >= by_folder[folder].epochs

    while waiting := [run for run in runs if not is_over(run.folder)]:
        ready = [run for run in waiting if is_over(run.after)]
        for run in ready if number % 2 else ready[::-1]:
            target = min(run.epochs, (done[run.folder] // turn + 1) * turn)
            run.train(target, data, loader, steps_per_epoch)
            done[run.folder] = target
            now, passed = sum(done.values()), time.monotonic() - began
            left = passed / max(1, now - first) * (total - now)
            print(
                f"\n{what}: {now:,} of {total:,} epochs; {passed / 60:.0f} min, about {left / 60:.0f} to go",
                flush=True,
            )
        number += 1
