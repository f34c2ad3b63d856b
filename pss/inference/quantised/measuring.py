"""Two exported files, held against each other: accuracy over a split and speed, through onnxruntime on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pipelines.base import Batch
from pipelines.loaders.prefetch import Inputs
from pss.inference import timing
from pss.inference.accuracy import Accuracy, Shown, accuracy
from pss.inference.quantised.sessions import Session
from pss.inference.timing import Spread
from pss.runtime.processes import World


@dataclass(frozen=True)
class Measured:
    """A file at one ρ."""

    file: str
    rho: str
    accuracy: Accuracy
    agreement: float
    """Share of the images that it takes for what the first file takes them for."""
    images_per_second: Spread
    milliseconds: Spread
    """Of one image alone."""
    bytes: int


def measure(
    sessions: dict[str, Session],
    inputs: Inputs[Shown],
    world: World,
    *,
    batch_size: int,
    watch: Callable[[int], None] = lambda count: None,
) -> list[Measured]:
    """Every file at every ρ that it has, in that order. Speeds are interleaved, so that all see one machine.

    Args:
        sessions: The files by name, which have the same ρ.
        inputs: The split, on the CPU.
        world: One process, on a CPU.
        batch_size: For the images per second.
        watch: Is told how many images were done, batch by batch.

    Raises:
        DataError: the loader lost or repeated images.
    """
    cases = [(name, rho) for rho in next(iter(sessions.values())).counts for name in sessions]
    same, some = np.zeros(len(cases), np.int64), Tensor()

    def predict(images: Tensor, case: float | None) -> Tensor:
        assert case is not None
        name, rho = cases[int(case)]
        return torch.from_numpy(sessions[name].logits(images.numpy(), rho))

    def observe(batch: Batch, images: Tensor, logits: list[Tensor]) -> None:
        nonlocal some
        some = images if len(images) > len(some) else some
        found = torch.stack(logits).argmax(2)  # (cases, B)
        first = found[:: len(sessions)].repeat_interleave(len(sessions), 0)
        same[:] += (found == first).sum(1).numpy()
        watch(len(images))

    numbers = [float(number) for number in range(len(cases))]
    found = accuracy(predict, inputs, world, points=numbers, autocast=nullcontext(), observe=observe)
    repeats = -(-batch_size // len(some))
    shown = some.repeat(repeats, 1, 1, 1)[:batch_size].numpy()

    def calls(images: NDArray[np.float32]) -> list[Callable[[], Any]]:
        return [partial(sessions[name].logits, images, rho) for name, rho in cases]

    rates = timing.rates(calls(shown), num_images=batch_size, device=world.device)
    latencies = timing.latencies(calls(shown[:1]), device=world.device)
    return [
        Measured(name, rho, one, int(alike) / one.num_images, rate, latency, sessions[name].bytes)
        for (name, rho), one, alike, rate, latency in zip(cases, found, same, rates, latencies, strict=True)
    ]


def table(found: Sequence[Measured], batch_size: int) -> str:
    """A line for every file at every ρ."""
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(width=120, markup=False, emoji=False)
    lines = Table(box=None, header_style="bold", pad_edge=False)
    lines.add_column("ρ")
    lines.add_column("file")
    for heading in ("top-1 %", "as float32 %", f"images/s, batch {batch_size}", "ms, batch 1", "MB"):
        lines.add_column(heading, justify="right")
    for one in found:
        lines.add_row(
            one.rho,
            one.file,
            f"{one.accuracy.top1:.2f}",
            f"{100 * one.agreement:.2f}",
            _in_words(one.images_per_second, ",.0f"),
            _in_words(one.milliseconds, ".3g"),
            f"{one.bytes / 1e6:.3g}",
        )
    with console.capture() as printed:
        console.print(lines)
    return printed.get()


def _in_words(one: Spread, form: str) -> str:
    return f"{one.median:{form}} ({one.low:{form}}–{one.high:{form}})"
