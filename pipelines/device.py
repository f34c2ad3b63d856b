"""What happens to a uint8 batch on the training device, once for all back ends."""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines import crng
from pipelines.augment.transfer import host_index, to_device
from pipelines.base import Batch, DataConfig


class DeviceTransform:
    """Flip (training only), scale to 0-1 and normalise.

    Called as `transform(batch, epoch)`; returns float32 (B, 3, S, S) on the device of `batch.images`. The flips are a
    pure function of (seed, epoch, sample number and copy), like the crops.
    """

    def __init__(self, config: DataConfig, *, seed: int, train: bool) -> None:
        self.flip = config.flip if train else 0.0
        self.seed = seed
        # (x / 255 - mean) / std as one multiplication and one addition
        self._scale = 1 / (255 * torch.tensor(config.std)).view(3, 1, 1)
        self._shift = -(torch.tensor(config.mean) / torch.tensor(config.std)).view(3, 1, 1)

    def __call__(self, batch: Batch, epoch: int) -> Tensor:
        images = batch.images  # uint8 (B, 3, S, S)
        if self.flip:
            keys = host_index(batch.draw_keys)  # (B,)
            draws = crng.u01(crng.key(self.seed, epoch, keys, crng.FLIP), 0)
            flipped = to_device(draws < self.flip, images.device).view(-1, 1, 1, 1)
            images = torch.where(flipped, images.flip(-1), images)
        self._scale, self._shift = self._scale.to(images.device), self._shift.to(images.device)
        values = images.to(torch.float32, memory_format=torch.contiguous_format)
        return values.mul_(self._scale).add_(self._shift)
