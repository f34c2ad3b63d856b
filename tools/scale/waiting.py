"""What training straight from a store waits for: whole runs of `pss-train`, from the disk and over HTTP on loopback.

    python -m tools.scale.waiting --data DIR [--recipe cifar10] [--epochs 4] [--set train.batch_size=64] [--rounds 3]

Both kinds of run read the same set in the same windowed order and take turns; those over HTTP begin with an empty
cache and fetch every tar. Told is the time of the epochs, and the share of it that the training thread waited for
data: of the first epoch, during which tars arrive, and of all others. The server is another process of the same
machine, so what it takes of the processor is in the figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipelines.base import DataError
from tools.benchmarks.measure import Result, conclude, in_turns, over, parser, spread, table, told

KINDS = ("disk", "store")


def measured(arguments: argparse.Namespace) -> Result:
    """Of every kind of run and round: seconds and shares of waiting, and what the server was asked for."""
    with tempfile.TemporaryDirectory() as temporary, served(arguments.data) as url:
        number = iter(range(1000))

        def trained(where: Sequence[str]) -> Result:
            output = Path(temporary) / f"{next(number)}"
            cache = ["--cache-dir", f"{output}-cache"] if "://" in where[0] else []
            words = ["--output", str(output), "--loader", arguments.loader, "--data", *where, *cache]
            words += ["--set", f"train.epochs={arguments.epochs}", "--set", f"data.window={arguments.window}"]
            words += ["--set", f"data.groups={arguments.groups}"]
            words += [word for setting in arguments.set for word in ("--set", setting)]
            command = [sys.executable, "-m", "cli.train", arguments.recipe, *words, "--quiet"]
            if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
                raise DataError(f"pss-train {arguments.recipe} could not be run on {where[0]}; it has said why")
            return _epochs(output / "log.jsonl")

        cases = {"disk": lambda: trained([str(arguments.data)]), "store": lambda: trained([url])}
        found = in_turns(cases, arguments.rounds)
    return {kind: found[kind] for kind in KINDS}


def _epochs(log: Path) -> Result:
    """Seconds of training and of waiting, of the first epoch and of the others."""
    rows = [row for row in map(json.loads, log.read_text().splitlines()) if row["kind"] == "epoch"]
    parts = {"first": rows[:1], "others": rows[1:]}
    return {
        name: {
            "seconds": sum(row["train_seconds"] for row in part),
            "waited": sum(row["train_seconds"] * row["data_wait"] for row in part),
        }
        for name, part in parts.items()
    }


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder behind HTTP, served by another process."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            port = server.stdout.readline().partition(" port ")[2].split()[0]
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()


def report(result: Result) -> str:
    """The result as markdown."""
    rows = []
    for part, name in (("first", "the first epoch"), ("others", "the others")):
        seconds = {kind: [run[part]["seconds"] for run in result[kind]] for kind in KINDS}
        shares = {kind: [run[part]["waited"] / run[part]["seconds"] for run in result[kind]] for kind in KINDS}
        cells = [f"{spread(seconds[kind], '.1f')} | {spread(shares[kind], '.1%')}" for kind in KINDS]
        more = statistics.median(b - a for a, b in zip(shares["disk"], shares["store"], strict=True))
        rows.append(
            f"{name} | {' | '.join(cells)} | {spread(over(seconds['store'], seconds['disk']), '.3f')} | {more:+.1%}"
        )
    head = "epochs | disk: s | waiting | store: s | waiting | ratio of seconds | more waiting"
    return "\n".join(["Training from a store on loopback", told(result), "", *table(head, rows)])


def main(argv: Sequence[str] | None = None) -> Result:
    """Run as the arguments say (the command line's if None), print and write the report, and return the result."""
    command = parser(__doc__, rounds=3)
    command.add_argument("--data", type=Path, required=True, help="a converted set with tars")
    command.add_argument("--recipe", default="cifar10")
    command.add_argument("--loader", default="torch")
    command.add_argument("--epochs", type=int, default=4)
    command.add_argument("--window", type=int, default=2, help="data.window")
    command.add_argument("--groups", type=int, default=2, help="data.groups")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of pss-train")
    return conclude(command.parse_args(argv), measured, report)


if __name__ == "__main__":
    main()
