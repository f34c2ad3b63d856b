"""What happens to a uint8 batch on the training device, once for all back ends."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines import crng
from pipelines.augment import RandAugment, RandAugmentSpec, RandomErasing, ThreeAugment
from pipelines.augment.operations import apply, moves
from pipelines.augment.plan import make_plan
from pipelines.augment.policy import Draws
from pipelines.augment.transfer import host_index, kernels_serve, to_device
from pipelines.base import Batch, DataConfig, View


class DeviceTransform:
    """Flip and RandAugment or 3-Augment (training), scale to 0-1 and normalise, random erasing (training).

    Called as `transform(batch, epoch)`; returns float32 (B, 3, S, S) on the device of `batch.images`. All of it is a
    pure function of the pixels and of (seed, epoch, sample number and copy), like the crops. `with_view` also says what
    part of the stored images the result shows.
    """

    def __init__(self, config: DataConfig, *, seed: int, train: bool) -> None:
        self.flip = config.flip if train else 0.0
        self.seed = seed
        self._augment: RandAugment | ThreeAugment | None = None
        if train and config.rand_augment is not None:
            red, green, blue = (round(255 * mean) for mean in config.mean)
            spec = RandAugmentSpec.parse(config.rand_augment)
            self._augment = RandAugment(spec, seed=seed, fill=(red, green, blue), interpolation=config.interpolation)
        elif train and config.three_augment:
            self._augment = ThreeAugment(seed=seed)
        self._erase = RandomErasing(config.erasing, seed=seed) if train and config.erasing else None
        # (x / 255 - mean) / std as one multiplication and one addition
        self._scale = 1 / (255 * torch.tensor(config.std)).view(3, 1, 1)
        self._shift = -(torch.tensor(config.mean) / torch.tensor(config.std)).view(3, 1, 1)
        self._normalisation = self._scale.flatten().tolist(), self._shift.flatten().tolist()

    def __call__(self, batch: Batch, epoch: int) -> Tensor:
        return self._prepare(batch, epoch, self._flips(batch, epoch), self._draws(batch, epoch))

    def with_view(self, batch: Batch, epoch: int) -> tuple[Tensor, View]:
        """What a call returns, and the view of it, on its device; `ValueError` for a batch without a view.

        The window and the flip are known, and what RandAugment then rotates, shears or shifts.
        """
        if batch.view is None:
            raise ValueError("batch.view is None; take the batch from a loader, or give it the View of its images")
        flips, device = self._flips(batch, epoch), batch.images.device
        flipped = batch.view.flipped.numpy()  # (B,), what the loader has mirrored
        draws = self._draws(batch, epoch)
        moved = moves(*draws, batch.images.shape[-1]) if draws and isinstance(self._augment, RandAugment) else None
        view = View(
            to_device(batch.view.crop.numpy(), device),
            to_device(flipped if flips is None else flipped ^ flips, device),
            None if moved is None else to_device(moved, device),
        )
        return self._prepare(batch, epoch, flips, draws), view

    def _draws(self, batch: Batch, epoch: int) -> Draws | None:
        """Operations and their arguments; None where there are none."""
        if self._augment is None:
            return None
        return self._augment.draw(host_index(batch.draw_keys), epoch, batch.images.shape[-1])

    def _flips(self, batch: Batch, epoch: int) -> NDArray[np.bool_] | None:
        """Which images to flip, (B,), on the host; None where none ever is."""
        if not self.flip:
            return None
        keys = host_index(batch.draw_keys)  # (B,)
        return crng.u01(crng.key(self.seed, epoch, keys, crng.FLIP), 0) < self.flip

    def _prepare(self, batch: Batch, epoch: int, flips: NDArray[np.bool_] | None, draws: Draws | None) -> Tensor:
        one_way = self._by_kernels if kernels_serve(batch.images) else self._by_torch
        return one_way(batch, epoch, flips, draws)

    def _by_kernels(self, batch: Batch, epoch: int, flips: NDArray[np.bool_] | None, draws: Draws | None) -> Tensor:
        """In a few launches and one copy, on the current stream of the images' device."""
        from pipelines.augment import fused

        images, side = batch.images, batch.images.shape[-1]
        keys = host_index(batch.draw_keys)
        operations, arguments = (None, None) if draws is None else draws
        erased = None if self._erase is None else self._erase.draw(keys, epoch, side)
        plan = make_plan(len(images), operations, arguments, flips, erased)
        result: Tensor = fused.augment(
            images,
            to_device(plan.table, images.device),
            None if self._erase is None else self._erase.noise_table(images.device),
            plan.ends,
            *self._normalisation,
            (0, 0, 0) if self._augment is None else self._augment.fill,
            self._augment is not None and self._augment.interpolation == "bicubic",
        )
        return result

    def _by_torch(self, batch: Batch, epoch: int, flips: NDArray[np.bool_] | None, draws: Draws | None) -> Tensor:
        images = batch.images  # uint8 (B, 3, S, S)
        if flips is not None:
            flipped = to_device(flips, images.device).view(-1, 1, 1, 1)
            images = torch.where(flipped, images.flip(-1), images)
        if self._augment is not None and draws is not None:
            fill, interpolation = self._augment.fill, self._augment.interpolation
            images = apply(images, *draws, fill=fill, interpolation=interpolation)
        self._scale, self._shift = self._scale.to(images.device), self._shift.to(images.device)
        values = images.to(torch.float32, memory_format=torch.contiguous_format)
        values = values.mul_(self._scale).add_(self._shift)
        return values if self._erase is None else self._erase(values, batch.draw_keys, epoch)
