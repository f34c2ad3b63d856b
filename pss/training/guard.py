"""A step whose loss or gradients are not finite, or too large for the optimizer, changes nothing, on any process, and
is counted. One that breaks the weights all the same ends the run before they are saved.

Nothing here reads a value from the device: whether a step counts is decided there, and told when the log asks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pss.runtime.shards import own_part, whole
from pss.training.tensors import Inventory, total_norm


class Guard:
    """Judges each step by its gradient norm, which is the same on every process once gradients are averaged."""

    def __init__(self, device: torch.device, limit: int) -> None:
        """`limit`: how many steps in a row may be skipped."""
        self.limit = limit
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        """Steps skipped: in all, in a row up to now, and the longest row since `check`."""
        self._looked = 0
        """The first step that was looked at; the others followed one by one."""
        self._sound = torch.ones((), dtype=torch.bool, device=device)
        """Whether the weights have been finite up to now."""
        self._sound_steps = torch.zeros((), dtype=torch.int64, device=device)
        """Of those looked at."""
        self._one = torch.ones((), device=device)

    def backward(self, loss: Tensor) -> None:
        """Gradients of `loss`, to the bit where it is finite. Where it is not, all are NaN, and so is their average
        over processes, even where they alone would have been finite."""
        torch.autograd.backward(loss, torch.rsub(loss.detach(), 1, alpha=0))  # 1, or NaN

    def judge(self, loss: Tensor, norm: Tensor, clip: float | None = None) -> tuple[Tensor, Tensor]:
        """Whether a step is skipped, and what of it goes into averages.

        It is where the gradients are not finite, or the optimizer could not square them: its second moments would be
        infinite from then on, and those weights would never move again.

        Args:
            loss: of this process, scalar.
            norm: of the gradients, averaged over processes, before clipping; scalar.
            clip: what the norm will be clipped to, if it is.

        Returns:
            1.0 if the optimizer must skip this step, else 0.0 (its `found_inf`); and loss, norm and 1, or three zeros.
        """
        # Few operations, as each is a launch. What is squared is infinite, or NaN, or all is well.
        squared = (norm if clip is None else norm.clamp(max=clip)).float().square()
        if clip is not None:
            squared = squared.add(norm, alpha=0)  # NaN where it is not finite before it is clipped
        bad = (squared < math.inf).logical_not()
        total, row, longest = self.counts.unbind()
        total += bad
        torch.addcmul(bad, row, bad, out=row)  # one more, or 0
        torch.maximum(longest, row, out=longest)
        measured = torch.stack((loss.detach().float(), norm.float(), self._one)).masked_fill_(bad, 0.0)
        return bad.float(), measured

    @torch.no_grad()
    def look(self, model: Inventory, step: int) -> None:
        """Remember the first `step` after which weights that are trained are not finite, or too large to be squared;
        call it after every one."""
        norm = whole(total_norm(model.trained, alike=model.alike))
        self._looked = self._looked or step
        self._sound.logical_and_(norm < math.inf)
        self._sound_steps += self._sound

    def check(self, step: int) -> int:
        """Steps skipped so far. Reads from the device.

        Raises:
            ValueError: more in a row than allowed, at some time since the last check; or a step has broken the weights.
        """
        total, row, longest = self.counts.tolist()
        if not self._sound:
            after = self._looked + int(self._sound_steps)
            raise ValueError(
                f"step {after} left weights that are not finite, or about to be; they are in no checkpoint: start "
                "anew from the newest one (--set model.weights=RUN) with a lower optim.lr or optim.weight_decay, or "
                "with optim.clip_grad"
            )
        if longest >= self.limit:
            raise ValueError(
                f"the loss or its gradients were not finite in {longest} steps in a row, up to step {step}; none of "
                "them changed the weights or is in a checkpoint: start anew from there (--set model.weights=RUN) with "
                "a lower optim.lr or train.precision=fp32, or look at the data"
            )
        self.counts[2] = row
        return int(total)


class Statistics:
    """Floating-point buffers, such as running statistics, which a forward pass may change: a skipped step must not."""

    @torch.no_grad()
    def __init__(self, model: Inventory) -> None:
        """Remember those of `model` before a step."""
        self._before = [(part, part.clone()) for part in model.buffers() if part.is_floating_point()]

    @torch.no_grad()
    def settle(self, skip: Tensor) -> None:
        """Put them back where `skip` is 1.0."""
        if self._before:
            skipped = skip.bool()
            for buffer, before in self._before:
                torch.where(skipped, before, buffer, out=buffer)


def skipping(optimizer: torch.optim.AdamW, skip: Tensor) -> None:
    """Have the next step of a fused optimizer change nothing where `skip` is 1.0: what `torch.amp` uses as well."""
    optimizer.found_inf = skip  # type: ignore[attr-defined]


@torch.no_grad()
def update_average(average: Inventory, model: Inventory, decay: float, skipped: Tensor) -> None:
    """Move the average towards the weights as `ModelEmaV3.update` does, not at all where `skipped` is 1.0."""
    share = torch.rsub(skipped, 1 - decay, alpha=1 - decay)  # 1 - decay, or 0
    averages: list[Tensor] = list(average.parameters)
    differences: list[Tensor] = list(model.parameters)
    for old, new in zip(average.state()[len(averages) :], model.state()[len(differences) :], strict=True):
        if old.is_floating_point():
            averages.append(old)
            differences.append(new)
        else:
            own_part(old).copy_(own_part(new))
    if model.sharded:
        averages, differences = list(map(own_part, averages)), list(map(own_part, differences))
    moves = list(torch._foreach_sub(differences, averages))
    torch._foreach_mul_(moves, share)
    torch._foreach_add_(averages, moves)
