"""Accuracy over a whole split at one rho, and the rate of the model alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.base import Batch, DataError, Loader
from pss.dist import World

Predict = Callable[[Tensor, float], Tensor]
Prepare = Callable[[Batch, int], Tensor]


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 in percent, mean cross entropy, and how many images they are over."""

    top1: float
    top5: float
    loss: float
    num_images: int


@torch.inference_mode()
def accuracy(
    predict: Predict,
    loader: Loader,
    prepare: Prepare,
    world: World,
    *,
    rhos: Sequence[float],
    autocast: AbstractContextManager[Any],
    on_batch: Callable[[int], None] | None = None,
) -> list[Accuracy]:
    """Accuracy at each rho, over every image of the loader's split once, on any number of processes.

    Each batch is decoded once and predicted at all of `rhos`. Raises `DataError` where the processes together did not
    see exactly the split's images.
    """
    totals = torch.zeros(len(rhos), 3, dtype=torch.float64, device=world.device)  # right, right in five, loss
    seen = torch.zeros(1, dtype=torch.int64, device=world.device)
    loader.set_epoch(0)
    for batch in loader:
        images, labels = prepare(batch, 0), batch.labels
        for row, rho in zip(totals, rhos, strict=True):
            with autocast:
                logits = predict(images, rho)
            logits = logits.float()  # (B, classes)
            ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            row[0] += ranked[:, 0].sum()
            row[1] += ranked.sum()
            row[2] += F.cross_entropy(logits, labels, reduction="sum")
        seen += labels.numel()
        if on_batch is not None:
            on_batch(labels.numel())
    world.sum(totals)
    world.sum(seen)
    count = int(seen)
    if count != loader.num_samples:
        raise DataError(
            f"evaluation saw {count} images of a split of {loader.num_samples}; the loader lost or repeated some"
        )
    rows = (totals / count).tolist()
    return [Accuracy(100 * right, 100 * five, loss, count) for right, five, loss in rows]


@dataclass(frozen=True)
class Rate:
    """Images per second of the model alone: the median of interleaved rounds, with the slowest and the fastest."""

    median: float
    low: float
    high: float


@torch.inference_mode()
def rates(
    predicts: Sequence[Callable[[], Tensor]], *, num_images: int, device: torch.device, rounds: int = 7
) -> list[Rate]:
    """Rate of each callable, which predicts `num_images` images; rounds are interleaved, so all see one machine."""

    def seconds(predict: Callable[[], Tensor], repeats: int) -> float:
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(repeats):
            predict()
        _synchronize(device)
        return (time.perf_counter() - began) / repeats

    repeats = []
    for predict in predicts:
        seconds(predict, 2)  # warm-up, not counted
        # Long enough for the clock and the scheduler to matter little, short enough for a sweep.
        repeats.append(max(1, round(0.05 / seconds(predict, 1))))
    measured: list[list[float]] = [[] for _ in predicts]
    for _ in range(rounds):
        for times, predict, count in zip(measured, predicts, repeats, strict=True):
            times.append(num_images / seconds(predict, count))
    return [Rate(statistics.median(times), min(times), max(times)) for times in measured]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
