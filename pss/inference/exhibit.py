"""What a model keeps of the images it classifies: a few of them in full, and how often each place of the grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.base import Batch
from pss.inference.accuracy import draws_of
from pss.methods import Method, Point, mean_tokens
from pss.runtime.processes import World

_TOP = 3
EXHIBITED = 12
"""Images that are shown, where nothing else is said."""


@dataclass(frozen=True)
class View:
    """One image at one operating point."""

    kept: list[int]
    """Indices of the patches that go through all blocks, ascending."""
    depths: list[int] | None
    """How many blocks each patch goes through; None where it is all or none."""
    top: list[tuple[int, float]]
    """The likeliest classes and their probabilities, best first."""


@dataclass(frozen=True)
class Picture:
    """One image of the split at every operating point."""

    index: int
    label: int
    pixels: Tensor
    """uint8 (3, S, S), as the model sees it before normalisation."""
    views: list[View]


@dataclass(frozen=True)
class Exhibit:
    """What one model keeps at each of `points`."""

    points: list[Point]
    grid: tuple[int, int]
    num_blocks: int
    tokens: list[int | float]
    """Tokens at each point in an average block, prefix included."""
    frequencies: list[list[float]]
    """Per point and grid position, in raster order, the share of the split's images that keep the patch throughout."""
    pictures: list[Picture]
    labels: Tensor
    """The class of every image of the split, int64 (N,)."""
    answers: Tensor
    """The class that the model takes each for, int64 (points, N)."""


class Curator:
    """Watches an evaluation (as `observe` of `pss.inference.accuracy`) and picks the images worth showing.

    The split is divided into as many stretches as there are pictures, so that all parts of it are seen. Of each, the
    first image is shown that the model gets right at the largest point and otherwise at another one; else its first.
    """

    def __init__(
        self,
        method: Method,
        *,
        points: Sequence[Point],
        num_samples: int,
        world: World,
        autocast: Callable[[], AbstractContextManager[Any]],
        size: int = EXHIBITED,
    ) -> None:
        self._method, self._points, self._world, self._autocast = method, list(points), world, autocast
        self._num_samples, self._size = num_samples, min(size, num_samples)
        self._largest = max(range(len(points)), key=lambda place: points[place] or 0.0)
        self._num_blocks = len(method.model.blocks)
        shape = len(points), method.model.num_patches
        self._counts = torch.zeros(shape, dtype=torch.float64, device=world.device)
        self._every = torch.zeros((1 + len(points), num_samples), dtype=torch.int64, device=world.device)  # label first
        self._chosen: dict[int, tuple[bool, int, int, Tensor, Tensor]] = {}

    def __call__(self, batch: Batch, images: Tensor, logits: list[Tensor]) -> None:
        """Take note of a batch."""
        for counts, point in zip(self._counts, self._points, strict=True):
            counts += (self._depths(images, point, batch.index) == self._num_blocks).sum(0)
        predicted = torch.stack([one.argmax(1) for one in logits])
        places = batch.index.to(self._every.device)
        self._every[0, places], self._every[1:, places] = batch.labels.to(places.device), predicted
        if self._world.is_main:
            self._choose(batch, images, predicted.cpu())

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
        labels, *answers = self._world.sum(self._every).cpu()  # each image was seen by one process
        chosen = [self._chosen[stretch] for stretch in sorted(self._chosen)]
        views: list[list[View]] = [[] for _ in chosen]
        for point in self._points if chosen else ():
            images, index = torch.stack([image for *_, image in chosen]), torch.tensor([one[1] for one in chosen])
            with self._autocast():
                seen = views_of(self._method, images, point, index)
            for per_image, view in zip(views, seen, strict=True):
                per_image.append(view)
        return Exhibit(
            points=self._points,
            grid=self._method.model.grid_size,
            num_blocks=self._num_blocks,
            tokens=[mean_tokens(self._method.tokens(point)) for point in self._points],
            frequencies=shares.tolist(),
            pictures=[
                Picture(index, label, pixels, seen)
                for (_, index, label, pixels, _), seen in zip(chosen, views, strict=True)
            ],
            labels=labels,
            answers=torch.stack(answers),
        )

    def _depths(self, images: Tensor, point: Point, index: Tensor) -> Tensor:
        """How many blocks each patch goes through, (B, patches), as it was when accuracy was measured."""
        with self._autocast(), draws_of(index, images.device):
            return self._method.depths(images, point)


@torch.inference_mode()
def views_of(method: Method, images: Tensor, point: Point, index: Tensor) -> list[View]:
    """What a model keeps of images (B, 3, S, S) at one point, and what it takes them for.

    Args:
        method: In the arithmetic of the caller's autocast.
        images: Normalised.
        point: One of the method's.
        index: Numbers of the images in their split, int64 (B,), which decide what is drawn at random.
    """
    with draws_of(index, images.device):
        depths = method.depths(images, point)
    with draws_of(index, images.device):
        logits = method.predict(images, point)
    num_blocks = len(method.model.blocks)
    top = logits.float().softmax(1).topk(min(_TOP, logits.shape[1]), dim=1)
    uniform = bool(((depths == 0) | (depths == num_blocks)).all())
    return [
        View(
            kept=(one == num_blocks).nonzero().flatten().tolist(),
            depths=None if uniform else one.tolist(),
            top=list(zip(classes, chances, strict=True)),
        )
        for one, classes, chances in zip(depths, top.indices.tolist(), top.values.tolist(), strict=True)
    ]
