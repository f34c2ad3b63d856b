"""How many epochs fit into a given time on this machine, and what of that time goes where."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any

from pss.config import Config
from pss.methods import PLAIN
from pss.planning.length import fewest_epochs, of_length
from pss.planning.plan import Level, Plan, plan
from pss.planning.simulation import batches_in, prepared_batches, simulate
from pss.planning.taken import Key, Taken, key_of

Rehearse = Callable[[Config, Plan, list[Level]], Taken]
"""Measures a run at some levels of its plan; see `pss.planning.rehearsal.rehearse`."""


@dataclass(frozen=True)
class Budget:
    """The time that a run may take: hours, or a share of what dense training of the recipe's epochs takes."""

    hours: float | None = None
    of_dense: float | None = None

    def __post_init__(self) -> None:
        if self.hours is not None and self.of_dense is not None:
            raise ValueError("--budget-hours and --budget-of-dense both say how long the run takes; give one of them")
        if not 0 < self.value < math.inf:
            raise ValueError(f"{self.option} is {self.value:g}; give a number above 0")

    @property
    def option(self) -> str:
        return "--budget-hours" if self.hours is not None else "--budget-of-dense"

    @property
    def value(self) -> float:
        value = self.of_dense if self.hours is None else self.hours
        assert value is not None
        return value


@dataclass(frozen=True)
class Parts:
    """Where the time of a run goes, in seconds."""

    start: float
    """From the command's start to the first step, what was measured for the plan included."""
    training: float
    validation: float
    checkpoints: float

    @property
    def total(self) -> float:
        return self.start + self.training + self.validation + self.checkpoints

    def to_dict(self) -> dict[str, float]:
        """For JSON, in seconds."""
        named = {f"{name}_seconds": round(value, 3) for name, value in asdict(self).items()}
        return {"seconds": round(self.total, 3), **named}


@dataclass(frozen=True)
class Chosen:
    """The run that fits."""

    config: Config
    planned: Plan
    predicted: Parts
    given_seconds: float
    """The time that there is."""
    dense_seconds: float | None
    """What dense training would take in the epochs of the recipe; None where nobody asked."""

    def words(self) -> list[str]:
        """What to say of it."""
        parts, epochs = self.predicted, self.config.train.epochs
        dense = ""
        if self.dense_seconds is not None:
            share = self.given_seconds / self.dense_seconds
            dense = f", {share:.0%} of the {in_words(self.dense_seconds)} of dense training"
        return [
            f"budget: {in_words(self.given_seconds)}{dense}; {epochs:,} epoch{'s' * (epochs > 1)} should take "
            f"{in_words(parts.total)}",
            f"of that: start {in_words(parts.start)}, training {in_words(parts.training)}, validation "
            f"{in_words(parts.validation)}, checkpoints {in_words(parts.checkpoints)}",
        ]


class Clock:
    """Predicts what runs of different lengths take, from what their levels do; measures each level once."""

    def __init__(
        self,
        config: Config,
        *,
        num_images: int,
        num_classes: int,
        rehearse: Rehearse,
        loader_rate: float | None = None,
        processes: int = 1,
        kept: Collection[str] = (),
    ) -> None:
        """Args:
        config: Of the run, as the recipe has it.
        num_images: To train on.
        num_classes: Of them.
        rehearse: What measures.
        loader_rate: Images per second that all processes decode, where a GPU trains meanwhile; None where the cores
            that decode are those that train, so that a queue saves nothing.
        processes: How many train.
        kept: Names of settings that do not follow the length of the run.
        """
        self.config, self._rehearse, self._kept = config, rehearse, kept
        self._loader_rate, self._processes = loader_rate, processes
        self.steps_per_epoch = num_images // config.train.batch_size
        self._sizes: dict[str, int] = {"num_images": num_images, "num_classes": num_classes}
        self._taken: Taken | None = None
        self.planned = lru_cache(maxsize=4)(self._planned)  # of a long run, a plan is large

    def _planned(self, epochs: int) -> tuple[Config, Plan]:
        config = of_length(self.config, epochs, self.steps_per_epoch, self._kept)
        return config, plan(config, **self._sizes)

    def measured(self, epochs: int) -> Taken:
        """What is known once all levels of a run of that length are."""
        config, planned = self.planned(epochs)
        known = {} if self._taken is None else self._taken.steps
        if unknown := [level for level in planned.levels if key_of(level) not in known]:
            found = self._rehearse(config, planned, unknown)
            if self._taken is not None:
                found = replace(
                    self._taken, steps=self._taken.steps | found.steps, waits=self._taken.waits | found.waits
                )
            self._taken = found
        assert self._taken is not None
        return self._taken

    def predict(self, epochs: int, before: float = 0.0, *, rehearsed: bool = True) -> Parts:
        """Of a run of that length whose levels are known, or of those that are, `before` seconds after it began. In the
        process that rehearsed it, or in one of its own."""
        config, planned = self.planned(epochs)
        taken = self._taken
        assert taken is not None
        training = self._training_seconds(config, planned, taken) + epochs * taken.epoch
        minutes = training / 60
        saved = epochs + int(minutes / config.train.checkpoint_every_minutes)
        build = taken.again if rehearsed else taken.build
        return Parts(before + build, training, epochs * taken.validation, saved * taken.checkpoint)

    def _training_seconds(self, config: Config, planned: Plan, taken: Taken) -> float:
        steps = [_nearest(level, planned, taken.steps) for level in planned.levels]
        if self._loader_rate is None:
            return sum(steps[number] for number in planned.level_of_step)
        waits = [_nearest(level, planned, taken.waits) for level in planned.levels]
        fed = [step - wait for step, wait in zip(steps, waits, strict=True)]
        queue_bytes, prepared = config.data.prefetch_bytes("cuda"), prepared_batches("cuda")
        queue = batches_in(queue_bytes, planned, self._processes, config.data.img_size, prepared)
        batch_seconds = planned.batch_size / self._loader_rate
        return simulate([fed[number] for number in planned.level_of_step], batch_seconds, queue).seconds

    def fewest(self) -> int:
        return fewest_epochs(self.config, self.steps_per_epoch, self._kept)


def _nearest(level: Level, planned: Plan, known: dict[Key, float]) -> float:
    """What is known of a level, or what follows by arithmetic from the one that costs most nearly as much."""
    if (found := known.get(key_of(level))) is not None:
        return found
    levels = [one for one in planned.levels if key_of(one) in known]
    if not levels:
        return max(known.values())
    like = min(levels, key=lambda one: abs(one.cost.training - level.cost.training))
    return known[key_of(like)] * level.cost.training / like.cost.training


def choose(budget: Budget, clock: Clock, dense: Clock, now: Callable[[], float]) -> Chosen:
    """The longest run that the budget has time for.

    Args:
        budget: What there is.
        clock: Of the run.
        dense: Of dense training with its settings; asked for a share of it only.
        now: Seconds since the command was started, the same on every process.

    Raises:
        ValueError: not even the shortest run fits, or the settings suit none.
    """
    begun = now()
    least, own, dense_seconds = clock.fewest(), clock.config.train.epochs, None
    if budget.of_dense is not None:
        dense.measured(own)
        dense_seconds = dense.predict(own, begun, rehearsed=False).total
        given = budget.of_dense * dense_seconds
    else:
        given = 3600 * budget.value

    guess = max(own, least)
    for _ in range(4):  # longer or shorter runs may have images of sizes that were not measured
        clock.measured(guess)
        before = now()
        try:
            found = longest(partial(_fits, clock, before, given), least, guess)
        except ValueError as error:
            raise ValueError(f"{budget.option} {budget.value:g} is more than can be planned: {error}") from None
        if found == guess:
            break
        guess = found
    clock.measured(guess)
    predicted = clock.predict(guess, before)
    if guess == least and predicted.total > given:
        enough = _rounded_up(predicted.total / (3600 if dense_seconds is None else dense_seconds))
        raise ValueError(
            f"{budget.option} {budget.value:g} is {in_words(given)} here, and the shortest run, {least:,} "
            f"epoch{'s' * (least > 1)}, takes {in_words(predicted.total)} ({in_words(predicted.start)} to start); "
            f"give {budget.option} {enough:g} at least"
        )
    config, planned = clock.planned(guess)
    return Chosen(config, planned, predicted, given, dense_seconds)


def dense_of(config: Config) -> Config:
    """The same training with every patch at every step, at full size."""
    plain = config.with_settings([f"method={PLAIN.name}"])
    if plain.data.progressive.start_size is None:
        return plain
    return plain.with_settings(["data.progressive.start_size=none"])


def named(settings: Iterable[str]) -> frozenset[str]:
    """What was set by hand, which a plan leaves as it is."""
    return frozenset(setting.partition("=")[0].strip() for setting in settings)


def check_settings(budget: Budget, config: Config, settings: Iterable[str]) -> None:
    """Raise `ValueError` where settings say how long the run is."""
    if "train.epochs" in named(settings):
        raise ValueError(f"{budget.option} chooses train.epochs, and --set gives it; leave out one of them")
    if config.train.max_steps is not None:
        raise ValueError(
            f"{budget.option} plans a whole run, and train.max_steps={config.train.max_steps} ends it before; set it "
            "to none"
        )


def _fits(clock: Clock, before: float, seconds: float, epochs: int) -> bool:
    return clock.predict(epochs, before).total <= seconds


def longest(fits: Callable[[int], bool], least: int, guess: int) -> int:
    """The largest number that fits, or `least` where not even that does. What is larger than one that does not fit does
    not fit."""
    if not fits(least):
        return least
    low, high = least, max(guess, least + 1)
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def in_words(seconds: float) -> str:
    """As a person says it: two units at most."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if seconds < 600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _rounded_up(value: float) -> float:
    """To two digits."""
    unit: float = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.2g}")


def said(summary: dict[str, Any]) -> str:
    """Of a finished run, what `summary.json` says of its budget, for people."""
    predicted, actual = summary["predicted"]["seconds"], summary["actual_seconds"]
    often = f" in {summary['starts']} starts" if summary["starts"] > 1 else ""
    return (
        f"budget: {in_words(summary['given_seconds'])} given, {in_words(predicted)} predicted, {in_words(actual)} "
        f"taken{often} ({actual / predicted - 1:+.1%})"
    )
