"""What sparse training is made of: densities, masks of an exact size, and the rule by which masks move.

Section and appendix numbers are those of Chen et al., 2021 (https://arxiv.org/abs/2106.04533); densities and growth by
gradients are RigL's (Evci et al., 2020).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pss.runtime.shards import own_part, part_like

Distribution = Literal["erk", "uniform"]

_UPDATES = 100
"""In a whole run, the part without updates included, where no interval is given: DeiT-S has 80 in four fifths."""


class Course(NamedTuple):
    """When masks move in a run, and how much of them."""

    total_steps: int
    interval: int
    """Steps from one move to the next."""
    end: float
    """Share of the run after which masks stay."""
    drop: float
    """Share of the active units that the first move would replace, at step 0."""
    min_drop: float
    """What that share falls to at the end of the run, along half a cosine."""

    @classmethod
    def of(cls, total_steps: int, interval: int | None, end: float, drop: float, min_drop: float) -> Course:
        """`interval` None is in proportion to the run: a hundredth of it."""
        return cls(total_steps, interval or max(1, round(total_steps / _UPDATES)), end, drop, min_drop)

    def moves(self, step: int) -> bool:
        """Whether masks move at the end of a step, which is the (step + 1)-th."""
        done = step + 1
        return done % self.interval == 0 and done < self.end * self.total_steps

    def share(self, done: int) -> float:
        """What is replaced of the active units after so many steps."""
        return self.min_drop + (self.drop - self.min_drop) * (1 + math.cos(math.pi * done / self.total_steps)) / 2

    @property
    def last_step(self) -> int:
        """How many steps are done where masks have moved for the last time; 0 if they never do."""
        return (math.ceil(self.end * self.total_steps) - 1) // self.interval * self.interval if self.end else 0


def densities(shapes: Sequence[Sequence[int]], density: float, distribution: Distribution = "erk") -> list[float]:
    """What share of each tensor is active, so that of all together it is `density`.

    `erk` (Erdős-Rényi kernel) gives a tensor of sizes d_1, d_2, … a share in proportion to sum(d) / prod(d); those that
    would get more than all are dense, and the others make up for it. `uniform` gives all the same.
    """
    if distribution == "uniform":
        return [density] * len(shapes)
    sizes = [math.prod(shape) for shape in shapes]
    dense: set[int] = set()
    while True:
        left = density * sum(sizes) - sum(sizes[number] for number in dense)
        scale = left / max(1, sum(sum(shape) for number, shape in enumerate(shapes) if number not in dense))
        shares = [
            1.0 if number in dense else scale * sum(shape) / size
            for number, (shape, size) in enumerate(zip(shapes, sizes, strict=True))
        ]
        full = {number for number, share in enumerate(shares) if share > 1}
        if not full:
            return shares
        dense |= full


def random_mask(shape: Sequence[int], count: int, generator: torch.Generator) -> Tensor:
    """Exactly `count` active entries, drawn on the CPU, bool of that shape."""
    mask = torch.zeros(math.prod(shape), dtype=torch.bool, device="cpu")
    mask[torch.randperm(len(mask), generator=generator, device="cpu")[:count]] = True
    return mask.view(*shape)


class Moved(NamedTuple):
    """A mask after a move, and where it moved; bool tensors of the mask's shape."""

    mask: Tensor
    touched: Tensor
    """Dropped or grown, or both in one."""
    grown: Tensor
    """Active now, and not before."""


def move(mask: Tensor, strength: Tensor, promise: Tensor, count: int, *, regrow: bool = True) -> Moved:
    """Drop the weakest active units and grow as many of the most promising others.

    By indices: equal scores change no count, and the lower index goes first.

    Args:
        mask: Active units, bool.
        strength: Active units with the least of it are dropped; as `mask`.
        promise: Inactive units with the most of it are grown; not negative, as `mask`.
        count: How many; without `regrow` at most as many as are inactive.
        regrow: Let what was just dropped grow again.
    """
    before = mask.flatten()
    drop = strength.flatten().masked_fill(~before, torch.inf).sort(stable=True).indices[:count]
    touched, after = torch.zeros_like(before), before.clone()
    after[drop] = False
    touched[drop] = True
    taken = after if regrow else before
    grow = promise.flatten().masked_fill(taken, -1.0).sort(descending=True, stable=True).indices[:count]
    after[grow] = True
    touched[grow] = True
    after = after.view(mask.shape)
    return Moved(after, touched.view(mask.shape), after & ~mask)


class Masks(nn.Module):
    """Masks as buffers under the names of the parameters that they belong to."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, mask in masks.items():
            *path, last = name.split(".")
            place: nn.Module = self
            for part in path:
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.register_buffer(last, mask)


def hide(tensor: Tensor, mask: Tensor) -> None:
    """Set to zero what a mask hides, in place; either may be a shard.

    Args:
        tensor: A parameter, or its gradient.
        mask: Active entries, bool, the same on every process; of the whole shape, or broadcastable to it.
    """
    own_part(tensor).mul_(_part(mask, tensor))


def put(tensor: Tensor, where: Tensor, values: Tensor) -> None:
    """Write values where a mask is True, in place; arguments as of `hide`."""
    own = own_part(tensor)
    own.copy_(torch.where(_part(where, tensor), _part(values, tensor), own))


def _part(value: Tensor, like: Tensor) -> Tensor:
    return part_like(value.expand(like.shape).contiguous(), like) if isinstance(like, DTensor) else value


def draw_like(tensor: Tensor, generator: torch.Generator, std: float = 0.02) -> Tensor:
    """Fresh initial values, truncated normal as a ViT's, for a parameter's whole shape, on its device."""
    values = torch.empty(tensor.shape, device=own_part(tensor).device)
    return nn.init.trunc_normal_(values, std=std, generator=generator)


def kept(share: float, total: int) -> int:
    """Units that a density leaves, rounded down, one at least."""
    return max(1, math.floor(share * total + 1e-9))
