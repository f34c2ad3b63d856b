"""A step whose loss or gradients are not finite, or too large for the optimizer, changes nothing, on any process, and
is counted. One that breaks the weights all the same ends the run before they are saved.

Nothing here reads a value from the device: whether a step counts is decided there, and told when the log asks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pss.runtime.shards import own_part, whole
from pss.training.tensors import Inventory, total_norm


class Guard:
    """Judges each step by its gradient norm, which is the same on every process once gradients are averaged."""

    def __init__(self, device: torch.device, limit: int) -> None:
        """`limit`: how many steps in a row may be skipped."""
        self.limit = limit
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        """Steps skipped: in all, in a row up to now, and the longest row since `check`. Written in place."""
        self._total, self._row, self._longest = self.counts.unbind()
        self._watched: Inventory | None = None
        self._sound_until = 0
        """The step after which the weights were last seen to be finite."""
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
            loss: of this process, scalar, without its graph.
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
        self._total += bad
        torch.addcmul(bad, self._row, bad, out=self._row)  # one more, or 0
        torch.maximum(self._longest, self._row, out=self._longest)
        measured = torch.stack((loss.float(), norm.float(), self._one)).masked_fill_(bad, 0.0)
        return bad.float(), measured

    def watch(self, model: Inventory, step: int) -> None:
        """Have `check` look at the weights of `model` that are trained, which are as `step` left them."""
        self._watched, self._sound_until = model, step

    @property
    def skipped(self) -> int:
        """Steps skipped so far. Reads from the device."""
        return int(self.counts[0])

    @torch.no_grad()
    def check(self, step: int) -> int:
        """Steps skipped so far. Reads from the device; every process must ask, as weights may be shards.

        Raises:
            ValueError: more in a row than allowed, at some time since the last check; or a step has broken the weights,
                or left them too large to be squared.
        """
        sound = True
        if self._watched is not None:
            sound = bool(whole(total_norm(self._watched.trained, alike=self._watched.alike)) < math.inf)
        total, row, longest = self.counts.tolist()
        if not sound:
            first = self._sound_until + 1
            last = max(first, step - row)  # a step that is skipped breaks nothing
            told = f"step {last}" if first == last else f"one of steps {first} to {last}"
            raise ValueError(
                f"{told} left weights that are not finite, or about to be; they are in no checkpoint: start "
                "anew from the newest one (--set model.weights=RUN) with a lower optim.lr or optim.weight_decay, or "
                "with optim.clip_grad"
            )
        self._sound_until = step
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

    def __init__(self, model: Inventory) -> None:
        """Remember those of `model` before a step."""
        self._before = [(part, part.clone()) for part in map(torch.detach, model.statistics())]

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
    """Move the average towards the weights as `ModelEmaV3.update` does, not at all where `skipped` is 1.0. Buffers are
    copied: running statistics are averages as they are, of the activations that there are now."""
    share = torch.rsub(skipped, 1 - decay, alpha=1 - decay)  # 1 - decay, or 0
    averages: list[Tensor] = list(average.parameters)
    differences: list[Tensor] = list(model.parameters)
    for old, new in zip(average.saved_buffers(), model.saved_buffers(), strict=True):
        own_part(old).copy_(own_part(new))
    if model.sharded:
        averages, differences = list(map(own_part, averages)), list(map(own_part, differences))
    moves = list(torch._foreach_sub(differences, averages))
    torch._foreach_mul_(moves, share)
    torch._foreach_add_(averages, moves)


@torch.no_grad()
def average_of_frozen(average: nn.Module, model: nn.Module) -> None:
    """Give the average of a parameter that a phase leaves as it is that very value, or it would lag behind for long: in
    a short phase it has hardly moved."""
    for old, new in zip(average.parameters(), model.parameters(), strict=True):
        if not new.requires_grad:
            own_part(old).copy_(own_part(new))
