"""A step whose loss or gradients are not finite, or too large for the optimizer, changes nothing, on any process, and
is counted. One that breaks the weights all the same ends the run before they are saved.

Nothing here reads a value from the device: whether a step counts is decided there, and told when the log asks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from pss.runtime.shards import own_part, whole


class Guard:
    """Judges each step by its gradient norm, which is the same on every process once gradients are averaged."""

    def __init__(self, device: torch.device, limit: int) -> None:
        """`limit`: how many steps in a row may be skipped."""
        self.limit = limit
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        """Steps skipped: in all, in a row up to now, and the longest row since `check`."""
        self._broken = torch.full((), -1, dtype=torch.int64, device=device)
        """The step after which the weights were not finite; -1 while they are."""
        self._ones = torch.ones(3, device=device)

    def backward(self, loss: Tensor) -> None:
        """Gradients of `loss`, to the bit where it is finite. Where it is not, all are NaN, and so is their average
        over processes, even where they alone would have been finite."""
        torch.autograd.backward(loss * (1 + 0 * loss.detach()))

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
        used = norm if clip is None else norm.clamp(max=clip)  # NaN stays NaN, and infinity is none that clips
        bad = ~torch.isfinite(norm) | ~torch.isfinite(used.float().square())
        total, row, longest = self.counts.unbind()
        total += bad
        row += 1
        row *= bad
        torch.maximum(longest, row, out=longest)
        measured = torch.where(bad, 0.0, torch.stack((loss.detach().float(), norm.float(), self._ones[0])))
        return bad.float(), measured

    @torch.no_grad()
    def look(self, weights: Iterable[Tensor], step: int) -> None:
        """Remember the first `step` after which `weights` are not finite, or too large to be squared."""
        norm = whole(nn.utils.get_total_norm([part.detach() for part in weights]))
        self._broken.copy_(torch.where((self._broken < 0) & ~torch.isfinite(norm), step, self._broken))

    def check(self, step: int) -> int:
        """Steps skipped so far. Reads from the device.

        Raises:
            ValueError: more in a row than allowed, at some time since the last check; or a step has broken the weights.
        """
        total, row, longest, broken = (*self.counts.tolist(), int(self._broken))
        if broken >= 0:
            raise ValueError(
                f"step {broken} left weights that are not finite, or about to be; they are in no checkpoint: start "
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
    def __init__(self, model: nn.Module) -> None:
        """Remember those of `model` before a step."""
        self._before = [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.is_floating_point()]

    @torch.no_grad()
    def settle(self, skip: Tensor) -> None:
        """Put them back where `skip` is 1.0."""
        for buffer, before in self._before:
            buffer.copy_(torch.where(skip.bool(), before, buffer))


def skipping(optimizer: torch.optim.AdamW, skip: Tensor) -> None:
    """Have the next step of a fused optimizer change nothing where `skip` is 1.0: what `torch.amp` uses as well."""
    optimizer.found_inf = skip  # type: ignore[attr-defined]


@torch.no_grad()
def update_average(ema: ModelEmaV3, model: nn.Module, step: int, skipped: Tensor) -> None:
    """Move the average towards the weights as `ModelEmaV3.update` does, not at all where `skipped` is 1.0."""
    share = (1 - ema.get_decay(step)) * (1 - skipped)
    averages, differences = [], []
    pairs = zip(ema.module.state_dict().values(), model.state_dict().values(), strict=True)
    for average, value in ((own_part(a), own_part(b)) for a, b in pairs if isinstance(a, Tensor)):
        if average.is_floating_point():
            averages.append(average)
            differences.append(value)
        else:
            average.copy_(value)
    moves = list(torch._foreach_sub(differences, averages))
    torch._foreach_mul_(moves, share)
    torch._foreach_add_(averages, moves)
