"""Compare training methods on one machine: trained in turns, at equal epochs and at equal training time.

    python -m tools.compare_methods --data DIR --output runs/comparison --recipe cifar10 --seeds 0 1 2 --epochs 20

DIR is a data set of pss-convert. Every arm and seed is a run of pss-train in a folder of its own; what an arm is made
of stands in tools/comparing/arms.toml. Arms that fine-tune start from a shorter dense run of the same seed, so that all
have seen as many epochs. Then every arm is trained anew for as long as the dense run of its seed took, pre-training and
teacher included. At the end all runs are evaluated beside each other: comparison.md, .csv, .json, .png and report.html.

The comparison goes on where it was stopped. `--plan` says what would be run and for how long, and trains nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cli.doctor import some_maps
from pss.inference.sweep import finite
from pss.runtime import files
from tools.benchmarks.measure import environment, table
from tools.comparing import arms as known_arms
from tools.comparing import comparison, evaluation, page
from tools.comparing.comparison import EPOCHS, PLAN, REFERENCE, TIME, Column, Comparison
from tools.comparing.lines import lines
from tools.comparing.picture import draw

RESULT = "comparison.json"


class MethodComparison(Comparison):
    """Methods at equal epochs and at equal training time."""

    def measure(self, chosen: dict[str, dict[str, dict[str, int]]]) -> dict[str, Any]:
        """The result: every run with its rows, and the lines of the table."""
        pairs = self.trained(chosen)
        runs = list({run.folder: run for run in pairs.values()}.values())
        rows = evaluation.evaluate(
            runs, replace(self.options(), rounds=self.arguments.rounds), self.output / "report.html"
        )
        costs = {
            run.name: evaluation.training_costs(run, self.layout.config, self.num_images, self.num_classes)
            for run in runs
        }
        trained = [
            {
                "column": column,
                "arm": arm,
                "seed": seed,
                "run": run.name,
                "epochs": run.epochs,
                "epochs_before": 0 if run.needs is None else run.needs.epochs,
                "seconds": run.seconds(),
                "seconds_before": 0.0 if run.needs is None else run.needs.seconds(),
                **costs[run.name],
                "points": rows[run.name],
                "log": run.rows(),
            }
            for (column, arm, seed), run in pairs.items()
        ]
        config = self.layout.config(runs[0])
        device = self.arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        seeds = len(self.plan["seeds"])
        result = {
            "title": f"{len(self.arms)} ways to train `{self.plan['recipe']}`, {self.layout.epochs} epochs, "
            f"{seeds} seed{'s' * (seeds != 1)}",
            "plan": self.plan,
            "equal_time": chosen.get(TIME.key, {}),
            "environment": environment(torch.device(device)),
            "num_images": self.num_images,
            "num_val_images": trained[0]["points"][0]["num_images"],
            "num_classes": self.num_classes,
            "img_size": config.data.img_size,
            "batch_size": trained[0]["points"][0]["images"],
            "published": page.read_published(self.arguments.published),
            "runs": trained,
            "lines": lines(trained, REFERENCE),
        }
        return result | {"limits": page.limits(result)}

    def told(self) -> tuple[float, str]:
        """Seconds of training still ahead of a new comparison, from a few measured steps, and a table of the runs."""
        paces = self.measured_paces(partial(some_maps, data=self.data))
        seconds, chosen = self.estimated(paces)
        rows = []
        for arm in self.arms:
            split = [None if epochs is None else arm.split(epochs) for column in self.columns
                     for epochs in [chosen[column.key].get(arm.name)]]  # fmt: skip
            told = ["none" if one is None else f"{one[0]} + {one[1]}" if one[0] else f"{one[1]}" for one in split]
            rows.append(" | ".join([arm.name, *told, f"{paces[arm.name].own:.3g}", arm.note]))
        heads = ["epochs" if column == EPOCHS else f"epochs at {column.name}, about" for column in self.columns]
        head = " | ".join(["arm", *heads, "s an epoch, data at hand | note"])
        seeds = len(self.plan["seeds"])
        told_all = f"{seeds} seeds, about {seconds / 60:,.0f} min of training, validation and evaluation not counted"
        return seconds, "\n".join([*table(head, rows), "", told_all])


def write(result: dict[str, Any], folder: Path) -> None:
    """All files of a result but the report."""
    plain = json.dumps(finite(page.plain(result)), indent=1, allow_nan=False) + "\n"
    for name, content in (
        (RESULT, plain),
        ("comparison.csv", page.as_csv(result)),
        ("comparison.md", page.markdown(result)),
        ("comparison.png", draw(result)),
    ):
        files.write(folder / name, content)


def main(argv: Sequence[str] | None = None, columns: Sequence[Column] = (EPOCHS, TIME)) -> dict[str, Any] | None:
    """Run as the arguments say (the command line's if None), write the results and return them; None with --plan."""
    parser = comparison.parser(__doc__)
    parser.add_argument("--published", type=Path, default=page.PUBLISHED, help="TOML with rows to be shown apart")
    parser.add_argument("--rounds", type=int, default=7, help="in which speeds are measured, all runs in turns")
    parser.add_argument("--budget-minutes", type=float, help="refuse to begin what would take longer")
    arguments = parser.parse_args(argv)
    comparison.check(arguments, parser)
    if arguments.rounds < 1:
        parser.error(f"--rounds is {arguments.rounds}; speeds are measured in at least 1")
    with comparison.leaving(parser):
        page.read_published(arguments.published)
        compared = MethodComparison(arguments, known_arms.read_all(known_arms.BUILT_IN, *arguments.arms_file), columns)
        if arguments.plan or (arguments.budget_minutes is not None and not (arguments.output / PLAN).exists()):
            seconds, told = compared.told()
            print(told, flush=True)
            if arguments.plan:
                return None
            if seconds / 60 > arguments.budget_minutes:
                parser.error(
                    f"that is more than --budget-minutes {arguments.budget_minutes:g}; lower --epochs, or --seeds"
                )
        compared.admit()
        result = compared.measure(compared.train())
    write(result, compared.output)
    print(f"\n{page.markdown(result)}\nwrote {compared.output}/comparison.md, .csv, .json, .png")
    return result


if __name__ == "__main__":
    main()
