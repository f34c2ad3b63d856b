"""A cascade: every image at a small ρ first, and those that the model is unsure of again at a larger one.

Sure is a model of an image whose most likely class has at least a certain probability. These thresholds are fitted on
one part of a split, and what the cascade reaches is told of the other. A later pass begins anew: other patches change
every token of every block, so that there is nothing of an earlier pass that it could go on with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines import crng
from pipelines.base import Batch, Loader
from pss.inference.accuracy import accuracy, evaluation_inputs
from pss.inference.opening import Run
from pss.inference.sweep import predict
from pss.inference.timing import Spread, call_seconds
from pss.runtime.precision import autocast
from pss.runtime.processes import World

DEFAULT = (0.4, 0.7, 1.0)
MOST_STAGES = 4

_QUANTILES = {2: 200, 3: 64, 4: 24}  # of thresholds that are tried, by the number of stages
_SINGLES = tuple(number / 10 for number in range(2, 11))
_TIMED_IMAGES = 256
_SEED = 24  # of which images thresholds are fitted on

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Cascade:
    """Shares of patches, ascending, and, for all but the last, how probable the likeliest class must be."""

    rhos: tuple[float, ...]
    thresholds: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.thresholds) == len(self.rhos) - 1

    @torch.inference_mode()
    def predict(self, run: Run, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) in float32, and at which stage each image was answered, int64 (B,)."""
        left = torch.arange(len(images), device=images.device)
        logits: Tensor | None = None
        stages = torch.full_like(left, len(self.rhos) - 1)
        for stage, rho in enumerate(self.rhos):
            found = predict(run, images if logits is None else images[left], rho).float()
            logits = found if logits is None else logits.index_copy(0, left, found)
            if stage < len(self.thresholds):
                sure = found.softmax(dim=1).amax(dim=1) >= self.thresholds[stage]
                stages[left[sure]] = stage
                left = left[~sure]
            if not len(left):
                break
        assert logits is not None
        return logits, stages


@dataclass(frozen=True)
class Answers:
    """What a model says of N images at P shares of patches, ascending."""

    rhos: tuple[float, ...]
    macs: tuple[float, ...]
    """Of one image at each."""
    sure: Floats
    """Probability of the likeliest class, (P, N)."""
    right: Floats
    """1 where that is the true one, else 0, (P, N)."""

    def of(self, images: NDArray[Any]) -> Answers:
        """Of some images, as a bool or index array."""
        return Answers(self.rhos, self.macs, self.sure[:, images], self.right[:, images])

    def at(self, rhos: Sequence[float]) -> Answers:
        """At some of the shares."""
        places = [self.rhos.index(rho) for rho in rhos]
        return Answers(tuple(rhos), tuple(self.macs[one] for one in places), self.sure[places], self.right[places])

    @property
    def top1(self) -> Floats:
        """In percent, at each share."""
        found: Floats = 100 * self.right.mean(axis=1)
        return found


@dataclass(frozen=True)
class Outcome:
    """What a cascade does with the images of some `Answers`."""

    top1: float
    macs: float
    """Mean of an image, over all passes it took."""
    shares: tuple[float, ...]
    """Of the images that are answered at each stage."""
    right: Floats
    """As `Answers.right`, (N,)."""


def outcome(answers: Answers, cascade: Cascade) -> Outcome:
    """Of a cascade whose shares are among those of `answers`."""
    own = answers.at(cascade.rhos)
    stage = np.full(own.sure.shape[1], len(cascade.rhos) - 1)
    for number in reversed(range(len(cascade.thresholds))):
        stage[own.sure[number] >= cascade.thresholds[number]] = number
    right = own.right[stage, np.arange(len(stage))]
    macs = float(np.cumsum(own.macs)[stage].mean())
    shares = tuple(float((stage == number).mean()) for number in range(len(cascade.rhos)))
    return Outcome(100 * float(right.mean()), macs, shares, right)


def fit(
    answers: Answers, rhos: Sequence[float], *, least_top1: float | None = None, most_macs: float | None = None
) -> Cascade | None:
    """The cascade of at least two of `rhos` that is the cheapest with a top-1 of `least_top1` percent, if it costs less
    than the largest of them alone, or the most accurate that takes `most_macs` on average; None where there is none.

    All thresholds are tried together that lie at quantiles of the probabilities.
    """
    assert (least_top1 is None) != (most_macs is None)
    best: tuple[tuple[float, float], Cascade] | None = None
    largest = answers.at([max(rhos)]).macs[0] * (1 - 1e-6)  # costs below are rounded to seven digits
    for count in range(2, len(rhos) + 1):
        for chosen in combinations(sorted(rhos), count):
            own = answers.at(chosen)
            tried, top1, macs = _tried(own)
            if least_top1 is not None:
                allowed, order = (top1 >= least_top1 - 1e-9) & (macs < largest), (macs, -top1)
            else:
                assert most_macs is not None
                allowed, order = macs <= most_macs * (1 + 1e-9), (-top1, macs)
            if not allowed.any():
                continue
            places = np.flatnonzero(allowed)
            place = places[np.lexsort((order[1][places], order[0][places]))[0]]
            score = float(order[0][place]), float(order[1][place])
            if best is None or score < best[0]:
                numbers = np.unravel_index(place, [len(some) for some in tried])
                thresholds = tuple(float(some[number]) for some, number in zip(tried, numbers, strict=True))
                best = score, Cascade(chosen, thresholds)
    return None if best is None else best[1]


def _tried(own: Answers) -> tuple[list[Floats], Floats, Floats]:
    """Thresholds of every stage but the last, and for all combinations of them, the last stage's moving fastest, top-1
    in percent and mean multiply-accumulates."""
    quantiles = np.linspace(0, 1, _QUANTILES[len(own.rhos)])
    tried = [np.unique(np.quantile(sure, quantiles)) for sure in own.sure[:-1]]
    right = own.right[-1:].astype(np.float32)  # (combinations, N)
    macs = np.full_like(right, own.macs[-1])
    for number in reversed(range(len(tried))):
        leaves = (own.sure[number] >= tried[number][:, None]).astype(np.float32)  # (thresholds, N)
        goes = 1 - leaves
        if number:
            right = (leaves * own.right[number])[:, None] + goes[:, None] * right[None]
            macs = own.macs[number] + goes[:, None] * macs[None]
            right, macs = (values.reshape(-1, values.shape[-1]) for values in (right, macs))
        else:
            count = right.shape[1]
            hits = (leaves * own.right[0]).sum(axis=1)[:, None] + goes @ right.T
            spent = (own.macs[0] + goes @ macs.T / count).ravel().astype(np.float64)
            # Whole images, and seven digits: of what is equally good, rounding must not decide.
            digits = 6 - math.floor(math.log10(spent.max()))
            return tried, 100 * np.rint(hits.astype(np.float64)).ravel() / count, np.round(spent, digits)
    raise AssertionError("a cascade has two stages at least")


def fitted_on(count: int) -> NDArray[np.bool_]:
    """Which of `count` samples of a split thresholds are fitted on: half of them, each by its own number."""
    chosen: NDArray[np.bool_] = crng.u01(crng.key(_SEED, 0, np.arange(count), crng.PATCHES), 0) < 0.5
    return chosen


def collect(
    run: Run, loader: Loader, rhos: Sequence[float], world: World, advance: Callable[[int], None] = lambda count: None
) -> tuple[Answers, list[Tensor]]:
    """What the model says of all images of a split, and the first of them as the model takes them, in batches.

    Raises:
        ValueError: the method has no ρ to choose.
    """
    method = run.method
    if method.points() == (None,) or method.costs_vary or method.knob != "ρ":
        raise ValueError(
            f"--cascade runs a model at several ρ, and {run.name} was trained with method={method.name}, which has its "
            "own way to spend less on an image; leave it out"
        )
    rhos = tuple(sorted(set(rhos)))
    for rho in rhos:
        method.check_point(rho)
    sure, right = (torch.zeros(len(rhos), loader.num_samples, dtype=torch.float64) for _ in range(2))
    kept: list[Tensor] = []

    def observe(batch: Batch, images: Tensor, logits: list[Tensor]) -> None:
        if sum(map(len, kept)) < _TIMED_IMAGES:
            kept.append(images.clone())
        for number, some in enumerate(logits):
            likeliest = some.softmax(dim=1).max(dim=1)
            sure[number, batch.index] = likeliest.values.double().cpu()
            right[number, batch.index] = (likeliest.indices == batch.labels).double().cpu()
        advance(len(images))

    inputs = evaluation_inputs(loader, run.config.data, world.device)
    options: dict[str, Any] = {"autocast": autocast(run.config, world.device), "observe": observe}
    accuracy(method.predict, inputs, world, points=rhos, **options)
    gathered = [world.sum(values.to(world.device)).cpu().numpy() for values in (sure, right)]
    macs = tuple(float(method.cost(rho).forward) for rho in rhos)
    return Answers(rhos, macs, *gathered), kept


def cost_of(answers: Answers, top1: float) -> float | None:
    """What a single ρ costs that reaches so much top-1, between measured ones in proportion; None where none does."""
    before: tuple[float, float] | None = None
    for macs, reached in zip(answers.macs, answers.top1, strict=True):
        if reached >= top1 - 1e-9:
            if before is None:
                return macs
            return before[0] + (macs - before[0]) * (top1 - before[1]) / (float(reached) - before[1])
        if before is None or reached > before[1]:
            before = macs, float(reached)
    return None


def top1_at(answers: Answers, macs: float) -> float:
    """What a single ρ of so much cost, or less, reaches, between measured ones in proportion."""
    return float(np.interp(macs, answers.macs, np.maximum.accumulate(answers.top1)))


def paired(one: Floats, other: Floats) -> tuple[float, float]:
    """Difference of two top-1, in points, and its standard error over the images that both are of."""
    difference = one - other
    return 100 * float(difference.mean()), 100 * math.sqrt(float(difference.var()) / len(difference))


def singles(rhos: Sequence[float], compared: Sequence[float] | None) -> tuple[float, ...]:
    """All ρ that a model is run at: those of the cascade, and those it is compared with."""
    return tuple(sorted({*rhos, *(_SINGLES if compared is None else compared)}))


def speeds(run: Run, cascade: Cascade, rhos: Sequence[float], batches: Sequence[Tensor]) -> dict[float | None, Spread]:
    """Images per second of the cascade, under None, and of each ρ, in turns on the same real images.

    How many images go on differs from batch to batch, so the cascade gets all of `batches`; a single ρ takes as long
    for any, and gets the first.
    """

    def over() -> None:
        for batch in batches:
            cascade.predict(run, batch)

    calls: list[Callable[[], Any]] = [over, *(partial(predict, run, batches[0], rho) for rho in rhos)]
    counts = [sum(map(len, batches)), *(len(batches[0]) for _ in rhos)]
    measured = call_seconds(calls, batches[0].device)
    found = [Spread.of([count / one for one in times]) for count, times in zip(counts, measured, strict=True)]
    return dict(zip((None, *rhos), found, strict=True))
