"""The settings that methods bring along: their base, and those of a schedule, which several methods may ask for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from annotated_types import Gt, Le

from pipelines.settings import (
    AboveZero,
    Always,
    Context,
    Json,
    Natural,
    OneOf,
    Positive,
    ReadIf,
    Section,
    Share,
    unread_at,
)
from pss.schedules import Stages


class MethodSection(Section):
    """Base of the settings that a training method brings along; see `pss.methods.contract.Method.sections`."""

    def check_run(self, config: Any) -> None:
        """Compare the settings with those of the run. Raises `ValueError`."""

    def check_steps(self, config: Any, steps_per_epoch: int) -> None:
        """As `check_run`, where the run starts and its steps are counted. Raises `ValueError`."""

    def evened(self, steps_per_epoch: int) -> Iterable[Iterable[tuple[str, MethodSection]]]:
        """Changes after which steps ask more evenly for data, at the same cost in all.

        Several kinds of them, the ones that change least first; of each kind the choices, in the order in which they
        are to be tried, as what to write (`schedule.shuffle=true`) and the changed settings.
        """
        return ()


Shape = Literal["fixed", "linear", "cosine", "cyclic", "list", "stages"]
Level = Annotated[float, Gt(0), Le(1), OneOf((0.2, 0.4, 0.6, 0.8, 1.0))]
"""What the ramps round to: a whole run sees at most these."""


def _of(*names: Shape) -> ReadIf:
    *first, last = names
    listed = f"{', '.join(first)} or {last}" if first else last
    return ReadIf(lambda at: at.own.name in names, f"schedule.name={listed}")


_USUAL_STAGES = ((0.4, 1.0), (7.0, 3.0))
"""Rhos and lengths of `stages`, where none are set."""
_RAMPS = _of("linear", "cosine", "cyclic")
_CUT = ReadIf(
    # Cycles do not depend on the length of the run: a cooldown cuts them off in every form.
    lambda at: at.own.form != "cut" or at.own.name != "cyclic",
    "schedule.name=linear or cosine",
)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(MethodSection, section="schedule"):
    """The patch sampling schedule, rho as a function of the step; for methods that ask for one.

    Some settings belong to some schedules only. One that is left at None has the value that its schedule usually has,
    which the properties tell.
    """

    in_epochs = ("cooldown_epochs",)

    name: Always[Shape] = "cyclic"
    """The shape over time."""
    form: Annotated[Literal["published", "cut", "symmetric"] | None, _RAMPS, _CUT] = None
    """`published`, what None stands for, overshoots to a drop of -0.1 before clamping, which gives rho = 1 a full share
    of the steps; `symmetric` stops at a drop of 0. The `published` climb of linear and cosine ends where the cooldown
    begins; `cut` is the same climb over the whole run, whose end the cooldown cuts off."""
    low: Annotated[Level | None, _RAMPS] = None
    """Smallest rho of linear, cosine and cyclic; None is 0.2."""
    high: Annotated[Level | None, _RAMPS] = None
    """Largest rho of linear, cosine and cyclic; None is 1."""
    rho: Annotated[Share | None, _of("fixed")] = None
    """The constant rho of `fixed`; None is 0.6."""
    rhos: Annotated[tuple[Share, ...], _of("list", "stages")] = ()
    """The values of `list`, one a step, over and over, or of `stages`, one after the other; none are 0.4 and 1 of
    `stages`."""
    lengths: Annotated[tuple[AboveZero, ...], _of("stages")] = ()
    """How long each of `stages` is, relative to the others, in the steps before the cooldown: 3,1 are three quarters
    and one. None are alike; without `schedule.rhos` 7,3."""
    period_steps: Annotated[Positive | None, _of("cyclic")] = None
    """Length of a cycle, in steps; None is one epoch, as published."""
    shuffle: Annotated[bool, _of("linear", "cosine", "cyclic", "list")] = False
    """Take the steps of each cycle (of each epoch, where there are no cycles) in random order: the same levels as
    often, so that a loader needs to keep up with their average only."""
    cooldown_epochs: Always[Natural] = 0
    """The last epochs, at rho = 1."""

    @property
    def shape_form(self) -> str:
        """Of linear, cosine and cyclic: the form in force."""
        return self.form or "published"

    @property
    def span(self) -> tuple[float, float]:
        """Of linear, cosine and cyclic: smallest and largest rho."""
        return 0.2 if self.low is None else self.low, 1.0 if self.high is None else self.high

    @property
    def constant(self) -> float:
        """Of fixed: its rho."""
        return 0.6 if self.rho is None else self.rho

    @property
    def stages(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Of stages: their rhos and their lengths."""
        rhos, lengths = (self.rhos, (1.0,) * len(self.rhos)) if self.rhos else _USUAL_STAGES
        return rhos, self.lengths or lengths

    def check(self) -> None:
        for found in unread_at(Context(self)):  # of a schedule's settings, all depend on the schedule alone
            if found.value != found.default:
                raise found.error()
        if self.name == "list" and not self.rhos:
            raise ValueError("schedule.name is list and schedule.rhos is empty; --set schedule.rhos=0.6,1.0 names them")
        if self.name == "stages" and len(self.stages[0]) != len(self.stages[1]):
            rhos, lengths = self.stages
            raise ValueError(
                f"schedule.lengths has {len(lengths)} numbers for {len(rhos)} stages "
                f"(schedule.rhos={','.join(map(str, rhos))}); name one for each, or leave schedule.lengths out"
            )
        low, high = self.span
        if low > high:
            raise ValueError(f"schedule.low ({low}) is above schedule.high ({high})")

    def check_run(self, config: Any) -> None:
        if self.cooldown_epochs > config.train.epochs:
            raise ValueError(
                f"schedule.cooldown_epochs is {self.cooldown_epochs}; it must lie between 0 and the run's "
                f"{config.train.epochs} epochs (--set schedule.cooldown_epochs=0)"
            )

    def check_steps(self, config: Any, steps_per_epoch: int) -> None:
        total = (config.train.epochs - self.cooldown_epochs) * steps_per_epoch
        if self.period_steps is not None and total and self.period_steps > total:
            raise ValueError(
                f"schedule.period_steps is {self.period_steps:,}, and the run has {total:,} steps before its cooldown: "
                f"no cycle would end; set schedule.period_steps={steps_per_epoch}, or schedule.name=linear"
            )
        if self.name == "stages" and total:
            rhos, lengths = self.stages
            for number, count in enumerate(Stages(rhos, lengths, total).counts):
                if not count:
                    raise ValueError(
                        f"stage {number + 1} of schedule.name=stages (rho {rhos[number]}) has no step among the "
                        f"{total:,} before the cooldown; lengthen it (schedule.lengths), or raise train.epochs"
                    )

    @classmethod
    def from_dict(cls, raw: Any) -> Self:
        return super().from_dict(_without_former_defaults(raw))

    def evened(self, steps_per_epoch: int) -> Iterable[Iterable[tuple[str, MethodSection]]]:
        if self.name in ("fixed", "stages"):
            return
        yield [("schedule.shuffle=true", dataclasses.replace(self, shuffle=True))]
        if self.name == "cyclic":
            longest = self.period_steps or steps_per_epoch
            shorter = [longest // 2**power for power in range(1, max(1, int(math.log2(longest / 10)) + 1))]
            yield [
                (f"schedule.period_steps={steps}", dataclasses.replace(self, period_steps=steps)) for steps in shorter
            ]


@dataclass(frozen=True, kw_only=True)
class OptionalSchedule(ScheduleConfig, section="schedule"):
    """The same for methods that train on all patches unless a schedule is set: `fixed`, at rho = 1."""

    name: Always[Shape] = "fixed"

    @property
    def constant(self) -> float:
        """Of fixed: its rho, where None is 1."""
        return 1.0 if self.rho is None else self.rho


_FORMER_DEFAULTS: Json = {"form": "published", "low": 0.2, "high": 1.0, "rho": 0.6}


def _without_former_defaults(raw: Any) -> Any:
    """What a file says of a schedule, without what no one has set.

    Before each schedule had settings of its own, config.json held a value for all of these; no file now does.
    """
    if not isinstance(raw, dict) or any(raw.get(name) is None for name in _FORMER_DEFAULTS):
        return raw
    return {name: value for name, value in raw.items() if value != _FORMER_DEFAULTS.get(name)}
