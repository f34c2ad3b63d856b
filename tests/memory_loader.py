"""A loader over images in memory: the contract with nothing behind it, for tests of the trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.base import Batch, DataError, View
from pss.config import Config
from pss.runtime.processes import World
from pss.training.trainer import Trainer


class MemoryLoader:
    """`num_samples` images of `num_classes` classes that a model can tell apart by the brightness of their rows."""

    backend = "memory"

    def __init__(
        self,
        num_samples: int = 40,
        *,
        num_classes: int = 4,
        img_size: int = 32,
        batch_size: int = 8,
        train: bool = True,
        on_batch: Callable[[int], None] | None = None,
        size: Callable[[int], int] | None = None,
        maps: np.ndarray | None = None,
    ) -> None:
        """`size`: side of the images of an epoch, which are thinned out to it; all of it by default. `maps`: label
        maps, one a sample. Images are shown whole."""
        generator = np.random.default_rng(0)
        self.num_samples, self.num_classes, self.batch_size, self.train = num_samples, num_classes, batch_size, train
        self.labels = np.arange(num_samples) % num_classes
        images = generator.integers(0, 80, (num_samples, 3, img_size, img_size))
        rows = np.arange(img_size)[None] * num_classes // img_size == self.labels[:, None]  # (samples, rows)
        self.images = (images + 150 * rows[:, None, :, None]).astype(np.uint8)
        whole, rest = divmod(num_samples, batch_size)
        self.steps_per_epoch = whole if train or not rest else whole + 1
        self.on_batch, self.size = on_batch, size or (lambda epoch: img_size)
        self.epoch, self.start, self.maps = 0, 0, maps

    def planned_hash(self, epoch: int) -> int:
        return epoch

    @property
    def delivered_hash(self) -> int:
        return self.epoch

    def set_parts(self, parts: int) -> None:
        pass  # a batch is dealt out as it comes

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.epoch, self.start = epoch, start_step

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        order = np.arange(self.num_samples)
        if self.train:
            order = np.random.default_rng([7, self.epoch]).permutation(order)
        for step in range(self.start, self.steps_per_epoch):
            index = order[step * self.batch_size : (step + 1) * self.batch_size]
            if self.on_batch is not None:
                self.on_batch(self.epoch * self.steps_per_epoch + step)
            size, whole_size = self.size(self.epoch), self.images.shape[-1]
            shown = np.arange(size) * whole_size // size
            images = np.ascontiguousarray(self.images[index][:, :, shown[:, None], shown])
            whole = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(len(index), 1)
            yield Batch(
                *map(torch.from_numpy, (images, self.labels[index], index)),
                view=View(whole, torch.zeros(len(index), dtype=torch.bool)),
                maps=None if self.maps is None else torch.from_numpy(self.maps[index]),
            )

    def state_dict(self) -> dict[str, Any]:
        return {"num_samples": self.num_samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state != self.state_dict():
            raise DataError(
                f"the checkpoint is of other data: num_samples ({state['num_samples']}, {self.num_samples})"
            )

    def close(self) -> None:
        pass


def fit(config: Config, output: Path) -> dict[str, Any]:
    """Train a run of four classes, to its end, in a folder as pss-train leaves it; returns its last row."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.json").write_text(config.to_json(), encoding="utf-8")
    loaders = MemoryLoader(40), MemoryLoader(40, train=False)
    here = World(rank=0, size=1, device=torch.device("cpu"))
    return Trainer(config, *loaders, classes=list("abcd"), output=output, world=here).fit()
