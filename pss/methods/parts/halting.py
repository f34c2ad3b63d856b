"""What A-ViT is made of: the rule by which tokens halt, its prior, and the gate that suits the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor


class Halting(NamedTuple):
    """Where tokens are on their way to halting; tensors of one shape, a number each."""

    total: Tensor  # scores so far
    rest: Tensor  # what is left of 1, for the last block's output
    active: Tensor  # 1, or 0 once halted
    ponder: Tensor  # at the end the number of blocks and the rest
    blocks: Tensor  # so many

    @classmethod
    def begin(cls, shape: Sequence[int], device: torch.device) -> Self:
        zero, one = torch.zeros(*shape, device=device), torch.ones(*shape, device=device)
        return cls(zero, one, one, zero, zero)

    def after(self, scores: Tensor, *, last: bool, eps: float) -> tuple[Halting, Tensor]:
        """The state after a block whose outputs have these scores, and the weight of each output.

        The weights of a token add up to 1 over the blocks. In the last block all halt. What decides who halts takes no
        gradient.
        """
        amount = torch.ones_like(scores) if last else scores
        total = self.total + self.active * amount.detach()
        stops = self.active * (total >= 1 - eps)
        goes = self.active - stops  # the complement: at equality, too, a token does one or the other
        ponder = self.ponder + self.active + self.rest * stops
        state = Halting(total, self.rest - scores * goes, goes, ponder, self.blocks + self.active)
        return state, self.rest * stops + amount * goes


class Record(NamedTuple):
    """What a masked forward pass says; N tokens, L blocks."""

    out: Tensor  # (B, rows, D): of the tokens that the classifier reads
    scores: Tensor  # (B, L, N); those of tokens that had halted are 0, or as published (`avit.reference`)
    weights: Tensor  # (B, L, N)
    ponder: Tensor  # (B, N)
    blocks: Tensor  # (B, N): 1 to L


def prior_loss(scores: Tensor, target_depth: float, *, reference: bool = False) -> Tensor:
    """Kullback-Leibler divergence of the scores' mean profile over the blocks from a Gaussian around `target_depth`.

    Args:
        scores: Of patches, (B, L, patches).
        target_depth: Mean in blocks from 0; the standard deviation is 1.
        reference: As published: the target's entries below its mean add up to 0.98, the profile is clamped to
            [0.01, 0.99], the sum is divided by L, and counts if it is positive.
    """
    num_blocks = scores.shape[1]
    profile = scores.mean((0, 2))
    profile = profile / (profile.sum() + 1e-20)
    block = torch.arange(num_blocks, device=scores.device, dtype=torch.float32)
    log_target = -((block - target_depth) ** 2) / 2
    if not reference:
        log_target = log_target.log_softmax(0)
        profile = profile.clamp(min=1e-6)
        return (log_target.exp() * (log_target - (profile / profile.sum()).log())).sum()
    below = sum(math.exp(-((number - target_depth) ** 2) / 2) for number in range(math.ceil(target_depth)))
    log_target = log_target + math.log(0.98 / below)
    divergence = (log_target.exp() * (log_target - profile.clamp(0.01, 0.99).log())).sum()
    return (divergence / num_blocks).clamp(min=0)


def center_of(channels: Tensor, depth_share: float, eps: float) -> float:
    """A gate's centre at which tokens go through `depth_share` of the blocks on average, as the weights are.

    It is found on tokens as they are when none halts; when some do, the others change a little, and their depth too.

    Args:
        channels: What the centre is subtracted from, of every block, (L, B, N).
        depth_share: In (0, 1]; the smallest that there is, is 1 / L.
        eps: A token halts at a sum of 1 less this.

    Returns:
        The centre, to three digits after the point.
    """
    num_blocks = len(channels)
    low, high = float(channels.min()) - 20, float(channels.max()) + 20
    for _ in range(40):
        center = (low + high) / 2
        state = Halting.begin(channels.shape[1:], channels.device)
        for number, value in enumerate(channels):
            state, _ = state.after((value - center).sigmoid(), last=number == num_blocks - 1, eps=eps)
        enough = float(state.blocks.mean()) / num_blocks >= depth_share
        low, high = (low, center) if enough else (center, high)
    return round(high, 3)
