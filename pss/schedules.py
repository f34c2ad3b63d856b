"""Patch sampling schedules: the kept share rho as a pure function of the optimizer step.

A schedule ramps the *dropped* share, `drop = 1 - rho`, and rounds it to the nearest fifth, ties to the even
multiple, so a whole run sees at most five token counts. Nothing is remembered between calls: a resumed run and
every rank see the same rho at the same step, and a run can be plotted and costed before it starts.

Forms of a ramp are told apart by name:

* `published`: what McDanel & Huynh (2022) trained with. The ramp runs half a level past `high` (drop 0.8 to -0.1)
  and is clamped, which gives rho = 1 as many steps as the levels between. `Linear` and `Cosine` end it where the
  cooldown begins.
* `cut`, of `Linear` and `Cosine`: the same ramp over all training steps, whose end the cooldown cuts off.
* `symmetric`: the ramp ends at `high` (drop 0.8 to 0), so that both end levels get half the steps of the others. It
  takes all training steps too, and the cooldown cuts it short.

Rounding uses integers throughout, so a step that lies exactly between two levels is decided by the rule and not
by floating-point noise.
"""

import math
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from hashlib import blake2b
from itertools import accumulate, pairwise
from typing import Literal, Protocol, Self, runtime_checkable

Form = Literal["published", "symmetric"]

NUM_LEVELS = 5
_COSINE_RESOLUTION = 10**12


@runtime_checkable
class Schedule(Protocol):
    """Anything that maps the global optimizer step, counted from 0, to the kept share in (0, 1]."""

    def __call__(self, step: int) -> float: ...


@dataclass(frozen=True)
class Fixed:
    """The same kept share at every step; any value in (0, 1], not only the levels of the ramps."""

    rho: float
    cooldown_start: int | None = None
    """First step of the cooldown, during which rho is 1; None for no cooldown."""

    def __post_init__(self) -> None:
        if not 0 < self.rho <= 1:
            raise ValueError(f"rho must be in (0, 1], got {self.rho}")

    def __call__(self, step: int) -> float:
        if self.cooldown_start is not None and step >= self.cooldown_start:
            return 1.0
        return self.rho


@dataclass(frozen=True)
class Listed:
    """The kept shares of a list, one a step, over and over; any values in (0, 1]."""

    rhos: tuple[float, ...]
    cooldown_start: int | None = None
    """First step of the cooldown, during which rho is 1; None for no cooldown."""

    def __post_init__(self) -> None:
        if not self.rhos or not all(0 < rho <= 1 for rho in self.rhos):
            raise ValueError(f"the list of kept shares must hold numbers in (0, 1], got {self.rhos}")

    def __call__(self, step: int) -> float:
        if self.cooldown_start is not None and step >= self.cooldown_start:
            return 1.0
        return self.rhos[step % len(self.rhos)]


@dataclass(frozen=True)
class Stages:
    """One kept share after the other, each for a part of the steps; any values in (0, 1]."""

    rhos: tuple[float, ...]
    """Of the stages, in their order."""
    lengths: tuple[float, ...]
    """How long each of them is, relative to the others."""
    num_steps: int
    """Steps of all stages; the last one goes on after them."""
    cooldown_start: int | None = None
    """First step of the cooldown, during which rho is 1; None for no cooldown."""

    def __post_init__(self) -> None:
        _check_positive(num_steps=self.num_steps)
        if not self.rhos or not all(0 < rho <= 1 for rho in self.rhos):
            raise ValueError(f"the kept shares of stages must be numbers in (0, 1], got {self.rhos}")
        if len(self.lengths) != len(self.rhos) or not all(0 < length < math.inf for length in self.lengths):
            raise ValueError(
                f"lengths must be one positive number for each of {len(self.rhos)} stages, got {self.lengths}"
            )

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first step of every stage; one that is shorter than a step may start where the next one does.

        A stage starts with the first step that is not before its place in the run, worked out in fractions of the
        numbers as they are written in decimal: 3 and 7 tenths divide ten steps into three and seven.
        """
        lengths = [Fraction(repr(float(length))) for length in self.lengths]
        whole = sum(lengths)
        places = accumulate(lengths[:-1], initial=Fraction(0))
        return tuple(math.ceil(place * self.num_steps / whole) for place in places)

    @property
    def counts(self) -> tuple[int, ...]:
        """Steps of every stage."""
        return tuple(end - start for start, end in pairwise((*self.starts, self.num_steps)))

    def __call__(self, step: int) -> float:
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        if self.cooldown_start is not None and step >= self.cooldown_start:
            return 1.0
        return self.rhos[bisect_right(self.starts, step) - 1]


@dataclass(frozen=True, kw_only=True)
class _Ramp:
    """What the three ramps share: range, form, rounding, and the optional rho = 1 at the end of training."""

    form: Form
    """Whether the ramp overshoots `high` by half a level (`published`) or ends there (`symmetric`)."""

    low: float = 0.2
    """Smallest kept share, a multiple of 0.2; every ramp starts here."""

    high: float = 1.0
    """Largest kept share, a multiple of 0.2."""

    cooldown_start: int | None = None
    """First step of the cooldown, during which rho is 1; None for no cooldown."""

    def __post_init__(self) -> None:
        if self.form not in ("published", "symmetric"):
            raise ValueError(f"form must be 'published' or 'symmetric', got {self.form!r}")
        for name, rho in (("low", self.low), ("high", self.high)):
            if not 0 < rho <= 1 or rho != round(NUM_LEVELS * rho) / NUM_LEVELS:
                raise ValueError(f"{name} must be one of 0.2, 0.4, 0.6, 0.8 and 1.0, got {rho}")
        if self.low > self.high:
            raise ValueError(f"low must not exceed high, got low={self.low} and high={self.high}")
        if self.cooldown_start is not None and self.cooldown_start < 0:
            raise ValueError(f"cooldown_start must not be negative, got {self.cooldown_start}")

    def _is_cooldown(self, step: int) -> bool:
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        return self.cooldown_start is not None and step >= self.cooldown_start

    def _rho(self, done: int, of: int) -> float:
        """The level at the share `done / of` of the ramp's way from low to high."""
        first, last = (NUM_LEVELS - round(NUM_LEVELS * rho) for rho in (self.low, self.high))
        twice_span = 2 * (first - last) + (self.form == "published")
        twice_drop, denominator = 2 * first * of - twice_span * done, 2 * of  # 5 * drop, as a fraction
        level = max(last, _round_half_even(twice_drop, denominator))
        return (NUM_LEVELS - level) / NUM_LEVELS


@dataclass(frozen=True, kw_only=True)
class _Climb(_Ramp):
    """A ramp from `low` to `high` that is climbed once."""

    ramp_steps: int
    """Steps that the climb takes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(ramp_steps=self.ramp_steps)

    @classmethod
    def published(
        cls, *, steps_per_epoch: int, epochs: int, cooldown_epochs: int = 0, low: float = 0.2, high: float = 1.0
    ) -> Self:
        """The climb of the paper's code: over the steps before the cooldown, the whole run if there is none.

        A cooldown compresses the climb, so that every level gets its share of what is left.
        """
        total, start = _training_steps(steps_per_epoch, epochs, cooldown_epochs)
        # Where the cooldown is the whole run, no step of the climb is seen.
        return cls(form="published", ramp_steps=start or total, low=low, high=high, cooldown_start=start)

    @classmethod
    def cut(
        cls, *, steps_per_epoch: int, epochs: int, cooldown_epochs: int = 0, low: float = 0.2, high: float = 1.0
    ) -> Self:
        """The climb of the paper over all training steps, whose end the cooldown cuts off.

        Up to the cooldown's first step, rho is what it would be without one. As the last two ninths of the linear climb
        to rho = 1 are at rho = 1 anyway, a short cooldown changes nothing there.
        """
        total, start = _training_steps(steps_per_epoch, epochs, cooldown_epochs)
        return cls(form="published", ramp_steps=total, low=low, high=high, cooldown_start=start)

    @classmethod
    def symmetric(
        cls, *, steps_per_epoch: int, epochs: int, cooldown_epochs: int = 0, low: float = 0.2, high: float = 1.0
    ) -> Self:
        """A climb over all training steps that ends at `high`; the cooldown cuts it short."""
        total, start = _training_steps(steps_per_epoch, epochs, cooldown_epochs)
        return cls(form="symmetric", ramp_steps=total, low=low, high=high, cooldown_start=start)


@dataclass(frozen=True, kw_only=True)
class Linear(_Climb):
    """rho climbs from `low` to `high` once, linearly in the step, and stays there."""

    def __call__(self, step: int) -> float:
        if self._is_cooldown(step):
            return 1.0
        return self._rho(min(step, self.ramp_steps), self.ramp_steps)


@dataclass(frozen=True, kw_only=True)
class Cosine(_Climb):
    """As `Linear`, along half a cosine: slow at both ends, fast in the middle."""

    def __call__(self, step: int) -> float:
        if self._is_cooldown(step):
            return 1.0
        share = (1 - math.cos(math.pi * min(step, self.ramp_steps) / self.ramp_steps)) / 2
        # The resolution is coarser than the noise of cos, so its few rational values are met exactly.
        return self._rho(round(share * _COSINE_RESOLUTION), _COSINE_RESOLUTION)


@dataclass(frozen=True, kw_only=True)
class Cyclic(_Ramp):
    """rho goes from `low` to `high` and back, linearly in the step, once per period.

    The published form keeps 0.2 for a ninth of the period and 0.4, 0.6, 0.8 and 1.0 for two ninths each; mean 0.6444.
    """

    period_steps: int
    """Steps of one way up and back."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(period_steps=self.period_steps)

    def __call__(self, step: int) -> float:
        if self._is_cooldown(step):
            return 1.0
        phase = step % self.period_steps
        return self._rho(2 * min(phase, self.period_steps - phase), self.period_steps)

    @classmethod
    def published(
        cls,
        *,
        steps_per_epoch: int,
        epochs: int,
        cooldown_epochs: int = 0,
        low: float = 0.2,
        high: float = 1.0,
        period_steps: int | None = None,
    ) -> Self:
        """The cycle of the paper: one period per epoch, unless `period_steps` says otherwise.

        Cycles are as long with a cooldown as without one.
        """
        _, start = _training_steps(steps_per_epoch, epochs, cooldown_epochs)
        period = steps_per_epoch if period_steps is None else period_steps
        return cls(form="published", period_steps=period, low=low, high=high, cooldown_start=start)

    @classmethod
    def symmetric(
        cls,
        *,
        steps_per_epoch: int,
        epochs: int,
        cooldown_epochs: int = 0,
        low: float = 0.2,
        high: float = 1.0,
        period_steps: int | None = None,
    ) -> Self:
        """One period per epoch (or `period_steps`) in which both end levels get half the steps of the others."""
        _, start = _training_steps(steps_per_epoch, epochs, cooldown_epochs)
        period = steps_per_epoch if period_steps is None else period_steps
        return cls(form="symmetric", period_steps=period, low=low, high=high, cooldown_start=start)


@dataclass(frozen=True, kw_only=True)
class Shuffled:
    """Another schedule with the steps of each block in random order: the same levels as often, without the ramp.

    A loader then has to keep up with the average step and not with a long stretch of the shortest ones.
    """

    of: Schedule
    block_steps: int
    """Steps that are shuffled among themselves: a cycle, or an epoch."""
    seed: int = 0
    stop: int | None = None
    """First step that stays where it is (that of a cooldown), and all after it; None shuffles to the end."""

    def __post_init__(self) -> None:
        _check_positive(block_steps=self.block_steps)

    def __call__(self, step: int) -> float:
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        if self.stop is not None and step >= self.stop:
            return self.of(step)
        block, place = divmod(step, self.block_steps)
        first = block * self.block_steps
        length = self.block_steps if self.stop is None else min(self.block_steps, self.stop - first)
        return self.of(first + _permutation(self.seed, block, length)[place])


@lru_cache(maxsize=4)
def _permutation(seed: int, block: int, length: int) -> tuple[int, ...]:
    """0 ... length - 1 in an order that no library's version changes."""
    return tuple(sorted(range(length), key=lambda i: blake2b(f"{seed} {block} {i}".encode(), digest_size=8).digest()))


def histogram(schedule: Schedule, total_steps: int) -> dict[float, float]:
    """The share of `total_steps` steps that each kept share gets, by ascending rho; the shares add up to 1."""
    _check_positive(total_steps=total_steps)
    counts = Counter(map(schedule, range(total_steps)))
    return {rho: counts[rho] / total_steps for rho in sorted(counts)}


def levels(schedule: Schedule, total_steps: int) -> tuple[float, ...]:
    """The distinct kept shares of a run, ascending: one set of tensor shapes each."""
    return tuple(histogram(schedule, total_steps))


def mean_rho(schedule: Schedule, total_steps: int) -> float:
    """The kept share averaged over a run."""
    return sum(rho * share for rho, share in histogram(schedule, total_steps).items())


def _training_steps(steps_per_epoch: int, epochs: int, cooldown_epochs: int) -> tuple[int, int | None]:
    """All steps of a run, and the first of its cooldown if it has one."""
    _check_positive(steps_per_epoch=steps_per_epoch, epochs=epochs)
    if not 0 <= cooldown_epochs <= epochs:
        raise ValueError(f"cooldown_epochs must be between 0 and epochs={epochs}, got {cooldown_epochs}")
    return steps_per_epoch * epochs, steps_per_epoch * (epochs - cooldown_epochs) if cooldown_epochs else None


def _check_positive(**steps: int) -> None:
    for name, value in steps.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _round_half_even(numerator: int, denominator: int) -> int:
    """`numerator / denominator` to the nearest integer, ties to the even one."""
    quotient, rest = divmod(numerator, denominator)
    return quotient + (2 * rest > denominator or (2 * rest == denominator and quotient % 2))
