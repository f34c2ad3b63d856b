"""What nodes that train in the windowed order read from a store, and what that must serve: worked out, not measured.

    python -m tools.scale.nodes [--samples 13000000,1000000000] [--nodes 1,8,64,1000] [--gpus 8] [--rate 2500]
        [--window 4] [--image-kb 110]

Every row plans an epoch of each node as the loaders do: which tars its groups need, and when. K is 64, or as many as
there are processes; tars have 2,000 samples, or as few as give every group eight. `--rate` are images per second and
GPU, which say how long an epoch takes. Nothing is left in the caches from an epoch before; more than the least cache
saves its share of the reading.

- read: by a node in an epoch, least and most.
- store: requests a second (each tar is asked for its size, and fetched) and GB/s, over the epoch; burst is what all
  processes ask for at once as it begins.
- cache: what a node must hold, two windows of each of its groups.
- plan: of a process, for two epochs: the order of its samples, and when it needs each tar; table: of the whole split,
  mapped, which the processes of a node share.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from pipelines.remote.fetching import THREADS
from pipelines.remote.windows import Windows
from pipelines.storage.manifest import SAMPLE
from tools.benchmarks.measure import Result, conclude, page, parser
from tools.scale.order import numbers

_USUAL_GROUPS, _USUAL_TAR, _LEAST_TARS = 64, 2_000, 8
_REQUESTS = 2  # of a tar: `info` and `get_file`
_NUMBER, _WORD = 4, 8  # bytes of a sample's number, and of a step


def measured(arguments: argparse.Namespace) -> Result:
    """A row for each number of samples and nodes."""
    return {"rows": [_row(arguments, samples, nodes) for samples in arguments.samples for nodes in arguments.nodes]}


def _row(arguments: argparse.Namespace, samples: int, nodes: int) -> Result:
    ranks = nodes * arguments.gpus
    groups = -(-_USUAL_GROUPS // ranks) * ranks
    tar = min(_USUAL_TAR, samples // groups // _LEAST_TARS)
    counts = np.array([min(tar, samples - begin) for begin in range(0, samples, tar)], dtype=np.int64)
    batch = -(-arguments.batch // groups) * groups
    order = Windows(counts, seed=1, groups=groups, window=arguments.window, batch_size=batch)
    image = 1000 * arguments.image_kb
    read, held = [], []
    for node in range(nodes):
        own = order.groups_of(node, nodes)
        read.append(image * int(counts[order.uses(0, own).first >= 0].sum()))
        held.append(image * sum(int(np.sort(counts[order.group_tars[k]])[-2 * order.window :].sum()) for k in own))
    seconds = samples / (arguments.rate * ranks)
    tars = sum(int((order.uses(0, order.groups_of(node, nodes)).first >= 0).sum()) for node in range(nodes))
    return {
        "samples": samples,
        "nodes": nodes,
        "groups": groups,
        "tar": tar,
        "tars": len(counts),
        "batch": batch,
        "epoch_seconds": seconds,
        "left_out": order.left_out / samples,
        "read_bytes": [min(read), max(read)],
        "requests_per_second": _REQUESTS * tars / seconds,
        "bytes_per_second": sum(read) / seconds,
        "burst": THREADS * ranks,
        "cache_bytes": max(held),
        "plan_bytes": 2 * (_NUMBER * order.steps_per_epoch * batch // ranks + 2 * _WORD * len(counts)),
        "table_bytes": samples * SAMPLE.itemsize,
    }


def report(result: Result) -> str:
    """The result as markdown."""
    settings = result["settings"]
    lines = [
        f"{row['samples']:,} | {row['nodes']:,} | {row['groups']:,} | {row['tars']:,} of {row['tar']:,} | "
        f"{row['left_out']:.2%} | {_bytes(*row['read_bytes'])} | {row['requests_per_second']:,.1f} | "
        f"{row['bytes_per_second'] / 1e9:,.1f} | {row['burst']:,} | {_bytes(row['cache_bytes'])} | "
        f"{_bytes(row['plan_bytes'])} | {_bytes(row['table_bytes'])}"
        for row in result["rows"]
    ]
    title = (
        f"{settings['gpus']} GPUs a node at {settings['rate']:,} images/s each, W = {settings['window']}, images of "
        f"{settings['image_kb']} kB, batches of {settings['batch']:,} or the next multiple of K"
    )
    head = (
        "samples | nodes | K | tars | left out | read a node and epoch | requests/s | GB/s | burst | cache a node | "
        "plan a process | table a node"
    )
    return page(result, title, head, lines)


def _bytes(*found: int) -> str:
    scale, unit = next(
        (scale, unit) for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if max(found) >= scale
    )
    shown = list(dict.fromkeys(f"{number / scale:.3g}" for number in found))
    return f"{' to '.join(shown)} {unit}"


def main(argv: Sequence[str] | None = None) -> Result:
    """Run as the arguments say (the command line's if None), print and write the report, and return the result."""
    command = parser(__doc__)
    command.add_argument("--samples", type=numbers, default=[13_000_000, 1_000_000_000])
    command.add_argument("--nodes", type=numbers, default=[1, 8, 64, 1_000])
    command.add_argument("--gpus", type=int, default=8)
    command.add_argument("--rate", type=int, default=2_500)
    command.add_argument("--window", type=int, default=4)
    command.add_argument("--image-kb", type=int, default=110)
    command.add_argument("--batch", type=int, default=4_096)
    return conclude(command.parse_args(argv), measured, report)


if __name__ == "__main__":
    main()
