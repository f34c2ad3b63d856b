"""Train the schedules against each other, and the dense model, in turns; then compare accuracy and time at each rho.

    python -m tools.study --data DIR --output runs/study --recipe cifar10 --arms dense cyclic --markdown study.md

DIR is a data set of pss-convert. Every arm, sort and seed is a run of pss-train, in a folder of its own. They take
turns of `--turn` epochs, in an order that is reversed every time, so that whatever else the machine does falls on all
of them: the ratio of times is formed epoch by epoch, against the dense run of the same seed. Runs are resumed to the
bit, so the turns change nothing that is learnt, and the study itself goes on where it was stopped. At the end pss-eval
sweeps rho over all runs, with its picture and report.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pipelines
from pss import recipes
from pss.planning.plan import plan
from tools.benchmarks.measure import environment, page, publish, spread
from tools.comparing.statistics import Mean
from tools.comparing.turns import Run, take_turns
from tools.demo import command

ARMS = {
    "dense": ["method=dense"],
    "fixed": ["schedule.name=fixed", "schedule.rho=0.6"],
    "linear": ["schedule.name=linear"],
    "cyclic": ["schedule.name=cyclic"],
}
"""The training of the paper's tables: all patches, Fixed(0.6), Linear(0.2-1.0) and Cyclic(0.2-1.0)."""


@dataclass(frozen=True)
class Trial:
    """One run of the study."""

    arm: str
    sort: str
    seed: int
    run: Run

    def timed(self, turn: int, steps: int) -> dict[int, float]:
        """Seconds of training by epoch, of those that one process trained from beginning to end.

        Where a turn has several, the first one is left out: on a GPU its steps are compiled in it.
        """
        rows = self.run.rows()
        whole = [row for row in rows if sum(level["steps"] for level in row["by_rho"].values()) == steps]
        return {row["epoch"]: row["train_seconds"] for row in whole if turn == 1 or (row["epoch"] - 1) % turn}


def trials(arguments: argparse.Namespace, epochs: int) -> list[Trial]:
    """Every run, in the order of the first turn. Dense training has no choice of patches, so it has one sort."""
    made = []
    for seed in arguments.seeds:
        for arm in arguments.arms:
            for sort in arguments.sorts if arm != "dense" else arguments.sorts[:1]:
                settings = (*arguments.set, *ARMS[arm], f"model.sort={sort}", f"train.seed={seed}")
                folder = arguments.output / f"{arm}-{sort}-{seed}"
                made.append(Trial(arm, sort, seed, Run(folder, epochs, settings)))
    return made


def train(made: Sequence[Trial], arguments: argparse.Namespace, steps_per_epoch: int) -> None:
    """All runs to their end, in turns."""

    def advance(run: Run, epochs: int) -> None:
        words = [*run.settings, f"train.max_steps={epochs * steps_per_epoch}"]
        options = [word for setting in words for word in ("--set", setting)]
        where = ["--data", str(arguments.data), "--output", str(run.folder), "--loader", arguments.loader]
        command("train", arguments.recipe, *where, "--resume", *options)

    take_turns([trial.run for trial in made], arguments.turn, advance, lambda line: print(f"\n{line}", flush=True))


def measure(made: Sequence[Trial], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of pss-eval over all runs."""
    rhos = ",".join(map(str, arguments.rhos))
    folders = [str(trial.run.folder) for trial in made]
    command("eval", *folders, "--data", str(arguments.data), "--rho", rhos, "--output", str(arguments.output))
    rows: list[dict[str, Any]] = json.loads((arguments.output / "rho.json").read_text(encoding="utf-8"))
    return rows


def compare(
    made: Sequence[Trial],
    rows: Sequence[dict[str, Any]],
    limits: dict[str, float],
    rhos: Sequence[float],
    turn: int,
    steps: int,
) -> list[dict[str, Any]]:
    """One line for every arm and sort: accuracy over its seeds, and its time over that of the dense runs."""
    lines = []
    for arm, sort in dict.fromkeys((trial.arm, trial.sort) for trial in made):
        own = [trial for trial in made if (trial.arm, trial.sort) == (arm, sort)]
        names = {trial.run.name for trial in own}
        top1 = {rho: [row["top1"] for row in rows if row["run"] in names and row["rho"] == rho] for rho in rhos}
        ratios = []
        for trial in own:
            dense = next((other for other in made if other.arm == "dense" and other.seed == trial.seed), None)
            if dense is not None and trial is not dense:
                theirs = dense.timed(turn, steps)
                mine = trial.timed(turn, steps)
                ratios += [mine[epoch] / theirs[epoch] for epoch in mine if epoch in theirs]
        seconds = [trial.run.seconds() for trial in own]
        line = {"arm": arm, "sort": sort, "seeds": len(own), "top1": top1, "seconds": seconds, "ratios": ratios}
        lines.append(line | {"limit": limits[arm]})
    return lines


def report(result: dict[str, Any]) -> str:
    """The result as markdown."""
    settings, rhos, rows = result["settings"], result["rhos"], []
    for line in result["lines"]:
        accuracies = [Mean.of(line["top1"][rho]).told(".2f") for rho in rhos]
        minutes = Mean.of([seconds / 60 for seconds in line["seconds"]]).told(".2f")
        time_ratio = "1" if line["arm"] == "dense" else "–"
        if line["ratios"]:
            time_ratio = spread(line["ratios"], ".3f")
        rows.append(" | ".join([line["arm"], line["sort"], *accuracies, minutes, time_ratio, f"{line['limit']:.3f}"]))
    top1 = " | ".join(f"top-1 % at ρ = {rho:g}" for rho in rhos)
    head = f"training | patches | {top1} | minutes | of dense: time (quartiles over epochs) | arithmetic"
    title = (
        f"`pss-train {result['recipe']}`, {result['epochs']} epochs of {result['images']:,} images, seeds "
        f"{', '.join(map(str, result['seeds']))}" + (f"; {', '.join(settings)}" if settings else "")
    )
    return page(result, title, head, rows)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run as the arguments say (the command line's if None), print and write the report, and return the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder made by pss-convert")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs; goes on with those it holds")
    parser.add_argument("--recipe", default="cifar10", help="what to train")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=["dense", "cyclic"])
    parser.add_argument("--sorts", nargs="+", choices=("magnitude", "random"), default=["magnitude"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rhos", nargs="+", type=float, default=[1.0, 0.8, 0.6, 0.4, 0.2], help="of the comparison")
    parser.add_argument("--turn", type=int, default=1, help="epochs that a run does before the next one has its turn")
    parser.add_argument("--loader", default="auto", help="as of pss-train")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change the recipe")
    parser.add_argument("--json", type=Path, help="where to write every epoch and every row of the sweep")
    parser.add_argument("--markdown", type=Path, help="where to write the table, beside printing it")
    arguments = parser.parse_args(argv)
    if arguments.turn < 1:
        parser.error(f"--turn is {arguments.turn}; a turn has at least 1 epoch")
    if not all(0 < rho <= 1 for rho in arguments.rhos):
        parser.error("--rhos are shares of patches, in (0, 1]")
    config = recipes.get(arguments.recipe).with_settings(arguments.set)
    num_images = sum(pipelines.open_dataset(arguments.data).per_class["train"])
    plans = {arm: plan(config.with_settings(ARMS[arm]), num_images=num_images) for arm in dict.fromkeys(arguments.arms)}
    made = trials(arguments, config.train.epochs)
    steps = num_images // config.train.batch_size
    train(made, arguments, steps)
    rows = measure(made, arguments)
    limits = {arm: planned.mean_cost for arm, planned in plans.items()}
    result = {
        "recipe": arguments.recipe,
        "settings": arguments.set,
        "epochs": config.train.epochs,
        "images": num_images,
        "seeds": arguments.seeds,
        "rhos": arguments.rhos,
        "environment": environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "lines": compare(made, rows, limits, arguments.rhos, arguments.turn, steps),
        "log": {trial.run.name: trial.run.rows() for trial in made},
        "sweep": rows,
    }
    print()
    publish(result, report(result), arguments)
    return result


if __name__ == "__main__":
    main()
