"""Is the simulation of `pss-train --plan` right? Train with loaders of known rates and compare.

    python -m tools.benchmarks.plan --json plan.json

A small ViT trains under the published cycle, one cycle per epoch, from images in memory that a loader hands out no
faster than at a given rate, through the real prefetch queue and the real training loop. A run whose loader is never
late gives the length of a step at each rho; from these lengths and the rate alone the others are simulated.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pipelines.base import Batch
from pipelines.loaders.prefetch import Prefetcher
from pss import recipes
from pss.config import Config
from pss.planning.plan import plan, simulate
from pss.runs.log import read_rows
from pss.runtime.processes import World
from pss.training.trainer import Trainer
from tools.benchmarks.step import environment

SIDE, CLASSES = 32, 10


class TimedLoader:
    """The same random batch, over and over, none earlier than `seconds` after the one before it was handed out."""

    backend = "memory"
    delivered_hash = 0

    def __init__(self, batch_size: int, steps: int, seconds: float) -> None:
        self.batch_size, self.steps_per_epoch, self.seconds = batch_size, steps, seconds
        self.num_classes, self.num_samples = CLASSES, batch_size * steps
        images = torch.randint(0, 256, (batch_size, 3, SIDE, SIDE), dtype=torch.uint8)
        self.batch = Batch(images, torch.arange(batch_size) % CLASSES, torch.arange(batch_size))

    def planned_hash(self, epoch: int) -> int:
        return 0

    def set_epoch(self, epoch: int, start_step: int = 0) -> None: ...

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.steps_per_epoch):
            time.sleep(self.seconds)
            yield self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def configured(arguments: argparse.Namespace) -> Config:
    """Two epochs, of which the first warms up."""
    return recipes.get("cifar10").with_settings(
        [
            f"train.batch_size={arguments.batch}",
            "train.epochs=2",
            "optim.warmup_epochs=0",
            "train.ema_decay=0",
            f"train.log_every_steps={arguments.steps}",
        ]
    )


def trained(arguments: argparse.Namespace, batch_seconds: float, capacity: int) -> dict[str, Any]:
    """The last epoch's row of the log of a run with a loader that takes `batch_seconds` for a batch."""
    config = configured(arguments)
    here = World(rank=0, size=1, device=torch.device("cpu"))
    loader = TimedLoader(arguments.batch, arguments.steps, batch_seconds)
    queue = Prefetcher(loader, capacity * loader.batch.images.nbytes)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        try:
            validation = TimedLoader(arguments.batch, 1, 0.0)
            Trainer(
                config, queue, validation, classes=[str(i) for i in range(CLASSES)], output=output, world=here
            ).fit()
        finally:
            queue.close()
        row: dict[str, Any] = read_rows(output, "epoch")[-1]
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--steps", type=int, default=63, help="steps of a cycle")
    parser.add_argument("--capacity", type=int, default=12, help="batches in the queue")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments = parser.parse_args()
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))

    free = trained(arguments, 0.0, arguments.capacity)
    busy = {float(rho): level["ms_per_step"] * (1 - level["data_wait"]) / 1e3 for rho, level in free["by_rho"].items()}
    planned = plan(configured(arguments), num_images=arguments.batch * arguments.steps, num_classes=CLASSES)
    steps = [busy[rho] for rho in planned.rhos[: arguments.steps]]
    mean = sum(steps) / len(steps)
    print(", ".join(f"{key} {value}" for key, value in environment(torch.device("cpu")).items()))
    print(
        f"\n{arguments.steps} steps of {arguments.batch} images, {1e3 * mean:.1f} ms on average, "
        f"{1e3 * min(busy.values()):.1f} to {1e3 * max(busy.values()):.1f} ms; {arguments.capacity} batches queued\n"
    )
    print("| loader over the average demand | epoch, s | simulated, s | measured / simulated | waiting | simulated |")
    print("|---|---|---|---|---|---|")
    rows = []
    for factor in (0.7, 1.0, 1.2, 1.5, 2.5):
        row = trained(arguments, mean / factor, arguments.capacity)
        predicted = simulate(steps, mean / factor, arguments.capacity)
        rows.append(
            {
                "loader_over_demand": factor,
                "seconds": row["train_seconds"],
                "simulated_seconds": predicted.seconds,
                "data_wait": row["data_wait"],
                "simulated_data_wait": predicted.data_wait,
            }
        )
        seconds = (
            f"{row['train_seconds']:.2f} | {predicted.seconds:.2f} | {row['train_seconds'] / predicted.seconds:.3f}"
        )
        print(f"| {factor:g} | {seconds} | {row['data_wait']:.1%} | {predicted.data_wait:.1%} |", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"busy_seconds": busy, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
