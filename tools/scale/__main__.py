"""What large data sets cost on one machine: opening them, planning their epochs, and converting them.

    python -m tools.scale --json scale.json
    python -m tools.scale --samples 1280000 --classes 1000 --parts loading

Sets of every size are made up (see `sets`), in FOLDER, where the next run finds them again.

Loading: each process opens the set and goes through epochs that last `--pause` seconds and decode nothing. Told are how
long the training thread waits for an epoch's plan before its first batch, and at its end for the hash that what was
delivered is compared with; and the memory that the process has to itself, beyond what Python and its modules take.

Files: how many are open at once while an image of every tar is read, under a limit.

Converting: class folders, up to the plan of the tars, without looking at images. Of the memory the peak is told, with
mapped files and modules.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools.benchmarks.measure import Result, conclude, parser, table, told
from tools.scale.processes import Task, marked, seconds, watched
from tools.scale.sets import class_folders, converted_set

PARTS = ("loading", "files", "converting")
_PHASES = {"listing": ("begin", "told"), "reading": ("told", "check"), "plan": ("checked", "tar")}
"""Of a conversion, between marks: what the source is; its samples and what they are compared by; what is written."""


def measured(arguments: argparse.Namespace) -> Result:
    """What every part found, by its name, a row for every size."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        sizes = list(zip(arguments.samples, arguments.classes, strict=True))
        found: Result = {}
        if "loading" in arguments.parts:
            found["loading"] = [
                loading(folder, *size, processes, arguments) for size in sizes for processes in arguments.processes
            ]
        if "files" in arguments.parts:
            root = converted_set(folder / f"tars-{arguments.tars}", 2 * arguments.tars, 10, arguments.tars)
            (found["files"],) = watched(
                "tools.scale.loading", [{"what": "files", "root": str(root), "limit": arguments.limit}]
            )
        if "converting" in arguments.parts:
            found["converting"] = [converting(folder, *size) for size in sizes for _ in range(arguments.rounds)]
        return found


def loading(folder: Path, samples: int, classes: int, processes: int, arguments: argparse.Namespace) -> Result:
    """One set, opened by so many ranks at once."""
    root = converted_set(folder / f"set-{samples}", samples, classes, -(-samples // arguments.shard_size))
    task = {
        "what": "epochs",
        "root": str(root),
        "world_size": processes,
        **{name: vars(arguments)[name] for name in ("batch", "epochs", "pause")},
    }
    ranks = watched("tools.scale.loading", [{**task, "rank": rank} for rank in range(processes)])
    return {
        "samples": samples,
        "processes": processes,
        "open_seconds": [seconds(rank, "begin", "opened") for rank in ranks],
        "build_seconds": [seconds(rank, "build", "built") for rank in ranks],
        "fresh_seconds": [rank["waits"][0] for rank in ranks],
        "later_seconds": [wait for rank in ranks for wait in rank["waits"][1:]],
        "compared_seconds": [wait for rank in ranks for wait in rank["compared"]],
        "peak_bytes": [rank["peak_anonymous"] for rank in ranks],
        "kept_bytes": [_own(rank, "kept") for rank in ranks],
        "table_bytes": [_own(rank, "opened") for rank in ranks],
        "hashes": [rank["hash"] for rank in ranks],
    }


def converting(folder: Path, samples: int, classes: int) -> Result:
    """One conversion."""
    source = class_folders(folder / f"folders-{samples}", samples, classes)
    task = {"source": str(source), "dest": str(folder / "converted")}
    (found,) = watched("tools.scale.converting", [task])
    return {
        "samples": samples,
        **{name: [seconds(found, *marks), seconds(found, *marks, processor=True)] for name, marks in _PHASES.items()},
        "peak_bytes": found["ended"]["peak"],
        "begun_bytes": found["begun"]["peak"],
        "shards": found["shards"],
        "digest": found["listing"],
    }


def _own(found: Task, name: str) -> int:
    """Anonymous bytes at a mark, beyond those at the beginning."""
    return marked(found, name)[-1] - marked(found, "begin")[-1]


def report(result: Result) -> str:
    """The result as markdown."""
    lines = ["Large sets on one machine", told(result)]
    if rows := result.get("loading"):
        head = (
            "samples | processes | opening, s | waiting for the first plan, s | for later ones, median | at most | "
            "for the hash, at most | own memory, MB: peak | kept | of that, the table"
        )
        lines += ["", *table(head, map(_loading_row, rows))]
    if found := result.get("files"):
        lines += [
            "",
            f"{found['tars']:,} tars under ulimit -n {result['settings']['limit']}: {found['most_open']} files open",
        ]
    if rows := result.get("converting"):
        head = (
            "files | listing, s (of a processor) | samples, s | plan of the tars, s | peak, MB | "
            "bytes a file beyond the start"
        )
        lines += ["", *table(head, map(_converting_row, rows))]
    return "\n".join(lines)


def _loading_row(row: Result) -> str:
    later = row["later_seconds"]
    return (
        f"{row['samples']:,} | {row['processes']} | {max(row['open_seconds']):.2f} | {max(row['fresh_seconds']):.3f} | "
        f"{statistics.median(later):.4f} | {max(later):.4f} | {max(row['compared_seconds']):.4f} | "
        f"{max(row['peak_bytes']) / 1e6:.0f} | {max(row['kept_bytes']) / 1e6:.0f} | "
        f"{max(row['table_bytes']) / 1e6:.0f}"
    )


def _converting_row(row: Result) -> str:
    beyond = (row["peak_bytes"] - row["begun_bytes"]) / row["samples"]
    return (
        f"{row['samples']:,} | {_both(row['listing'])} | {_both(row['reading'])} | {_both(row['plan'])} | "
        f"{row['peak_bytes'] / 1e6:.0f} | {beyond:.0f}"
    )


def _both(times: Sequence[float]) -> str:
    return f"{times[0]:.1f} ({times[1]:.1f})"


def main(argv: Sequence[str] | None = None) -> Result:
    """Run as the arguments say (the command line's if None), print and write the report, and return the result."""
    command = parser(__doc__, rounds=1)
    command.add_argument("--samples", type=int, nargs="+", default=[1_280_000, 13_000_000], help="sizes of sets")
    command.add_argument("--classes", type=int, nargs="+", default=[1000, 21_000], help="as many")
    command.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    command.add_argument("--processes", type=int, nargs="+", default=[1, 8], help="that open a set at once")
    command.add_argument("--epochs", type=int, default=4, help="of each process")
    command.add_argument("--pause", type=float, default=5.0, help="seconds that an epoch lasts")
    command.add_argument("--batch", type=int, default=128, help="images of a process")
    command.add_argument("--shard-size", type=int, default=2000, help="images a tar")
    command.add_argument("--tars", type=int, default=10_000, help="that are read under a limit of open files")
    command.add_argument("--limit", type=int, default=256, help="of open files")
    command.add_argument("--folder", type=Path, help="where sets are made, and stay; else a temporary one")
    return conclude(command.parse_args(argv), measured, report)


if __name__ == "__main__":
    main()
