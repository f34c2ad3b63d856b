"""Training under a patch sampling schedule (McDanel & Huynh 2022, section 3)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pss.methods.contract import Method
from pss.methods.vocabulary import DenseTargets, Progress, Stage
from pss.models.sampling import step_generator
from pss.models.vit import VisionTransformer
from pss.schedules import Cosine, Cyclic, Fixed, Linear, Listed, Schedule, Shuffled
from pss.sections import RunSettings, ScheduleConfig


class Sampled(Method):
    """Each step sees the share of patches that the schedule gives it."""

    name = "sampled"
    sections = (ScheduleConfig,)

    def __init__(self, model: VisionTransformer, config: RunSettings, steps_per_epoch: int) -> None:
        super().__init__(model, config, steps_per_epoch)
        self.schedule = build_schedule(config, config.section_of(ScheduleConfig), steps_per_epoch)

    def stage(self, at: Progress) -> Stage:
        return Stage(self.schedule(at.step))

    def forward(
        self, images: Tensor, targets: Tensor, at: Progress, dense: DenseTargets | None = None
    ) -> dict[str, Tensor]:
        generator = step_generator(at.seed, at.step, at.rank, images.device)
        logits = self.model(images, rho=self.schedule(at.step), generator=generator, low_resolution=True)
        return {"loss": self.classification_loss(logits, targets), "logits": logits}


def build_schedule(config: RunSettings, settings: ScheduleConfig, steps_per_epoch: int) -> Schedule:
    """The schedule that `settings` describe, as a function of the global step of the run that `config` describes."""
    if settings.name == "fixed":
        return Fixed(settings.rho)
    cooldown = (config.train.epochs - settings.cooldown_epochs) * steps_per_epoch if settings.cooldown_epochs else None
    block = steps_per_epoch
    schedule: Schedule
    if settings.name == "list":
        schedule = Listed(settings.rhos, cooldown)
    else:
        options: dict[str, Any] = {
            "steps_per_epoch": steps_per_epoch,
            "epochs": config.train.epochs,
            "cooldown_epochs": settings.cooldown_epochs,
            "low": settings.low,
            "high": settings.high,
        }
        if settings.name == "cyclic":
            options["period_steps"] = settings.period_steps
            block = settings.period_steps or steps_per_epoch
        ramps: dict[str, type[Linear | Cosine | Cyclic]] = {"linear": Linear, "cosine": Cosine, "cyclic": Cyclic}
        ramp = ramps[settings.name]
        # Cycles do not depend on the length of the run: a cooldown cuts them off in every form.
        form = "published" if ramp is Cyclic and settings.form == "cut" else settings.form
        schedule = getattr(ramp, form)(**options)
    if settings.shuffle:
        schedule = Shuffled(of=schedule, block_steps=block, seed=config.train.seed, stop=cooldown)
    return schedule
