"""Training under a patch sampling schedule (McDanel & Huynh 2022, section 3)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pss.methods.patches import PatchMethod
from pss.methods.vocabulary import DenseTargets, Progress, Stage
from pss.models.vit import VisionTransformer
from pss.schedules import Cosine, Cyclic, Fixed, Linear, Listed, Schedule, Shuffled, Stages
from pss.sections import RunSettings, ScheduleConfig


class Sampled(PatchMethod):
    """Each step sees the share of patches that the schedule gives it."""

    name = "sampled"
    sections = (ScheduleConfig, *PatchMethod.sections)

    def __init__(self, model: VisionTransformer, config: RunSettings, steps_per_epoch: int) -> None:
        super().__init__(model, config, steps_per_epoch)
        self.schedule = build_schedule(config, config.section_of(ScheduleConfig), steps_per_epoch)

    def course(self) -> str:
        return f"ρ: {course(self.config, self.config.section_of(ScheduleConfig), self.steps_per_epoch)}"

    def stage(self, at: Progress) -> Stage:
        return Stage(self.schedule(at.step))

    def forward(
        self, images: Tensor, targets: Tensor, at: Progress, dense: DenseTargets | None = None
    ) -> dict[str, Tensor]:
        entered = self.enter(images, at, self.schedule(at.step))
        tokens = self.model.compute(self.model.trunk, entered.tokens, entered.places)
        return self.losses(tokens, entered, targets, dense)


def build_schedule(config: RunSettings, settings: ScheduleConfig, steps_per_epoch: int) -> Schedule:
    """The schedule that `settings` describe, as a function of the global step of the run that `config` describes."""
    cooldown = (config.train.epochs - settings.cooldown_epochs) * steps_per_epoch if settings.cooldown_epochs else None
    block = steps_per_epoch
    schedule: Schedule
    if settings.name == "fixed":
        schedule = Fixed(settings.constant, cooldown)
    elif settings.name == "list":
        schedule = Listed(settings.rhos, cooldown)
    elif settings.name == "stages":
        before = (config.train.epochs - settings.cooldown_epochs) * steps_per_epoch
        schedule = Stages(*settings.stages, before or 1, cooldown)
    else:
        low, high = settings.span
        options: dict[str, Any] = {
            "steps_per_epoch": steps_per_epoch,
            "epochs": config.train.epochs,
            "cooldown_epochs": settings.cooldown_epochs,
            "low": low,
            "high": high,
        }
        if settings.name == "cyclic":
            options["period_steps"] = settings.period_steps
            block = settings.period_steps or steps_per_epoch
        ramps: dict[str, type[Linear | Cosine | Cyclic]] = {"linear": Linear, "cosine": Cosine, "cyclic": Cyclic}
        schedule = getattr(ramps[settings.name], settings.shape_form)(**options)
    if settings.shuffle:
        schedule = Shuffled(of=schedule, block_steps=block, seed=config.train.seed, stop=cooldown)
    return schedule


def course(config: RunSettings, settings: ScheduleConfig, steps_per_epoch: int) -> str:
    """The schedule in words: which rho comes when."""
    cooled, epochs = settings.cooldown_epochs, config.train.epochs
    if cooled == epochs:
        return f"1.0 throughout (schedule.cooldown_epochs={cooled} is the whole run)"
    low, high = settings.span
    words = [f"{low}→{high}"]
    if settings.name == "fixed":
        words = [f"{settings.constant}"]
        if not cooled:
            words.append("throughout")
    elif settings.name == "list":
        words = ["the list", ", ".join(map(str, settings.rhos)), "over and over, one a step"]
    elif settings.name == "stages":
        words = [_stages(settings, (epochs - cooled) * steps_per_epoch, steps_per_epoch)]
    elif settings.name == "cyclic":
        words.insert(0, "cyclic")
        period = settings.period_steps
        words.append(f"within each epoch of {steps_per_epoch:,} steps" if period is None else f"every {period:,} steps")
    else:
        words.insert(0, settings.name)
        climb = epochs - cooled if settings.shape_form == "published" else epochs
        words.append(f"over {_epochs(climb)}")
    if settings.name in ("linear", "cosine", "cyclic") and settings.shape_form != "published":
        words.append(f"({settings.shape_form})")
    if settings.shuffle:
        words.append("in random order")
    return " ".join(words) + (f", then {_epochs(cooled)} at 1.0" if cooled else "")


def _stages(settings: ScheduleConfig, num_steps: int, steps_per_epoch: int) -> str:
    rhos, lengths = settings.stages
    parts = zip(rhos, Stages(rhos, lengths, num_steps).counts, strict=True)
    first, *others = [f"{rho} for {steps / steps_per_epoch:.3g} epochs" for rho, steps in parts]
    return ", then ".join([first, *others])


def _epochs(count: int) -> str:
    return f"{count:,} epoch{'s' * (count != 1)}"
