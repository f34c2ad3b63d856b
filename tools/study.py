"""Train the same model under different schedules and densely, at equal training time, and compare accuracy at each rho.

    python -m tools.study --data DIR --output runs/study --recipe cifar10 --seeds 0 1 2 3 4 --epochs 20

DIR is a data set of pss-convert. Every arm and seed is a run of pss-train in a folder of its own; what an arm is made
of stands in tools/comparing/schedules.toml. `--equal` says what all arms have the same of, each a column of its own:
the training time of the dense run or half of it, its arithmetic, its epochs. Epochs of equal time follow from short
pilot runs, or from those of equal epochs where these are asked for. Runs take turns, so that whatever else the machine
does falls on all of them. At the end there are study.md, .csv, .json and .png.

The study goes on where it was stopped. `--plan` says what would be run and for how long, and trains nothing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pss import methods
from pss.inference.sweep import finite
from pss.runtime import files
from tools.benchmarks.measure import environment, table
from tools.comparing import arms as known_arms
from tools.comparing import comparison, evaluation, schedule_page
from tools.comparing.comparison import REFERENCE, Column, Comparison
from tools.comparing.page import plain

ARMS = Path(known_arms.__file__).with_name("schedules.toml")
RHOS = (1.0, 0.8, 0.6, 0.4, 0.2)


class Study(Comparison):
    """Schedules against dense training, at each of several rhos."""

    def __init__(self, arguments: argparse.Namespace, columns: Sequence[Column]) -> None:
        """Raises `ValueError` for arms, settings or data that do not go together."""
        every = known_arms.read_all(ARMS, *arguments.arms_file)
        if all(column.share < 1 for column in columns):
            raise ValueError("--equal names shares only; add time, as a whole dense run is what shares are of")
        super().__init__(arguments, every, columns)
        for arm in self.arms:
            if arm.start is not None:
                raise ValueError(f"arm {arm.name} fine-tunes; compare it with python -m tools.compare_methods")
            config = self.layout.config(self.layout.run(arm, 0, self.layout.epochs))
            with torch.device("meta"):
                if methods.build(config, self.num_classes, 1).points() == (None,):
                    raise ValueError(
                        f"arm {arm.name} is of method {config.method}, which has no rho to choose; compare it with "
                        "python -m tools.compare_methods"
                    )

    def told(self) -> tuple[float, str]:
        """Seconds of training all of it, from a few measured steps, and a table of the runs."""
        paces = self.measured_paces()
        seconds, chosen = self.estimated(paces)
        rows = [
            " | ".join(
                [
                    arm.name,
                    *(str(epochs.get(arm.name, "none")) for epochs in chosen.values()),
                    f"{paces[arm.name].own:.3g}",
                    arm.note,
                ]
            )
            for arm in self.arms
        ]
        heads = " | ".join(f"epochs, {column.name}" for column in self.columns)
        count = len(self.plan["seeds"])
        minutes = f"{count} seed{'s' * (count != 1)}, about {seconds / 60:,.0f} min of training"
        left = "validation after each epoch, the evaluation at the end and the loader are not counted"
        return seconds, "\n".join([*table(f"arm | {heads} | s an epoch | note", rows), "", f"{minutes}; {left}"])

    def measure(self, chosen: Mapping[str, Mapping[str, Mapping[str, int]]], command: str) -> dict[str, Any]:
        """The result: every run with its accuracies, and the lines of the tables."""
        trained, seeds = self.trained(chosen), self.plan["seeds"]
        runs = list({run.folder: run for run in trained.values()}.values())
        rhos = self.arguments.rhos
        top1 = evaluation.accuracies(runs, self.options(), rhos, self.output / "accuracy")

        def row(column: str, arm: str, seed: int, run: comparison.Run) -> dict[str, Any]:
            logged = run.rows()
            return {
                "column": column,
                "arm": arm,
                "seed": seed,
                "run": run.name,
                "epochs": run.epochs,
                "seconds": run.seconds(),
                "arithmetic": self.own_cost(arm, run.epochs // self.layout.arms[arm].times) * run.epochs,
                "top1": top1[run.name],
                "curve": [
                    (sum(one["train_seconds"] for one in logged[: number + 1]), one["top1"])
                    for number, one in enumerate(logged)
                    if "top1" in one
                ],
            }

        rows = [row(column, arm, seed, run) for (column, arm, seed), run in trained.items()]
        # A whole dense run is in one of the columns.
        whole = [one for one in rows if one["arm"] == REFERENCE and one["epochs"] == self.layout.epochs]
        dense = {one["seed"]: one for one in whole}
        device = self.arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        columns = {column.key: column.name for column in self.columns}
        config = self.layout.config(runs[0])
        title = f"{len(self.arms)} ways to train `{self.plan['recipe']}`, {self.layout.epochs} dense epochs, "
        return {
            "title": f"{title}{len(seeds)} seed{'s' * (len(seeds) != 1)}",
            "command": command,
            "plan": self.plan,
            "columns": columns,
            "rhos": rhos,
            "environment": environment(torch.device(device)),
            "num_images": self.num_images,
            "num_val_images": self.dataset.num_samples("val"),
            "num_classes": self.num_classes,
            "img_size": config.data.img_size,
            "runs": rows,
            "lines": schedule_page.lines(rows, list(columns), REFERENCE, rhos, dense),
        }


def column(text: str) -> Column:
    """What `--equal` means by `time`, or `time:0.5`. Raises `ValueError`."""
    kind, _, share = text.partition(":")
    try:
        part = float(share or "1")
    except ValueError:
        part = 0.0
    if kind not in ("epochs", "time", "arithmetic") or not 0 < part <= 1 or (kind == "epochs" and part != 1):
        raise ValueError(
            f"--equal is {text!r}; write epochs, time or arithmetic, the latter two with a share of the dense run's "
            "if it is not all of it, as in time:0.5"
        )
    return Column(kind, part)  # type: ignore[arg-type]  # one of the three


def write(result: dict[str, Any], folder: Path) -> None:
    """All files of a result."""
    for name, content in (
        ("study.json", json.dumps(finite(plain(result)), indent=1, allow_nan=False) + "\n"),
        ("study.csv", schedule_page.as_csv(result)),
        ("study.md", schedule_page.markdown(result)),
        ("study.png", schedule_page.draw(result)),
    ):
        files.write(folder / name, content)


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Run as the arguments say (the command line's if None), write the results and return them; None with --plan."""
    parser = comparison.parser(__doc__)
    parser.add_argument(
        "--equal", nargs="+", default=["time", "time:0.5", "arithmetic"], metavar="WHAT",
        help="columns: epochs, time, arithmetic, and time:0.5 for half of the dense run's time",
    )  # fmt: skip
    parser.add_argument(
        "--rhos", nargs="+", type=float, default=list(RHOS), help="of the comparison, the main one first"
    )
    arguments = parser.parse_args(argv)
    comparison.check(arguments, parser)
    if not all(0 < rho <= 1 for rho in arguments.rhos):
        parser.error("--rhos are shares of patches, in (0, 1]")
    with comparison.leaving(parser):
        columns = list(dict.fromkeys(map(column, arguments.equal)))
        study = Study(arguments, columns)
        if arguments.plan:
            print(study.told()[1], flush=True)
            return None
        study.admit()
        words = sys.argv[1:] if argv is None else argv
        result = study.measure(study.train(), f"python -m tools.study {shlex.join(words)}")
    write(result, study.output)
    print(f"\n{schedule_page.markdown(result)}\nwrote {study.output}/study.md, .csv, .json, .png")
    return result


if __name__ == "__main__":
    main()
