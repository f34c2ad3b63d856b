"""The optimizer of a phase and its learning rates as a function of the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from pss.config import OptimConfig
from pss.methods import Method, Phase, Progress


def peak_lr(optim: OptimConfig, batch_size: int) -> float:
    """The peak learning rate at a global batch of `batch_size` images."""
    return optim.peak_lr(batch_size)


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, the same numbers in fewer operations and a tenth of the host's time."""

    _lists: list[tuple[dict[str, Any], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]] | None = None
    """Of each group: itself, its parameters, their averages, averages of squares and steps. None until all are there
    and alike."""
    _places: tuple[Sequence[Tensor], list[list[int]] | None] | None = None
    """Parameters that `advance` was given, and where those of each group are in them, if all are."""

    def step(self, closure: Any = None) -> Any:
        """One step; none where `found_inf`, which the loop sets, is 1.0."""
        return super().step(closure) if closure is not None or not self._step_at_once(self._gradients()) else None

    def advance(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """`step` without what torch wraps around it for profilers and hooks, which takes longer than what is within.

        `gradients` are those of `parameters` that have one, in that order: reading them anew takes longer than finding
        them. Both are the lists of an `Inventory`, of which the parameters' stays the same one.
        """
        if not self._step_at_once(self._sorted(parameters, gradients) or self._gradients()):
            super().step()

    def _gradients(self) -> list[list[Tensor]] | None:
        """Of each group; None where a parameter has none."""
        found = [[part.grad for part in group["params"] if part.grad is not None] for group in self.param_groups]
        whole = all(len(own) == len(group["params"]) for own, group in zip(found, self.param_groups, strict=True))
        return found if whole else None

    def _sorted(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[list[Tensor]] | None:
        """Of each group, from a list of all; None where a parameter has none."""
        if len(gradients) < len(parameters):
            return None
        if self._places is None or self._places[0] is not parameters:
            at = {id(part): place for place, part in enumerate(parameters)}
            groups = [[at.get(id(part), -1) for part in group["params"]] for group in self.param_groups]
            self._places = (parameters, None if any(-1 in places for places in groups) else groups)
        found = self._places[1]
        return None if found is None else [[gradients[place] for place in places] for places in found]

    @torch.no_grad()
    def _step_at_once(self, gradients: list[list[Tensor]] | None) -> bool:
        """One step of all parameters, if all have gradients, by group, and averages; else nothing. Whether it was
        taken."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is None or gradients is None or not self._found():
            return False
        assert self._lists is not None
        took = torch.rsub(found_inf, 1)  # torch adds 1 to every count, and takes it back again
        for own, (group, parts, averages, squares, steps) in zip(gradients, self._lists, strict=True):
            torch._foreach_add_(steps, took, alpha=1)  # without alpha torch would read the number
            torch._fused_adamw_(
                parts,
                own,
                averages,
                squares,
                [],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                found_inf=found_inf,
            )
        return True

    def _found(self) -> bool:
        """Whether there are `_lists`; the first step of torch's makes the averages."""
        if self._lists is None:
            every = [part for group in self.param_groups for part in group["params"]]
            if len({(part.dtype, part.device) for part in every}) == 1 and all(self.state[part] for part in every):
                self._lists = []
                for group in self.param_groups:
                    states = [self.state[part] for part in group["params"]]
                    kinds = [[state[kind] for state in states] for kind in ("exp_avg", "exp_avg_sq", "step")]
                    self._lists.append((group, group["params"], kinds[0], kinds[1], kinds[2]))
        return self._lists is not None

    def load_state_dict(self, state_dict: Any) -> None:
        """As torch's."""
        super().load_state_dict(state_dict)
        self._lists = self._places = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        super().add_param_group(param_group)
        self._lists = self._places = None


def build_optimizer(
    method: Method, phase: Phase, *, batch_size: int, steps_per_epoch: int
) -> tuple[AdamW, CosineLRScheduler]:
    """AdamW over the method's groups, and a scheduler whose `step_update(step)` sets the rates of a step.

    The scheduler counts the phase's own steps from 0: linear warm-up, then a cosine to `min_lr`, which it reaches
    where the cool-down begins, at the latest at the phase's end. A
    group's `lr_scale` is a factor on its peak alone; all groups begin and end at the same rate.
    """
    optim = phase.optim
    lr = peak_lr(optim, batch_size)
    optimizer = AdamW(_groups(method, phase, lr), lr=lr, betas=optim.betas, fused=True)
    return optimizer, lr_schedule(optimizer, phase, steps_per_epoch)


def lr_schedule(optimizer: torch.optim.Optimizer, phase: Phase, steps_per_epoch: int) -> CosineLRScheduler:
    """The scheduler of `build_optimizer` for groups whose rates are their peaks."""
    optim = phase.optim
    warmup_steps = round(optim.warmup_epochs * steps_per_epoch)
    steps = phase.epochs * steps_per_epoch - round(optim.cooldown_epochs * steps_per_epoch)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=max(1, steps - warmup_steps if optim.warmup_prefix else steps),
        lr_min=optim.min_lr,
        warmup_t=warmup_steps,
        warmup_lr_init=optim.warmup_lr,
        warmup_prefix=optim.warmup_prefix,
        t_in_epochs=False,
        cycle_decay=0.5,  # of a second cycle, which never comes: timm warns of a cosine of one step without it
    )
    schedule.step_update(0)
    return schedule


def _groups(method: Method, phase: Phase, lr: float) -> list[dict[str, Any]]:
    groups = [{**group, "lr": lr * group.get("lr_scale", 1.0)} for group in method.param_groups(phase)]
    for group in groups:
        group.pop("lr_scale", None)  # timm would scale the whole course by it, its beginning and its end too
    return groups


def rates_at(method: Method, positions: Sequence[Progress], *, batch_size: int) -> list[tuple[float, float]]:
    """The smallest and the largest learning rate of the groups at each of some ascending positions of a run.

    Nothing is computed of the weights, so that the method may be on the `meta` device; its phases are begun.
    """
    found: list[tuple[float, float]] = []
    first_epoch = 0
    for number, phase in enumerate(method.phases()):
        within = [at for at in positions if at.phase == number]
        if within:
            method.begin_phase(phase)
            groups = _groups(method, phase, peak_lr(phase.optim, batch_size))
            alone = [{**group, "params": [torch.zeros(1, requires_grad=True)]} for group in groups]
            optimizer = torch.optim.SGD(alone)
            schedule = lr_schedule(optimizer, phase, method.steps_per_epoch)
        for at in within:
            step = at.step - first_epoch * method.steps_per_epoch
            set_rates(optimizer, schedule, step, method.lr_factors(at))
            rates = [group["lr"] for group in optimizer.param_groups]
            found.append((min(rates), max(rates)))
        first_epoch += phase.epochs
    return found


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
