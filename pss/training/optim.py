"""The optimizer of a phase and its learning rates as a function of the step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from timm.scheduler import CosineLRScheduler

from pss.config import OptimConfig
from pss.methods import Method, Phase


def peak_lr(optim: OptimConfig, batch_size: int) -> float:
    """The peak learning rate at a global batch of `batch_size` images."""
    return optim.peak_lr(batch_size)


def build_optimizer(
    method: Method, phase: Phase, *, batch_size: int, steps_per_epoch: int
) -> tuple[torch.optim.AdamW, CosineLRScheduler]:
    """AdamW over the method's groups, and a scheduler whose `step_update(step)` sets the rates of a step.

    The scheduler counts the phase's own steps from 0: linear warm-up, then a cosine to `min_lr`, which it reaches
    where the cool-down begins, at the latest at the phase's end. A
    group's `lr_scale` is a factor on its peak alone; all groups begin and end at the same rate.
    """
    optim = phase.optim
    lr = peak_lr(optim, batch_size)
    groups = [{**group, "lr": lr * group.get("lr_scale", 1.0)} for group in method.param_groups(phase)]
    for group in groups:
        group.pop("lr_scale", None)  # timm would scale the whole course by it, its beginning and its end too
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=optim.betas, fused=True)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=max(1, phase.epochs * steps_per_epoch - round(optim.cooldown_epochs * steps_per_epoch)),
        lr_min=optim.min_lr,
        warmup_t=round(optim.warmup_epochs * steps_per_epoch),
        warmup_lr_init=optim.warmup_lr,
        t_in_epochs=False,
    )
    schedule.step_update(0)
    return optimizer, schedule


def set_rates(
    optimizer: torch.optim.Optimizer, schedule: CosineLRScheduler, step: int, factors: Mapping[str, float]
) -> None:
    """Give all groups the rates of a step of the phase, those that `factors` names times their factor.

    Raises:
        ValueError: there is no group of such a name.
    """
    schedule.step_update(step)
    missing = set(factors)
    for group in optimizer.param_groups:
        name = group.get("name", "")
        if name in factors:
            group["lr"] *= factors[name]
            missing.discard(name)
    if missing:
        raise ValueError(f"the method sets rates of {', '.join(sorted(missing))}, and no parameter group is called so")
