"""Compare training methods on one machine: trained in turns, at equal epochs and at equal training time.

    python -m tools.compare_methods --data DIR --output runs/comparison --recipe cifar10 --seeds 0 1 2 --epochs 20

DIR is a data set of pss-convert. Every arm and seed is a run of pss-train in a folder of its own; what an arm is made
of stands in tools/comparing/arms.toml. Arms that fine-tune start from a shorter dense run of the same seed, so that all
have seen as many epochs. Then every arm is trained anew for as long as the dense run of its seed took, pre-training and
teacher included. At the end all runs are evaluated beside each other: comparison.md, .csv, .json, .png and report.html.

The comparison goes on where it was stopped. `--plan` says what would be run and for how long, and trains nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pipelines
from cli.doctor import some_maps
from pipelines.probe import probe
from pss import recipes
from pss.inference.sweep import finite
from pss.runtime import files
from tools.benchmarks.measure import environment, table
from tools.comparing import arms as known_arms
from tools.comparing import estimate, evaluation, page
from tools.comparing.arms import Arm, Layout, with_starts
from tools.comparing.budget import Pace, epochs_for
from tools.comparing.lines import COLUMNS, lines
from tools.comparing.picture import draw
from tools.comparing.turns import Run, take_turns

REFERENCE = "dense"
PLAN, RESULT = "plan.json", "comparison.json"
_LAST_LINES = 12


class Comparison:
    """Runs of a comparison, trained and measured."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Raises `ValueError` for arms, settings or data that do not go together, or other ones than before."""
        every = known_arms.read(known_arms.BUILT_IN)
        for path in arguments.arms_file:
            every |= known_arms.read(path)
        chosen = known_arms.choose(every, arguments.arms or list(every), REFERENCE)
        config = recipes.get(arguments.recipe).with_settings(arguments.set)
        self.arguments, self.output, self.data = arguments, arguments.output, arguments.data
        self.arms = list(chosen.values())
        self.dataset = pipelines.open_dataset(self.data)
        self.num_images = sum(self.dataset.per_class["train"])
        self.num_classes = len(self.dataset.classes)
        epochs = config.train.epochs if arguments.epochs is None else arguments.epochs
        if epochs < max(arm.fewest_epochs for arm in self.arms):
            raise ValueError(f"--epochs is {epochs}; arms that fine-tune take at least 2")
        self.layout = Layout(
            arguments.recipe, tuple(arguments.set), epochs, self.output / "runs", every, self.num_images
        )
        self.turn = arguments.turn or max(1, -(-epochs // 5))
        for run in self.runs({arm.name: epochs for arm in self.arms}, arguments.seeds[0]):
            self.layout.config(run)  # raises before anything is trained
        self.plan: dict[str, Any] = {
            "recipe": arguments.recipe,
            "settings": arguments.set,
            "data": str(self.data.resolve()),
            "num_images": self.num_images,
            "epochs": epochs,
            "seeds": arguments.seeds,
            "reference": REFERENCE,
            "arms": {arm.name: arm.as_dict() for arm in self.arms},
            "loader": arguments.loader,
        }

    def runs(self, epochs: dict[str, int], seed: int) -> list[Run]:
        """Those of the arms that are named, for so many epochs in all."""
        return [self.layout.run(arm, seed, epochs[arm.name]) for arm in self.arms if arm.name in epochs]

    def admit(self) -> None:
        """Begin the comparison in the output folder, or go on with it. Raises `ValueError` for another one."""
        path = self.output / PLAN
        try:
            saved: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            saved = None
        except ValueError:
            raise ValueError(f"{path} is damaged; restore it, or name another --output") from None
        if saved is None:
            config = recipes.get(self.plan["recipe"]).with_settings(self.plan["settings"])
            if self.plan["loader"] == "auto":  # once for all runs
                device = "cuda" if torch.cuda.is_available() else "cpu"
                self.plan["loader"] = probe(
                    self.data, "train", config=config.data, num_workers=config.train.num_workers, device=device
                ).backend
            files.write(path, json.dumps(self.plan | {"equal_time": {}}, indent=1) + "\n")
            return
        if self.plan["loader"] == "auto":
            self.plan["loader"] = saved.get("loader")
        changed = [key for key, value in self.plan.items() if saved.get(key) != value]
        if changed:
            told = "; ".join(f"{key} ({_short(saved.get(key))}, now {_short(self.plan[key])})" for key in changed)
            raise ValueError(
                f"{self.output} holds a comparison with other settings: {told}; repeat them, or name another --output"
            )

    def equal_time(self) -> dict[str, dict[str, int]]:
        """Epochs of every arm by seed, whose time is nearest to that of the reference; chosen once, then kept.

        An arm whose shortest run takes too long for one of the seeds is left out.
        """
        path = self.output / PLAN
        saved = json.loads(path.read_text(encoding="utf-8"))
        if not saved["equal_time"]:
            epochs = self.layout.epochs
            for seed in self.plan["seeds"]:
                given = self.layout.run(self.layout.arms[REFERENCE], seed, epochs).seconds()
                saved["equal_time"][str(seed)] = found = {REFERENCE: epochs}
                for arm in self.arms:
                    if arm.name != REFERENCE and arm.equal_time:
                        with suppress(ValueError):  # it takes too long, or so few epochs cannot be divided as it wants
                            count = epochs_for(arm, self.pace(arm, seed), given)
                            self.layout.config(self.layout.run(arm, seed, count))
                            found[arm.name] = count
            fit = set.intersection(*map(set, saved["equal_time"].values()))
            saved["equal_time"] = {
                seed: {name: count for name, count in found.items() if name in fit}
                for seed, found in saved["equal_time"].items()
            }
            files.write(path, json.dumps(saved, indent=1) + "\n")
        chosen: dict[str, dict[str, int]] = saved["equal_time"]
        return chosen

    def pace(self, arm: Arm, seed: int) -> Pace:
        """Seconds of an epoch in the runs of equal epochs."""
        run = self.layout.run(arm, seed, self.layout.epochs)
        before = 0.0 if run.needs is None else run.needs.seconds() / run.needs.epochs
        return Pace(before, run.seconds() / run.epochs)

    def train(self) -> dict[str, dict[str, int]]:
        """All runs to their end, and which number of epochs each arm has at equal training time, by seed."""
        seeds = self.plan["seeds"]
        same = {arm.name: self.layout.epochs for arm in self.arms}
        self._take_turns([run for seed in seeds for run in self.runs(same, seed)], COLUMNS["epochs"])
        chosen = self.equal_time()
        self._take_turns([run for seed in seeds for run in self.runs(chosen[str(seed)], seed)], COLUMNS["time"])
        return chosen

    def _take_turns(self, runs: Sequence[Run], column: str) -> None:
        take_turns(with_starts(runs), self.turn, self._advance, lambda line: print(f"{column}: {line}", flush=True))

    def _advance(self, run: Run, epochs: int) -> None:
        steps = epochs * (self.num_images // self.layout.config(run).train.batch_size)
        words = [word for one in (*run.settings, f"train.max_steps={steps}") for word in ("--set", one)]
        where = [
            "--data",
            str(self.data),
            "--output",
            str(run.folder),
            "--loader",
            str(self.plan["loader"]),
            "--resume",
        ]
        said = run.folder.parent / f"{run.name}.txt"
        said.parent.mkdir(parents=True, exist_ok=True)
        with said.open("a", encoding="utf-8") as file:
            command = [sys.executable, "-m", "cli.train", self.plan["recipe"], *where, *words]
            print(f"$ pss-train {' '.join(command[3:])}", file=file, flush=True)
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False)
        if done.returncode:
            last = said.read_text(encoding="utf-8").splitlines()[-_LAST_LINES:]
            raise Stopped(
                done.returncode, "\n".join([*last, f"{run.name} did not train; all that it said is in {said}"])
            )

    def measure(self, chosen: dict[str, dict[str, int]]) -> dict[str, Any]:
        """The result: every run with its rows, and the lines of the table."""
        pairs = {
            (column, arm.name, seed): self.layout.run(arm, seed, epochs)
            for column in COLUMNS
            for arm in self.arms
            for seed in self.plan["seeds"]
            for epochs in [self.layout.epochs if column == "epochs" else chosen[str(seed)].get(arm.name)]
            if epochs is not None
        }
        runs = list({run.folder: run for run in pairs.values()}.values())
        options = evaluation.Options(
            self.data, self.plan["loader"], self.arguments.batch_size, self.arguments.ema, self.arguments.device
        )
        rows = evaluation.evaluate(runs, options, self.output / "report.html")
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
            f"{seeds} seed{'s' * (seeds != 1)}"
            + (f" ({', '.join(self.plan['settings'])})" if self.plan["settings"] else ""),
            "plan": self.plan,
            "equal_time": chosen,
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

    def estimated(self) -> tuple[float, str]:
        """Seconds of training still ahead of a new comparison, from a few measured steps, and a table of the runs."""
        runs = {arm.name: self.layout.run(arm, self.plan["seeds"][0], self.layout.epochs) for arm in self.arms}
        maps = partial(some_maps, data=self.data)
        measured = {
            name: estimate.epoch_seconds(run, self.layout.config, self.num_images, self.num_classes, maps)
            for name, run in runs.items()
        }
        pace = {
            arm.name: Pace(measured.get(arm.start or arm.name, measured[REFERENCE]), measured[arm.name])
            for arm in self.arms
        }
        seeds = self.plan["seeds"]
        seconds, chosen = estimate.total_seconds(self.layout, self.arms, REFERENCE, pace, len(seeds), self.turn)
        rows = []
        for arm in self.arms:
            split = [
                None if epochs is None else arm.split(epochs) for epochs in (self.layout.epochs, chosen.get(arm.name))
            ]
            told = ["none" if one is None else f"{one[0]} + {one[1]}" if one[0] else f"{one[1]}" for one in split]
            rows.append(" | ".join([arm.name, *told, f"{pace[arm.name].own:.3g}", arm.note]))
        head = "arm | epochs | epochs at equal time, about | s an epoch, data at hand | note"
        told = f"{len(seeds)} seeds, about {seconds / 60:,.0f} min of training, validation and evaluation not counted"
        return seconds, "\n".join([*table(head, rows), "", told])


class Stopped(Exception):
    """A run failed or was interrupted."""

    def __init__(self, code: int, told: str) -> None:
        super().__init__(told)
        self.code = code


def write(result: dict[str, Any], folder: Path) -> None:
    """All files of a result but the report."""
    plain = json.dumps(finite(_plain(result)), indent=1, allow_nan=False) + "\n"
    for name, content in (
        (RESULT, plain),
        ("comparison.csv", page.as_csv(result)),
        ("comparison.md", page.markdown(result)),
        ("comparison.png", draw(result)),
    ):
        files.write(folder / name, content)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _short(value: Any) -> str:
    told = ", ".join(value) if isinstance(value, dict) else str(value)
    return told if len(told) < 60 else f"{told[:60]}…"


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Run as the arguments say (the command line's if None), write the results and return them; None with --plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder made by pss-convert")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of runs and results; goes on with those in it"
    )
    parser.add_argument("--recipe", default="cifar10", help="what to train")
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", help=f"which to compare, {REFERENCE} among them; all by default"
    )
    parser.add_argument(
        "--arms-file",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="TOML with further arms, or others of the same name",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="each is a run of every arm")
    parser.add_argument("--epochs", type=int, help="that every arm sees in all; those of the recipe by default")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change the recipe")
    parser.add_argument(
        "--turn", type=int, help="epochs that a run does before the next one; a fifth of all by default"
    )
    parser.add_argument("--loader", default="auto", help="as of pss-train; chosen once for all runs")
    parser.add_argument("--batch-size", type=int, default=64, help="of evaluation, and of images per second")
    parser.add_argument("--device", help="of evaluation; a GPU where there is one by default")
    parser.add_argument("--ema", action="store_true", help="evaluate the moving averages of the weights")
    parser.add_argument("--published", type=Path, default=page.PUBLISHED, help="TOML with rows to be shown apart")
    parser.add_argument("--budget-minutes", type=float, help="refuse to begin what would take longer")
    parser.add_argument(
        "--plan", action="store_true", help="measure a few steps, say what it would take, train nothing"
    )
    arguments = parser.parse_args(argv)
    if len(set(arguments.seeds)) < len(arguments.seeds):
        parser.error("--seeds names one twice")
    if arguments.turn is not None and arguments.turn < 1:
        parser.error(f"--turn is {arguments.turn}; a turn has at least 1 epoch")
    if arguments.batch_size < 1:
        parser.error(f"--batch-size is {arguments.batch_size}; a batch has at least 1 image")
    try:
        page.read_published(arguments.published)
        comparison = Comparison(arguments)
        if arguments.plan or (arguments.budget_minutes is not None and not (arguments.output / PLAN).exists()):
            seconds, told = comparison.estimated()
            print(told, flush=True)
            if arguments.plan:
                return None
            if seconds / 60 > arguments.budget_minutes:
                parser.error(
                    f"that is more than --budget-minutes {arguments.budget_minutes:g}; lower --epochs, or --seeds"
                )
        comparison.admit()
        result = comparison.measure(comparison.train())
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.code)
    except ValueError as error:
        parser.error(str(error))
    write(result, comparison.output)
    print(f"\n{page.markdown(result)}\nwrote {comparison.output}/comparison.md, .csv, .json, .png")
    return result


if __name__ == "__main__":
    main()
