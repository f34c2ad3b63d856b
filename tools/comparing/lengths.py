"""Which runs a comparison has: every arm and seed at equal epochs, and at equal training time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.comparing.arms import Arm
from tools.comparing.turns import Training


@dataclass(frozen=True)
class Entry:
    """An arm at one length and seed: the run whose model is compared, and the one that it started from, if any."""

    arm: str
    seed: int
    run: Training
    start: Training | None = None

    @property
    def runs(self) -> tuple[Training, ...]:
        return (self.run,) if self.start is None else (self.start, self.run)

    @property
    def epochs(self) -> int:
        """In all."""
        return sum(run.epochs for run in self.runs)

    def seconds(self) -> float:
        """Of training in all, forward passes of a teacher included, validation not."""
        return sum(row["train_seconds"] for run in self.runs for row in run.rows())


def divided(arm: Arm, epochs: int) -> tuple[int, int]:
    """Of so many epochs in all, how many the arm starts from, and how many it trains itself, which is one at least."""
    own = max(1, round(arm.share * epochs))
    return epochs - own, own


class Maker:
    """Makes entries, whose runs of the same content are the same."""

    def __init__(self, arms: Mapping[str, Arm], folder: Path, recipe: str, settings: Sequence[str]) -> None:
        """`settings` are those of all arms."""
        for arm in arms.values():
            if arm.starts_from is not None and (arm.starts_from not in arms or arms[arm.starts_from].starts_from):
                raise ValueError(
                    f"arm {arm.name} starts from {arm.starts_from}, which is no arm that trains from random weights; "
                    "name one that does, and compare it as well"
                )
        self.arms, self.folder, self.recipe, self.settings = arms, folder, recipe, tuple(settings)

    def entry(self, name: str, seed: int, epochs: int) -> Entry:
        """An arm's run that comes to so many epochs in all."""
        arm = self.arms[name]
        before, own = divided(arm, epochs)
        start = None
        if arm.starts_from is not None and before:
            start = self._training(self.arms[arm.starts_from], seed, before, None)
        return Entry(name, seed, self._training(arm, seed, own, start), start)

    def _training(self, arm: Arm, seed: int, epochs: int, start: Training | None) -> Training:
        after = None if start is None else start.folder
        name = f"{arm.name}-{epochs}" + ("" if start is None else f"-after-{start.epochs}") + f"-seed{seed}"
        settings = (*self.settings, *arm.settings_of(epochs, after), f"train.seed={seed}")
        return Training(self.folder / name, self.recipe, settings, epochs, after)


def epochs_in(seconds: float, arm: Arm, own: float, before: float = 0.0) -> int:
    """How many epochs in all an arm trains in a given time; two at least where it starts from another arm, else one.

    The number that comes nearest. No more than half of the last epoch lies beyond the time, as rounding is to the
    nearest, and the fewest epochs where not even they fit.

    Args:
        seconds: The time.
        arm: Which part of the epochs is its own.
        own: Seconds of an epoch of its own.
        before: Seconds of an epoch of the arm that it starts from.
    """

    def taken(epochs: int) -> float:
        first, rest = divided(arm, epochs)
        return first * before + rest * own

    fewest = 1 if arm.starts_from is None else 2
    epochs = fewest
    while taken(epochs + 1) <= seconds or taken(epochs + 1) - seconds < seconds - taken(epochs):
        epochs += 1
    return epochs


def at_equal_time(maker: Maker, entries: Sequence[Entry], reference: str) -> list[Entry]:
    """The entries at the time that training of the arm `reference` took with the same seed, as measured on `entries`.

    Raises:
        ValueError: an arm's run has no epoch that one process trained, to tell its speed from.
    """
    times = {entry.seed: entry.seconds() for entry in entries if entry.arm == reference}
    made = []
    for entry in entries:
        if entry.arm == reference:
            made.append(entry)
            continue
        own, before = (seconds_per_epoch(run) for run in (entry.run, entry.start or entry.run))
        epochs = epochs_in(times[entry.seed], maker.arms[entry.arm], own, before)
        made.append(maker.entry(entry.arm, entry.seed, epochs))
    return made


def seconds_per_epoch(run: Training) -> float:
    """On average over all of the run, as epochs of some methods take longer later."""
    rows = run.rows()
    if not rows:
        raise ValueError(f"{run.folder} has no epoch yet")
    return float(sum(row["train_seconds"] for row in rows) / len(rows))
