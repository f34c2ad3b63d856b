"""What a model keeps of the images it classifies: a few of them in full, and how often each place of the grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.base import Batch
from pss.models.vit import VisionTransformer
from pss.runtime.processes import World

_TOP = 3


@dataclass(frozen=True)
class View:
    """One image at one rho."""

    kept: list[int]
    """Indices of the kept patches, ascending."""
    top: list[tuple[int, float]]
    """The likeliest classes and their probabilities, best first."""


@dataclass(frozen=True)
class Picture:
    """One image of the split at every rho."""

    index: int
    label: int
    pixels: Tensor
    """uint8 (3, S, S), as the model sees it before normalisation."""
    views: list[View]


@dataclass(frozen=True)
class Exhibit:
    """What one model keeps at each of `rhos`."""

    rhos: list[float]
    grid: tuple[int, int]
    tokens: list[int]
    """Tokens at each rho, prefix included."""
    frequencies: list[list[float]]
    """Per rho and grid position, in raster order, the share of the split's images that keep the patch."""
    pictures: list[Picture]


class Curator:
    """Watches an evaluation (as `observe` of `pss.inference.evaluate.accuracy`) and picks the images worth showing.

    The split is divided into as many stretches as there are pictures, so that all parts of it are seen. Of each, the
    first image is shown that the model gets right at the largest rho and otherwise at another one; else its first.
    """

    def __init__(
        self,
        model: VisionTransformer,
        *,
        rhos: Sequence[float],
        num_samples: int,
        world: World,
        autocast: Callable[[], AbstractContextManager[Any]],
        size: int = 12,
    ) -> None:
        self._model, self._rhos, self._world, self._autocast = model, list(rhos), world, autocast
        self._num_samples, self._size = num_samples, min(size, num_samples)
        self._largest = max(range(len(rhos)), key=lambda place: rhos[place])
        self._counts = torch.zeros(len(rhos), model.num_patches, dtype=torch.float64, device=world.device)
        self._chosen: dict[int, tuple[bool, int, int, Tensor, Tensor]] = {}

    def __call__(self, batch: Batch, images: Tensor, logits: list[Tensor]) -> None:
        """Take note of a batch."""
        with self._autocast():
            tokens = self._model.embed(images)
        for counts, rho in zip(self._counts, self._rhos, strict=True):
            kept = self._model.sample(tokens, rho)[1]
            if kept is None:
                counts += len(images)
            else:
                counts += torch.bincount(kept.flatten(), minlength=len(counts))
        if self._world.is_main:
            self._choose(batch, images, torch.stack([one.argmax(1) for one in logits]).cpu())

    def _choose(self, batch: Batch, images: Tensor, predicted: Tensor) -> None:
        """`predicted` classes are (rhos, B)."""
        right = predicted[self._largest] == batch.labels.cpu()
        telling = (right & (predicted != predicted[self._largest]).any(0)).tolist()
        for place, index in enumerate(batch.index.tolist()):
            stretch = index * self._size // self._num_samples
            if stretch in self._chosen and (self._chosen[stretch][0] or not telling[place]):
                continue
            label = int(batch.labels[place])
            pixels, image = batch.images[place].cpu(), images[place].clone()
            self._chosen[stretch] = telling[place], index, label, pixels, image

    @torch.inference_mode()
    def exhibit(self) -> Exhibit:
        """All that was seen, on every process; the pictures on the main one only."""
        shares = self._world.sum(self._counts) / self._num_samples
        chosen = [self._chosen[stretch] for stretch in sorted(self._chosen)]
        views: list[list[View]] = [[] for _ in chosen]
        for rho in self._rhos if chosen else ():
            images = torch.stack([image for *_, image in chosen])
            for per_image, view in zip(views, self._views(images, rho), strict=True):
                per_image.append(view)
        return Exhibit(
            rhos=self._rhos,
            grid=self._model.grid_size,
            tokens=[self._model.num_kept_tokens(rho) for rho in self._rhos],
            frequencies=shares.tolist(),
            pictures=[
                Picture(index, label, pixels, seen)
                for (_, index, label, pixels, _), seen in zip(chosen, views, strict=True)
            ],
        )

    def _views(self, images: Tensor, rho: float) -> list[View]:
        model = self._model
        with self._autocast():
            tokens, kept = model.sample(model.embed(images), rho)
            logits = model.readout(model.trunk(tokens, kept))
        top = logits.float().softmax(1).topk(min(_TOP, logits.shape[1]), dim=1)
        every = list(range(model.num_patches))
        return [
            View(every if kept is None else kept[number].tolist(), list(zip(classes, chances, strict=True)))
            for number, (classes, chances) in enumerate(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        ]
