"""Runs of pss-train that take turns, so that whatever else the machine does falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pss.runs.log import read_rows


@dataclass(frozen=True)
class Run:
    """One run of pss-train, in a folder of its own."""

    folder: Path
    epochs: int
    settings: tuple[str, ...]
    """What `--set` is given, the number of epochs included."""
    needs: Run | None = None
    """The run whose weights it starts from; it has its first turn once that one is done."""

    @property
    def name(self) -> str:
        """As tables and pictures call it."""
        return self.folder.name

    @property
    def offset(self) -> int:
        """Epochs before its first one, of the runs that it starts from."""
        return 0 if self.needs is None else self.needs.offset + self.needs.epochs

    def rows(self) -> list[dict[str, Any]]:
        """What its log says of every whole epoch so far.

        A run that was stopped inside an epoch has a row of that part as well; only rows of whole epochs count.
        """
        return [row for row in read_rows(self.folder, "epoch") if row.get("complete", True)]

    def done(self) -> int:
        """Whole epochs so far."""
        return len(self.rows())

    def seconds(self) -> float:
        """Seconds of training so far, teachers included and validation not."""
        return float(sum(row["train_seconds"] for row in self.rows()))


Advance = Callable[[Run, int], None]
"""Trains a run until it has done so many epochs."""


def take_turns(runs: Sequence[Run], turn: int, advance: Advance, say: Callable[[str], None]) -> None:
    """All runs to their end, `turn` epochs each in every round; the order is reversed from round to round.

    A run that starts from another one joins in where that one ends, beside others that are as far. Runs that were
    stopped go on where they were: those that are behind catch up first.

    Args:
        runs: Each once, in the order of every other round; those that others need are among them.
        turn: In epochs.
        advance: What trains; after it the log of the run has as many epochs as were asked for.
        say: Is told after every round what is done, how fast it goes, and what is to go.
    """
    total, began = sum(run.epochs for run in runs), time.monotonic()
    at_first = done = sum(run.done() for run in runs)
    while unfinished := [run for run in runs if run.done() < run.epochs]:
        target = min(run.offset + run.done() for run in unfinished) + turn
        forwards = ((target - 1) // turn) % 2
        for run in unfinished if forwards else reversed(unfinished):
            aim = min(run.epochs, target - run.offset)
            if run.done() < aim and (run.needs is None or run.needs.done() == run.needs.epochs):
                advance(run, aim)
        before, done = done, sum(run.done() for run in runs)
        if done == before:
            raise RuntimeError(f"{unfinished[0].folder} was trained and has no more epochs in its log than before")
        minutes = (time.monotonic() - began) / 60
        left = minutes / (done - at_first) * (total - done)
        rate = (done - at_first) / max(minutes, 1e-9)
        say(f"{done} of {total} epochs of {len(runs)} runs; {rate:.3g} a minute; {minutes:.0f} min, {left:.0f} to go")
