"""What a method and the rest of pss speak of: where a run is, what steps have in common, what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipelines.base import View
from pss.runtime.shards import own_part, part_like
from pss.sections import OptimConfig

Point = float | None
"""What a model is run at: the value of the method's knob, such as ρ; None for a method that has no knob."""


class Progress(NamedTuple):
    """Where the run is. Everything that varies over a run is a function of this, so a resumed run repeats it.

    A tuple, as a plan makes one for every step of a run.
    """

    step: int  # optimizer steps taken before this one, over all phases
    total_steps: int  # of all phases
    epoch: int  # epochs completed before this one, over all phases
    epochs: int  # of all phases
    seed: int
    rank: int
    phase: int = 0  # which of `Method.phases` it belongs to


@dataclass(frozen=True)
class Phase:
    """A stretch of epochs with one set of trainable parameters; it begins with a fresh optimizer and DDP wrapper."""

    name: str
    epochs: int
    optim: OptimConfig


class Stage(NamedTuple):
    """What training steps have in common that cost the same, such as those with the same share of patches."""

    rho: float = 1.0
    """The share of an image's tokens that the step sees, as the log shows it."""
    name: str = ""
    """Tells stages with the same rho apart: `frozen`, say."""

    def __str__(self) -> str:
        return f"{self.rho:g} {self.name}".rstrip()


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one image."""

    backbone: int
    extra: int = 0
    """Parts of the method's own, such as predictors."""
    teacher: int = 0
    """Forward passes that nothing is learnt through."""
    backward: int | None = None
    """Of a training step; None for twice the forward pass of backbone and extra parts."""

    @property
    def forward(self) -> int:
        return self.backbone + self.extra + self.teacher

    @property
    def training(self) -> int:
        """Of a whole training step."""
        return self.forward + (2 * (self.backbone + self.extra) if self.backward is None else self.backward)


@dataclass(frozen=True)
class DenseTargets:
    """What a dense loss needs beside the labels; the method says in `wants` what it is to be given."""

    view: View | None = None
    """Where on the sample's image each input lies."""
    maps: Tensor | None = None
    """Label maps of whole samples, (B, ...)."""

    def chunk(self, parts: int) -> list[DenseTargets]:
        """As `Tensor.chunk`, along the batch."""
        views = [None] * parts if self.view is None else self.view.chunk(parts)
        maps = [None] * parts if self.maps is None else self.maps.chunk(parts)
        return [DenseTargets(view, some) for view, some in zip(views, maps, strict=True)]


@dataclass(frozen=True)
class Step:
    """An optimizer step that was taken, or skipped because its gradients were not finite."""

    optimizer: torch.optim.Optimizer
    skipped: Tensor
    """1.0 if it was skipped, else 0.0; a scalar on the device, the same on every process."""

    @property
    def taken(self) -> bool:
        """Whether it changed the weights. Waits for the device: ask in rare steps only."""
        return not bool(self.skipped)

    @torch.no_grad()
    def reset_moments(self, parameter: nn.Parameter, where: Tensor) -> None:
        """Forget the optimizer's averages of a parameter at some positions, unless the step was skipped.

        Args:
            parameter: One of the optimizer's.
            where: bool, of the parameter's whole shape, the same on every process.
        """
        positions = part_like(where, parameter) & (self.skipped == 0)
        for average in self.optimizer.state[parameter].values():
            if isinstance(average, Tensor) and average.shape == parameter.shape:
                own_part(average).masked_fill_(positions, 0)


def mean_tokens(tokens: tuple[int, ...]) -> int | float:
    """Tokens of an image in an average block: a whole number where all blocks see as many."""
    return tokens[0] if len(set(tokens)) == 1 else round(sum(tokens) / len(tokens), 1)
