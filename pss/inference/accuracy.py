"""Accuracy over a whole split, at every operating point, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines import crng
from pipelines.augment.device import DeviceTransform
from pipelines.augment.transfer import to_device
from pipelines.base import Batch, DataConfig, DataError, Loader
from pipelines.loaders.prefetch import Inputs
from pss.methods import Point
from pss.models.sampling import drawing
from pss.runtime.processes import World
from pss.runtime.seeds import forked_generator

Predict = Callable[[Tensor, Point], Any]
Observe = Callable[[Batch, Tensor, list[Tensor]], None]


@dataclass(frozen=True)
class Shown:
    """A batch, and its images as a model takes them: float32 (B, 3, S, S), normalised. On the model's device."""

    batch: Batch
    images: Tensor


def evaluation_inputs(loader: Loader, config: DataConfig, device: torch.device) -> Inputs[Shown]:
    """What a model is evaluated on, made ready while the batch before is predicted."""
    transform = DeviceTransform(config, seed=0, train=False)

    def prepare(batch: Batch, epoch: int, step: int) -> Shown:
        return Shown(batch, transform(batch, epoch))

    return Inputs(loader, prepare, device, prefetch_bytes=0)


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 in percent, mean cross entropy, and how many images they are over."""

    top1: float
    top5: float
    loss: float
    num_images: int
    macs: MacsOfImages | None = None
    """Where a prediction costs more for some images than for others."""


@dataclass(frozen=True)
class MacsOfImages:
    """Multiply-accumulates of the images of a split: their mean, and the 5th and the 95th percentile."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, macs: Tensor) -> MacsOfImages:
        low, high = macs.quantile(macs.new_tensor([0.05, 0.95])).tolist()
        return cls(float(macs.mean()), low, high)


def accuracy(
    predict: Predict,
    inputs: Inputs[Shown],
    world: World,
    *,
    points: Sequence[Point],
    autocast: AbstractContextManager[Any],
    observe: Observe | None = None,
    in_step: bool = False,
    with_cost: bool = False,
    between: Callable[[], None] = lambda: None,
) -> list[Accuracy]:
    """Accuracy at each operating point, over every image of a split once, on any number of processes.

    Each batch is decoded once and predicted at all of `points`; `observe` is shown the batch, the images as the model
    takes them, and the logits (B, classes) of every point. `predict` returns logits; `with_cost` also what each image
    cost, (B,). What a prediction draws at random is `draws_of` the batch. `between` is called after each batch, equally
    often on every process. With `in_step` all processes predict equally often, too, which a model that is sharded among
    them needs; one without an image left repeats another, so there must be one for each.

    Raises:
        DataError: the processes together did not see exactly the split's images.
    """
    totals = torch.zeros(len(points), 3, dtype=torch.float64, device=world.device)  # right, right in five, loss
    costs = torch.zeros(len(points), inputs.num_samples if with_cost else 0, dtype=torch.float64)
    seen = torch.zeros(1, dtype=torch.int64, device=world.device)
    inputs.set_epoch(0)
    most = -(-inputs.num_samples // (inputs.batch_size * world.size))  # batches of a process
    # What a sharded model gathers in inference mode it would keep for training, which cannot use it.
    with torch.no_grad() if in_step else torch.inference_mode():
        for shown in inputs:
            batch, images, labels = shown.batch, shown.images, shown.batch.labels
            predicted = []
            for number, (row, point) in enumerate(zip(totals, points, strict=True)):
                with autocast, draws_of(batch.index, images.device):
                    answer = predict(images, point)
                logits, macs = answer if with_cost else (answer, None)
                if macs is not None:
                    costs[number, batch.index] = macs.double().cpu()
                logits = logits.float()  # (B, classes)
                ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
                row[0] += ranked[:, 0].sum()
                row[1] += ranked.sum()
                row[2] += F.cross_entropy(logits, labels, reduction="none").double().sum()
                predicted.append(logits)
            seen += labels.numel()
            if observe is not None:
                observe(batch, images, predicted)
            between()
        for _ in range(most - len(inputs)):
            for point in points if in_step else ():
                with autocast, draws_of(batch.index[:1], images.device):
                    predict(images[:1], point)
            between()
    world.sum(totals)
    world.sum(seen)
    count = int(seen)
    if count != inputs.num_samples:
        raise DataError(
            f"evaluation saw {count} images of a split of {inputs.num_samples}; the loader lost or repeated some"
        )
    rows = (totals / count).tolist()
    every = world.sum(costs.to(world.device)).cpu() if with_cost else costs
    macs_of = [MacsOfImages.of(some) if with_cost else None for some in every]
    return [
        Accuracy(100 * right, 100 * five, loss, count, macs)
        for (right, five, loss), macs in zip(rows, macs_of, strict=True)
    ]


@contextmanager
def draws_of(index: Tensor, device: torch.device) -> Iterator[None]:
    """Within, what a prediction of a batch draws at random belongs to its samples.

    The random sort gives every patch of a sample a number, which depends on the sample alone: not on ρ, so that of two
    shares the smaller one's patches are among the larger one's, and neither on what else is asked for nor on how the
    split is divided into batches and among processes. Whatever else a method draws depends on the batch.

    Args:
        index: Numbers of the samples in their split, int64 (B,).
        device: Where the images are.
    """
    keys = crng.key_torch(0, 0, to_device(index.numpy(), device), crng.PATCHES).unsqueeze(1)  # (B, 1)

    def scores(num_images: int, num_patches: int) -> Tensor | None:
        if num_images != len(keys):  # a method may look at a part of the batch
            return None
        return crng.u01_torch(keys, torch.arange(num_patches, device=device))

    with forked_generator(device, int(index[0])), drawing(scores):
        yield
