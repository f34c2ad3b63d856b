"""The optimizer of a phase and its learning rate as a function of the step."""

from __future__ import annotations

import torch
from timm.scheduler import CosineLRScheduler

from pss.config import OptimConfig
from pss.methods.contract import Method, Phase


def peak_lr(optim: OptimConfig, batch_size: int) -> float:
    """The peak learning rate at a global batch of `batch_size` images."""
    return optim.lr if optim.lr_batch is None else optim.lr * batch_size / optim.lr_batch


def build_optimizer(
    method: Method, phase: Phase, *, batch_size: int, steps_per_epoch: int
) -> tuple[torch.optim.AdamW, CosineLRScheduler]:
    """AdamW over the method's groups, and a scheduler whose `step_update(step)` sets the rate of a step.

    The scheduler counts the phase's own steps from 0: linear warm-up, then a cosine to `min_lr` at the phase's end.
    """
    optim = phase.optim
    lr = peak_lr(optim, batch_size)
    optimizer = torch.optim.AdamW(method.param_groups(phase), lr=lr, betas=optim.betas, fused=True)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=phase.epochs * steps_per_epoch,
        lr_min=optim.min_lr,
        warmup_t=round(optim.warmup_epochs * steps_per_epoch),
        warmup_lr_init=optim.warmup_lr,
        t_in_epochs=False,
    )
    schedule.step_update(0)
    return optimizer, schedule
