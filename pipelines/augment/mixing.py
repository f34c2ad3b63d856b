"""Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019) of a normalised batch, distributed as in timm.

Image i of a batch is mixed with image B - 1 - i. What is drawn is a pure function of (seed, step, rank): a batch is the
unit here, and which images it holds follows from the same three. A process that computes its batch in parts has in each
the batch of another rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment.transfer import kernels_serve, to_device

MixingMode = Literal["batch", "elem"]

_PURPOSE = 0x6D6978  # second Philox key, apart from what else draws with the run's seed


@dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """How a batch is mixed with itself. Mixup or CutMix is off where its alpha is 0."""

    mixup_alpha: float = 0.0
    """Of mixup's Beta(alpha, alpha) distribution."""
    cutmix_alpha: float = 0.0
    """Of CutMix's Beta(alpha, alpha) distribution."""
    probability: float = 1.0
    """Of mixing at all, per draw."""
    switch_probability: float = 0.5
    """Of CutMix instead of mixup, where both are on."""
    mode: MixingMode = "batch"
    """One draw for the whole batch, or one for each image ("elem")."""
    correct_share: bool = True
    """Whether a CutMix rectangle that the border cuts off counts with its remaining area in the targets."""

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            if getattr(self, name) < 0:
                raise ValueError(f"mixing's {name} is {getattr(self, name)}; it must be at least 0, which is off")
        for name in ("probability", "switch_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"mixing's {name} is {getattr(self, name)}; it must lie between 0 and 1")
        if self.mode not in get_args(MixingMode):
            raise ValueError(f"mixing's mode is {self.mode!r}; use 'batch' or 'elem'")


def draw_mixing(
    config: MixingConfig, num_draws: int, *, img_size: int, seed: int, step: int, rank: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Shares of each image that stay, (num_draws,), and the rectangles that are replaced, (num_draws, 4).

    A rectangle is top, bottom, left, right; empty for mixup, and where nothing is mixed.
    """
    key = np.array([seed, _PURPOSE], dtype=np.uint64)
    counter = np.array([0, 0, step, rank], dtype=np.uint64)  # the low words count the draws
    generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
    mixed, switch, middle_y, middle_x = generator.random((4, num_draws))
    mixup_share, cutmix_share = (
        generator.beta(alpha, alpha, num_draws) if alpha else np.ones(num_draws)
        for alpha in (config.mixup_alpha, config.cutmix_alpha)
    )
    cut = np.full(num_draws, bool(config.cutmix_alpha))
    if config.mixup_alpha:
        cut &= switch < config.switch_probability
    share = np.where(mixed < config.probability, np.where(cut, cutmix_share, mixup_share), 1.0)

    side = np.where(cut, img_size * np.sqrt(1 - share), 0).astype(np.int64)
    rectangle = np.empty((num_draws, 4), dtype=np.int64)
    for first, middle in ((0, middle_y), (2, middle_x)):
        middle = (middle * img_size).astype(np.int64)
        rectangle[:, first] = np.clip(middle - side // 2, 0, img_size)
        rectangle[:, first + 1] = np.clip(middle + (side + 1) // 2, 0, img_size)
    if config.correct_share:
        top, bottom, left, right = rectangle.T
        share = np.where(cut, 1 - (bottom - top) * (right - left) / img_size**2, share)
    return share, rectangle


def mixed_targets(labels: Tensor, share: Tensor, num_classes: int, label_smoothing: float) -> Tensor:
    """Smoothed one-hot rows of `labels` (B,), mixed like the images: float32 (B, classes). `share` is (B, 1) or (1, 1).

    Smoothing spreads its weight evenly over all classes, the right one included.
    """
    off = label_smoothing / num_classes
    targets = torch.full((len(labels), num_classes), off, device=labels.device)
    targets.scatter_(1, labels.unsqueeze(1), 1 - label_smoothing + off)
    return targets * share + targets.flip(0) * (1 - share)


class Mixing:
    """Mixes a batch with itself and makes soft targets of its labels."""

    def __init__(
        self,
        config: MixingConfig,
        num_classes: int,
        *,
        seed: int,
        rank: int,
        label_smoothing: float = 0.0,
        parts: int = 1,
    ) -> None:
        """With `parts` above 1 a batch is that many, one after the other, each mixed with itself as those of ranks
        rank * parts, rank * parts + 1, ... are."""
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing is {label_smoothing}; it must lie between 0 and 1")
        self.config, self.num_classes, self.label_smoothing = config, num_classes, label_smoothing
        self.seed, self.rank, self.parts = seed, rank, parts

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Images, float (B, 3, S, S), changed in place; targets, float32 (B, classes), from `labels` int64 (B,)."""
        if kernels_serve(images) and images.dtype == torch.float32 and images.is_contiguous():
            return images, self._mix_by_kernels(images, labels, step)
        targets = [
            self._mix(some, their_labels, step, self.rank * self.parts + number)
            for number, (some, their_labels) in enumerate(
                zip(images.chunk(self.parts), labels.chunk(self.parts), strict=True)
            )
        ]
        return images, targets[0] if len(targets) == 1 else torch.cat(targets)

    def _mix(self, images: Tensor, labels: Tensor, step: int, rank: int) -> Tensor:
        """Mix the batch of `rank` in place; returns its targets."""
        num_draws = len(images) if self.config.mode == "elem" else 1
        share, rectangle = draw_mixing(
            self.config, num_draws, img_size=images.shape[-1], seed=self.seed, step=step, rank=rank
        )
        if self.config.mode == "elem":
            _mix_each(images, share, rectangle)
        else:
            _mix_batch(images, float(share[0]), rectangle[0].tolist())
        shares = to_device(share.astype(np.float32), labels.device).unsqueeze(1)
        return mixed_targets(labels, shares, self.num_classes, self.label_smoothing)

    def _mix_by_kernels(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """The same in two launches and one copy."""
        from pipelines.augment import fused

        table, num_pairs = self._table(len(images), images.shape[-1], step)
        wrong = self.label_smoothing / self.num_classes
        right = 1 - self.label_smoothing + wrong
        table_there = to_device(table, images.device)
        targets: Tensor = fused.mix(images, labels, table_there, num_pairs, self.num_classes, right, wrong)
        return targets

    def _table(self, num_images: int, img_size: int, step: int) -> tuple[NDArray[np.int64], int]:
        """What `pipelines.augment.mixing_kernels` wants to know, and how many pairs of images are to be mixed."""
        table = np.zeros((num_images, 8), dtype=np.int64)
        shares = table.view(np.float64)
        size = max(1, -(-num_images // self.parts))  # as `Tensor.chunk` does
        for number, start in enumerate(range(0, num_images, size)):
            end = min(start + size, num_images)
            share, rectangle = draw_mixing(
                self.config,
                end - start if self.config.mode == "elem" else 1,
                img_size=img_size,
                seed=self.seed,
                step=step,
                rank=self.rank * self.parts + number,
            )
            extends = rectangle[:, 1::2] > rectangle[:, ::2]
            cut = extends.any(axis=1) if self.config.mode == "elem" else extends.all(axis=1)
            table[start:end, 0] = np.arange(end - 1, start - 1, -1)
            shares[start:end, 1], shares[start:end, 2] = np.where(cut, 0, 1 - share), share
            table[start:end, 3:7] = rectangle
        firsts = np.flatnonzero(np.arange(num_images) < table[:, 0])
        table[: len(firsts), 7] = firsts
        mixed = shares[:, 1].any() or (table[:, 4:7:2] > table[:, 3:6:2]).all(axis=1).any()
        return table, len(firsts) if mixed else 0


def _mix_batch(images: Tensor, share: float, rectangle: list[int]) -> None:
    top, bottom, left, right = rectangle
    if bottom > top and right > left:
        window = images[:, :, top:bottom, left:right]
        window.copy_(window.flip(0))
    elif share < 1:
        images.lerp_(images.flip(0), 1 - share)


def _mix_each(images: Tensor, share: NDArray[np.float64], rectangle: NDArray[np.int64]) -> None:
    """As a weight per pixel of the other image: CutMix's is 1 inside its rectangle and 0 outside."""
    cut = np.any(rectangle[:, 1::2] > rectangle[:, ::2], axis=1)
    others = to_device(np.where(cut, 0, 1 - share).astype(np.float32), images.device).view(-1, 1, 1, 1)
    top, bottom, left, right = to_device(rectangle, images.device).view(-1, 4, 1, 1, 1).unbind(1)
    x = torch.arange(images.shape[-1], device=images.device)
    y = x.unsqueeze(1)
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)  # (B, 1, S, S)
    images.lerp_(images.flip(0), others.masked_fill(inside, 1).to(images.dtype))
