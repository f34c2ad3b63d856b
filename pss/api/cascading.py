"""A cascade fitted to a target and held against single ρ, as `pss-eval --cascade` does it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

import pipelines
from pss.api.training import LoaderName
from pss.inference import sweep
from pss.inference.cascade import (
    MOST_STAGES,
    Answers,
    Cascade,
    Outcome,
    collect,
    cost_of,
    fit,
    fitted_on,
    outcome,
    paired,
    singles,
    speeds,
    top1_at,
)
from pss.inference.opening import Run
from pss.inference.plots import plot_cascade
from pss.inference.timing import Spread
from pss.runtime import files
from pss.runtime.processes import World

_FRONTIER = 12  # costs that cascades are fitted to for the picture


@dataclass(frozen=True)
class Target:
    """What thresholds are fitted to: points of top-1 that may be lost against the largest ρ, or a mean cost."""

    max_drop: float | None = 0.0
    gmacs: float | None = None

    def fitted(self, answers: Answers, rhos: Sequence[float]) -> Cascade:
        """Raises `ValueError` where no cascade meets it."""
        if self.gmacs is not None:
            found = fit(answers, rhos, most_macs=1e9 * self.gmacs)
        else:
            assert self.max_drop is not None
            found = fit(answers, rhos, least_top1=float(answers.at([max(rhos)]).top1[0]) - self.max_drop)
        if found is not None:
            return found
        tried = ", ".join(f"{rho:g}" for rho in sorted(rhos))
        if self.gmacs is None:
            raise ValueError(
                f"no cascade of ρ {tried} is within {self.max_drop:g} points of the largest and costs less than that "
                "alone; raise --max-drop, or leave out --cascade and take one ρ"
            )
        least = answers.at([min(rhos)]).macs[0] / 1e9
        raise ValueError(
            f"no cascade of ρ {tried} takes {self.gmacs:g} GMACs on average, as the first alone takes {least:.4g}; "
            "raise --target-gmacs"
        )

    @property
    def words(self) -> str:
        if self.gmacs is not None:
            return f"the most accurate of at most {self.gmacs:g} GMACs"
        return f"the cheapest that loses at most {self.max_drop:g} points of top-1"


@dataclass(frozen=True)
class Found:
    """A cascade, fitted on some images and measured on others."""

    cascade: Cascade
    target: Target
    fitted: Answers
    """Of the images that it was fitted on."""
    told: Answers
    """Of those that it is measured on."""
    rhos: tuple[float, ...]
    """What it could be made of."""
    speeds: dict[float | None, Spread]
    """Images per second at each ρ, and, under None, of the cascade."""
    run: str

    @property
    def outcome(self) -> Outcome:
        return outcome(self.told, self.cascade)

    @cached_property
    def frontier(self) -> list[tuple[float, float]]:
        """Mean multiply-accumulates and top-1 of cascades fitted to other costs, ascending; each is a fit."""
        low, high = self.told.at([min(self.rhos)]).macs[0], self.told.at([max(self.rhos)]).macs[0]
        points = []
        for number in range(1, _FRONTIER + 1):
            fitted = fit(self.fitted, self.rhos, most_macs=low + (high - low) * number / _FRONTIER)
            if fitted is not None:
                found = outcome(self.told, fitted)
                points.append((found.macs, found.top1))
        return sorted(set(points))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        own, told, largest = self.outcome, self.told, max(self.rhos)
        same_accuracy = cost_of(told, own.top1)
        against = told.at([largest])
        difference, error = paired(own.right, against.right[0])
        return {
            "run": self.run,
            "target": self.target.words,
            "fitted_images": self.fitted.sure.shape[1],
            "images": told.sure.shape[1],
            "stages": [
                {"rho": rho, "threshold": threshold, "share": share}
                for rho, threshold, share in zip(
                    self.cascade.rhos, (*self.cascade.thresholds, None), own.shares, strict=True
                )
            ],
            "top1": round(own.top1, 4),
            "top1_error": round(100 * math.sqrt(own.right.var() / len(own.right)), 4),
            "gmacs": own.macs / 1e9,
            **self.speeds[None].named("images_per_second", 1),
            "against_largest": {
                "rho": largest,
                "top1": round(float(against.top1[0]), 4),
                "difference": round(difference, 4),
                "difference_error": round(error, 4),
                "saved": 1 - own.macs / against.macs[0],
            },
            "at_equal_top1": None
            if same_accuracy is None
            else {"gmacs": same_accuracy / 1e9, "saved": 1 - own.macs / same_accuracy},
            "at_equal_cost": {"top1": round(top1_at(told, own.macs), 4)},
            "singles": [
                {"rho": rho, "top1": round(float(top1), 4), "gmacs": macs / 1e9}
                | self.speeds[rho].named("images_per_second", 1)
                for rho, top1, macs in zip(told.rhos, told.top1, told.macs, strict=True)
            ],
            "frontier": [{"gmacs": macs / 1e9, "top1": round(top1, 4)} for macs, top1 in self.frontier],
        }

    def to_json(self) -> str:
        return json.dumps(sweep.finite(self.to_dict()), indent=2, allow_nan=False) + "\n"

    def figure(self) -> bytes:
        """Accuracy against cost, of single ρ and of cascades, a PNG."""
        return plot_cascade(self.to_dict())

    def contents(self) -> dict[str, Callable[[], str | bytes]]:
        """What is written, by name: functions that return it."""
        return {"cascade.json": self.to_json, "cascade.png": self.figure}

    def write(self, folder: str | Path) -> list[Path]:
        """Write `cascade.json` and `cascade.png`. Raises `OSError`, which names the file."""
        files.write_all(Path(folder), {name: content() for name, content in self.contents().items()})
        return [Path(folder) / name for name in self.contents()]

    def metadata(self, run: Run) -> dict[str, Any]:
        """What an exported file tells a program that is to run the cascade with it."""
        method = run.method
        counts = [max(method.tokens(rho)) - method.model.num_prefix_tokens for rho in self.cascade.rhos]
        stages = {"rhos": self.cascade.rhos, "num_patches": counts, "thresholds": self.cascade.thresholds}
        return {"cascade": {name: list(values) for name, values in stages.items()}}


def cascade_of(
    run: Run,
    name: str,
    data: pipelines.DataPath,
    rhos: Sequence[float],
    target: Target,
    *,
    compared: Sequence[float] | None = None,
    split: str = "val",
    fit_split: str | None = None,
    loader: LoaderName = "auto",
    batch_size: int = 64,
    world: World,
) -> Found:
    """Fit a cascade of some of `rhos` to a target, and measure it.

    Args:
        run: The model.
        name: What tables call it.
        data: The data set.
        rhos: Two to four shares of patches.
        target: What it is fitted to.
        compared: Other ρ that it is held against; tenths from 0.2 on if None.
        split: What is measured on.
        fit_split: What thresholds are fitted on; half of `split`, which is then not measured on, if None.
        loader: What decodes the images.
        batch_size: Images per batch, also for the rates.
        world: One process.

    Raises:
        ValueError: no cascade meets the target, the method has no ρ, the split is too small to be halved, `rhos` are
            too few or too many, or `fit_split` is `split`.
    """
    if not 2 <= len(set(rhos)) <= MOST_STAGES:
        named = ", ".join(f"{rho:g}" for rho in rhos)
        raise ValueError(f"a cascade of ρ {named} was asked for; name two to {MOST_STAGES} different ones")
    if fit_split == split:
        raise ValueError(
            f"thresholds would be fitted on the {split} split, which the cascade is measured on; name another split "
            "with --fit-split, or leave it out, and one half of the split is for either"
        )
    points = singles(rhos, compared)

    def answers_of(of: str, at: Sequence[float]) -> tuple[Answers, list[Tensor]]:
        options: dict[str, Any] = {"batch_size": batch_size, "train": False, "loader": loader, "device": world.device}
        made = pipelines.build(data, of, config=run.config.data, **options)
        try:
            with sweep.progress(name, made.num_samples, world) as advance:
                return collect(run, made, at, world, advance)
        finally:
            made.close()

    if fit_split is not None:  # first: it may be missing, or its thresholds may not meet the target
        fitted, _ = answers_of(fit_split, sorted(rhos))
        cascade = target.fitted(fitted, rhos)
    told, batches = answers_of(split, points)
    if fit_split is None:
        fitting = fitted_on(told.sure.shape[1])
        if not fitting.any() or fitting.all():
            raise ValueError(
                f"the {split} split is too small to fit thresholds on half of it; name one with --fit-split"
            )
        fitted, told = told.of(fitting), told.of(~fitting)
        cascade = target.fitted(fitted, rhos)
    with sweep.stage("timing the cascade", world):
        timed = speeds(run, cascade, points, batches)
    return Found(cascade, target, fitted, told, tuple(sorted(rhos)), timed, name)
