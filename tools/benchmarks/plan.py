"""Is the simulation of `pss-train --plan` right? Train with loaders of known rates and compare.

    python -m tools.benchmarks.plan --json plan.json

A small ViT trains under the published cycle, one cycle per epoch, from images in memory that a loader hands out no
faster than at a given rate, through the real prefetch queue and the real training loop. A run whose loader is never
late gives the length of a step at each rho; from these lengths and the rate alone the others are simulated.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pipelines.base import Batch
from pipelines.loaders.prefetch import bytes_of
from pss import recipes
from pss.config import Config
from pss.planning.plan import plan, simulate
from pss.runs.log import read_rows
from pss.runtime.processes import World
from pss.training.trainer import Trainer
from tools.benchmarks.measure import Result, conclude, page, parser
from tools.benchmarks.training import Resident

SIDE, CLASSES = 32, 10


class TimedLoader(Resident):
    """Hands out no batch earlier than `seconds` after the one before it."""

    def __init__(self, batch_size: int, steps: int, seconds: float) -> None:
        super().__init__(batch_size, SIDE, steps, torch.device("cpu"), CLASSES)
        self.seconds = seconds

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            time.sleep(self.seconds)
            yield batch


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
    here = World(rank=0, size=1, device=torch.device("cpu"))
    loader = TimedLoader(arguments.batch, arguments.steps, batch_seconds)
    room = (capacity + 0.5) * bytes_of(next(iter(TimedLoader(arguments.batch, 1, 0.0))))
    config = configured(arguments).with_settings([f"data.prefetch_gb={room / 1e9}"])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        validation = TimedLoader(arguments.batch, 1, 0.0)
        Trainer(config, loader, validation, classes=[str(i) for i in range(CLASSES)], output=output, world=here).fit()
        row: dict[str, Any] = read_rows(output, "epoch")[-1]
        return row


def measured(arguments: argparse.Namespace) -> Result:
    """Seconds of a step at each rho, and an epoch with every loader beside its simulation."""
    free = trained(arguments, 0.0, arguments.capacity)
    busy = {float(rho): level["ms_per_step"] * (1 - level["data_wait"]) / 1e3 for rho, level in free["by_rho"].items()}
    planned = plan(configured(arguments), num_images=arguments.batch * arguments.steps, num_classes=CLASSES)
    steps = [busy[rho] for rho in planned.rhos[: arguments.steps]]
    mean = sum(steps) / len(steps)
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
    return {"busy_seconds": busy, "mean_seconds": mean, "rows": rows}


def report(result: Result) -> str:
    """The result as markdown."""
    settings, busy = result["settings"], result["busy_seconds"].values()
    rows = [
        f"{row['loader_over_demand']:g} | {row['seconds']:.2f} | {row['simulated_seconds']:.2f} | "
        f"{row['seconds'] / row['simulated_seconds']:.3f} | {row['data_wait']:.1%} | {row['simulated_data_wait']:.1%}"
        for row in result["rows"]
    ]
    head = "loader over the average demand | epoch, s | simulated, s | measured / simulated | waiting | simulated"
    title = (
        f"{settings['steps']} steps of {settings['batch']} images, {1e3 * result['mean_seconds']:.1f} ms on average, "
        f"{1e3 * min(busy):.1f} to {1e3 * max(busy):.1f} ms; {settings['capacity']} batches queued"
    )
    return page(result, title, head, rows)


def main(argv: Sequence[str] | None = None) -> Result:
    """Run as the arguments say (the command line's if None), print and write the report, and return the result."""
    command = parser(__doc__, threads=max(1, (os.cpu_count() or 2) - 1))
    command.add_argument("--batch", type=int, default=8, help="images a step")
    command.add_argument("--steps", type=int, default=63, help="steps of a cycle")
    command.add_argument("--capacity", type=int, default=12, help="batches in the queue")
    return conclude(command.parse_args(argv), measured, report)


if __name__ == "__main__":
    main()
