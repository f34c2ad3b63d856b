"""How far the windowed order is from a permutation of all samples: pairs that meet in a batch, and classes in a batch.

    python -m tools.scale.order [--samples 1281167] [--tar 2000] [--classes 1000] [--batch 1024] [--groups 16,64]
        [--windows 1,2,4,8,16] [--epochs 3] [--sorted]

Columns, each as a multiple of what it is under a permutation of all samples:

- same tar: how often two samples of the same tar are in the same batch.
- again: how often two samples that were in a batch in one epoch are in one in another.
- classes: variance of the number of samples of a class in a batch, over the epochs' batches. `--sorted` gives the
  samples of a set whose conversion did not shuffle it, which pss-convert always does.

The last column is the share of a set that one node holds which reads all groups: two windows of each.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.loaders.order import epoch_order
from pipelines.remote.windows import Windows
from tools.benchmarks.measure import Result, conclude, page, parser

Int64 = NDArray[np.int64]


def measured(arguments: argparse.Namespace) -> Result:
    """Both orders, for each K and W."""
    total, size, batch = arguments.samples, arguments.tar, arguments.batch
    counts = np.array([min(size, total - begin) for begin in range(0, total, size)], dtype=np.int64)
    labels = np.arange(total) * arguments.classes // total
    if not arguments.sorted:
        labels = np.random.default_rng(0).permutation(labels)
    rows = []
    for groups in arguments.groups:
        for window in arguments.windows:
            order = Windows(counts, seed=1, groups=groups, window=window, batch_size=batch)
            batches = (order.samples(epoch, range(groups))[0].reshape(-1, batch) for epoch in range(arguments.epochs))
            held = sum(int(np.sort(counts[hand])[-2 * window :].sum()) for hand in order.group_tars)
            rows.append(
                {"groups": groups, "window": window, "left_out": order.left_out / total, "held": held / total}
                | found(list(batches), counts, labels, order)
            )
    uniform = [epoch_order(total, 1, epoch)[: total // batch * batch] for epoch in range(arguments.epochs)]
    rows.append(
        {"groups": None, "window": None, "left_out": total % batch / total, "held": 1.0}
        | found([one.reshape(-1, batch) for one in uniform], counts, labels, None)
    )
    return {"rows": rows}


def found(epochs: list[Int64], counts: Int64, labels: Int64, order: Windows | None) -> dict[str, float]:
    """What the columns say, of the batches of some epochs, each (steps, B)."""
    total = int(counts.sum())
    tar_of = np.repeat(np.arange(len(counts)), counts)
    return {
        "same_tar": float(np.mean([_same(tar_of[one], counts, total) for one in epochs])),
        "again": _again(epochs, total),
        "classes": float(np.mean([_spread(labels[one], np.bincount(labels), total) for one in epochs])),
    }


def _same(tars: Int64, counts: Int64, total: int) -> float:
    """Pairs of the same tar in a batch, over their number under a permutation."""
    steps, batch = tars.shape
    pairs = sum(float((many := np.unique(row, return_counts=True)[1]) @ (many - 1)) for row in tars)
    share = float(counts @ (counts - 1)) / (total * (total - 1))
    return pairs / (steps * batch * (batch - 1) * share)


def _again(epochs: list[Int64], total: int) -> float:
    """Pairs that meet in a batch of one epoch and of the next, over their number under permutations."""
    ratios = []
    for first, second in itertools.pairwise(epochs):
        steps, batch = second.shape
        step_of = np.full(total, -1, dtype=np.int64)
        step_of[second.ravel()] = np.repeat(np.arange(steps), batch)
        pairs = 0.0
        for row in step_of[first]:
            many = np.bincount(row[row >= 0])
            pairs += float(many @ (many - 1))
        ratios.append(pairs / (first.shape[0] * batch * (batch - 1)) / ((batch - 1) / (total - 1)))
    return float(np.mean(ratios))


def _spread(labels: Int64, sizes: Int64, total: int) -> float:
    """Variance of the numbers of each class in a batch about their mean, over that of samples drawn without return."""
    steps, batch = labels.shape
    expected = batch * sizes / total
    squares = np.zeros(len(sizes))
    for row in labels:
        squares += (np.bincount(row, minlength=len(sizes)) - expected) ** 2
    drawn = expected * (1 - sizes / total) * (total - batch) / (total - 1)
    return float((squares / steps / drawn).mean())


def report(result: Result) -> str:
    """The result as markdown."""
    settings = result["settings"]
    lines = []
    for row in result["rows"]:
        name = "all samples permuted | " if row["groups"] is None else f"{row['groups']} | {row['window']}"
        figures = " | ".join(f"{row[part]:.3f}" for part in ("same_tar", "again", "classes"))
        lines.append(f"{name} | {figures} | {row['left_out']:.2%} | {row['held']:.0%}")
    title = (
        f"{settings['samples']:,} samples in tars of {settings['tar']:,}, {settings['classes']:,} classes"
        f"{' in order' if settings['sorted'] else ''}, batches of {settings['batch']:,}, {settings['epochs']} epochs"
    )
    return page(result, title, "K | W | same tar | again | classes | left out | held by one node", lines)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> Result:
    """Run as the arguments say (the command line's if None), print and write the report, and return the result."""
    command = parser(__doc__)
    command.add_argument("--samples", type=int, default=1_281_167)
    command.add_argument("--tar", type=int, default=2_000)
    command.add_argument("--classes", type=int, default=1_000)
    command.add_argument("--batch", type=int, default=1_024)
    command.add_argument("--groups", type=numbers, default=[16, 64])
    command.add_argument("--windows", type=numbers, default=[1, 2, 4, 8])
    command.add_argument("--epochs", type=int, default=3)
    command.add_argument("--sorted", action="store_true", help="classes follow each other in the split")
    return conclude(command.parse_args(argv), measured, report)


if __name__ == "__main__":
    main()
