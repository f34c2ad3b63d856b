"""What a step takes, made of a loader's batch: augmented images, mixed with each other, and their targets."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pipelines.augment import Mixing
from pipelines.augment.device import DeviceTransform
from pipelines.base import Batch
from pss.config import Config
from pss.methods import DenseTargets, Method


@dataclass(frozen=True)
class StepInputs:
    """What a step takes, on its device."""

    images: Tensor
    """float32 (B, 3, S, S), normalised."""
    targets: Tensor
    """Labels, int64 (B,); where the loop mixes images, their mixed targets, float32 (B, classes)."""
    dense: DenseTargets | None = None
    """What a dense loss needs, for a method that wants it."""

    def chunk(self, parts: int) -> list[StepInputs]:
        """As `Tensor.chunk`, along the batch."""
        if parts == 1:
            return [self]
        dense = [None] * parts if self.dense is None else self.dense.chunk(parts)
        pieces = zip(self.images.chunk(parts), self.targets.chunk(parts), dense, strict=True)
        return [StepInputs(*piece) for piece in pieces]


class TrainingInputs:
    """Makes `StepInputs` of the batches of a run: a pure function of batch, epoch and step, called from any thread."""

    def __init__(self, config: Config, method: Method, mixing: Mixing | None, steps_per_epoch: int) -> None:
        self._wants = method.wants(config)
        self._transform = DeviceTransform(config.data, seed=config.train.seed, train=True)
        self._mixing, self._steps_per_epoch = mixing, steps_per_epoch

    def __call__(self, batch: Batch, epoch: int, step: int) -> StepInputs:
        """`step` counts from the beginning of `epoch`."""
        dense = None
        if self._wants:
            images, view = self._transform.with_view(batch, epoch)
            dense = DenseTargets(view if "view" in self._wants else None, batch.maps if "maps" in self._wants else None)
        else:
            images = self._transform(batch, epoch)
        targets = batch.labels
        if self._mixing is not None:
            images, targets = self._mixing(images, targets, epoch * self._steps_per_epoch + step)
        return StepInputs(images, targets, dense)
