"""Arms trained in turns, each for as long as the dense run of its seed: a comparison that goes on where it stopped."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import pipelines
from pipelines.probe import probe
from pss import recipes
from pss.config import Config
from pss.planning.plan import plan
from pss.runtime import files
from tools.comparing import arms as known_arms
from tools.comparing import estimate, evaluation
from tools.comparing.arms import Arm, Layout, with_starts
from tools.comparing.budget import Pace, epochs_for
from tools.comparing.turns import Run, take_turns

REFERENCE = "dense"
PLAN = "plan.json"
_LAST_LINES = 12


@dataclass(frozen=True)
class Column:
    """What all arms have the same of, and how much of it."""

    of: Literal["epochs", "time", "arithmetic"]
    share: float = 1.0
    """Of what the dense run has."""

    @property
    def key(self) -> str:
        """As files and folders have it."""
        return self.of if self.share == 1 else f"{self.of}-{self.share:g}"

    @property
    def name(self) -> str:
        """As tables and pictures have it."""
        told = {"epochs": "equal epochs", "time": "equal training time", "arithmetic": "equal arithmetic"}[self.of]
        return told if self.share == 1 else f"{told}, {self.share:g} of the dense run's"

    def reference_epochs(self, epochs: int) -> int:
        """Of the dense run that the others are held against, where a whole one has `epochs`."""
        return max(1, round(self.share * epochs))


EPOCHS, TIME = Column("epochs"), Column("time")


class Stopped(Exception):
    """A run failed or was interrupted."""

    def __init__(self, code: int, told: str) -> None:
        super().__init__(told)
        self.code = code


class Comparison:
    """Runs of a comparison, and how long each of them is."""

    def __init__(
        self, arguments: argparse.Namespace, every: dict[str, Arm], columns: Sequence[Column] = (EPOCHS, TIME)
    ) -> None:
        """
        Args:
            arguments: As `parser` has them.
            every: Arms by name, of which the arguments choose some.
            columns: What is compared.

        Raises:
            ValueError: arms, settings or data that do not go together.
        """
        chosen = known_arms.choose(every, arguments.arms or list(every), REFERENCE)
        config = recipes.get(arguments.recipe).with_settings(arguments.set)
        self.arguments, self.output, self.data = arguments, arguments.output, arguments.data
        self.arms, self.columns = list(chosen.values()), tuple(columns)
        self.dataset = pipelines.open_dataset(self.data)
        self.num_images = self.dataset.num_samples("train")
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
        self.own_cost = cache(self._own_cost)
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

    def options(self) -> evaluation.Options:
        """What runs are evaluated with."""
        return evaluation.Options(
            self.data,
            self.plan["loader"],
            self.arguments.batch_size,
            self.arguments.ema,
            self.arguments.device,
        )

    def runs(self, epochs: Mapping[str, int], seed: int) -> list[Run]:
        """Those of the arms that are named, for so many epochs in all."""
        return [self.layout.run(arm, seed, epochs[arm.name]) for arm in self.arms if arm.name in epochs]

    def admit(self) -> None:
        """Begin the comparison in the output folder, or go on with it. Raises `ValueError` for another one."""
        path = self.output / PLAN
        saved = self._saved()
        if saved is None:
            config = recipes.get(self.plan["recipe"]).with_settings(self.plan["settings"])
            if self.plan["loader"] == "auto":  # once for all runs
                device = "cuda" if torch.cuda.is_available() else "cpu"
                self.plan["loader"] = probe(
                    self.data, "train", config=config.data, num_workers=config.train.num_workers, device=device
                ).backend
            files.write(path, json.dumps(self.plan | {"equal": {}}, indent=1) + "\n")
            return
        if self.plan["loader"] == "auto":
            self.plan["loader"] = saved.get("loader")
        changed = [key for key, value in self.plan.items() if saved.get(key) != value]
        if changed:
            told = "; ".join(f"{key} ({_short(saved.get(key))}, now {_short(self.plan[key])})" for key in changed)
            raise ValueError(
                f"{self.output} holds a comparison with other settings: {told}; repeat them, or name another --output"
            )

    def _saved(self) -> dict[str, Any] | None:
        path = self.output / PLAN
        try:
            saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            raise ValueError(f"{path} is damaged; restore it, or name another --output") from None
        return saved

    def equal(self, column: Column) -> dict[str, dict[str, int]]:
        """Epochs of every arm by seed; chosen once, then kept.

        An arm whose shortest run takes too long for one of the seeds is left out, and so is one for equal epochs only.
        """
        saved = self._saved()
        assert saved is not None, "admit comes first"
        chosen: dict[str, dict[str, dict[str, int]]] = saved.setdefault("equal", {})
        if column.key not in chosen:
            by_seed = {str(seed): self._epochs(column, seed) for seed in self.plan["seeds"]}
            fit = set.intersection(*map(set, by_seed.values()))
            chosen[column.key] = {
                seed: {name: count for name, count in epochs.items() if name in fit} for seed, epochs in by_seed.items()
            }
            files.write(self.output / PLAN, json.dumps(saved, indent=1) + "\n")
        return chosen[column.key]

    def _epochs(self, column: Column, seed: int) -> dict[str, int]:
        if column.of == "epochs":
            return {arm.name: column.reference_epochs(self.layout.epochs) for arm in self.arms}
        if column.of == "time":
            measured = self.layout.epochs if EPOCHS in self.columns else self.pilot_epochs
            return self.epochs_at(column, {arm.name: self.pace(arm, seed) for arm in self.arms}, measured)
        counted = {arm.name: Pace(1.0, self.own_cost(arm.name, self.layout.epochs)) for arm in self.arms}
        return self.epochs_at(column, counted, self.layout.epochs)

    def epochs_at(self, column: Column, paces: Mapping[str, Pace], measured: int) -> dict[str, int]:
        """Epochs in all of every arm that gets what the reference has, at paces that were measured or counted in runs
        of so many epochs.

        A schedule that is rounded to epochs may cost less in a run of another length: its pace goes with its cost.
        """
        reference, given = self.layout.arms[REFERENCE], column.reference_epochs(self.layout.epochs)
        limit = paces[REFERENCE].seconds(reference, given)
        chosen = {}
        for arm in self.arms:
            if arm.name == REFERENCE:
                chosen[arm.name] = given
                continue
            if not arm.equal_time:
                continue
            pace = paces[arm.name]
            with suppress(ValueError):  # it takes too long, or so few epochs cannot be divided as it wants
                first = epochs_for(arm, pace, limit)
                ratio = self.own_cost(arm.name, first) / self.own_cost(arm.name, measured)
                count = epochs_for(arm, replace(pace, own=pace.own * ratio), limit)
                self.layout.config(self.layout.run(arm, self.plan["seeds"][0], count))
                chosen[arm.name] = count
        return chosen

    def _own_cost(self, arm: str, epochs: int) -> float:
        """Arithmetic of an epoch over that of dense training, fine-tuning alone where an arm has that."""
        config = self.layout.config(self.layout.run(self.layout.arms[arm], self.plan["seeds"][0], epochs))
        return plan(config, num_images=self.num_images, num_classes=self.num_classes).mean_cost

    def pace(self, arm: Arm, seed: int) -> Pace:
        """Seconds of an epoch, in the runs of equal epochs if there are any, or else in a pilot."""
        run = self.layout.run(arm, seed, self.layout.epochs) if EPOCHS in self.columns else self.pilot(arm)
        before = 0.0 if run.needs is None else run.needs.seconds() / run.needs.epochs
        return Pace(before, run.seconds() / run.epochs)

    @property
    def pilot_epochs(self) -> int:
        """Of a pilot."""
        return max(2, -(-self.layout.epochs // 5))

    def pilot(self, arm: Arm) -> Run:
        """A short run that shows how long an epoch takes."""
        layout = replace(self.layout, folder=self.output / "pilots")
        return layout.run(arm, self.plan["seeds"][0], self.pilot_epochs)

    def train(self, columns: Sequence[Column] | None = None) -> dict[str, dict[str, dict[str, int]]]:
        """All runs to their end; epochs of every arm by column and seed. All columns unless some are named."""
        chosen: dict[str, dict[str, dict[str, int]]] = {}
        # Equal epochs first: how long they took is what equal time is reckoned with.
        for column in sorted(self.columns if columns is None else columns, key=lambda one: one != EPOCHS):
            if column.of == "time" and EPOCHS not in self.columns:
                self.take_turns([self.pilot(arm) for arm in self.arms], "how long epochs take", 1)
            chosen[column.key] = self.equal(column)
            runs = [run for seed in self.plan["seeds"] for run in self.runs(chosen[column.key][str(seed)], seed)]
            self.take_turns(runs, column.name)
        return chosen

    def take_turns(self, runs: Sequence[Run], told: str, turn: int | None = None) -> None:
        """These runs to their end, and those that they start from."""
        take_turns(
            with_starts(runs), turn or self.turn, self._advance, lambda line: print(f"{told}: {line}", flush=True)
        )

    def _advance(self, run: Run, epochs: int) -> None:
        steps = epochs * (self.num_images // self.layout.config(run).train.batch_size)
        words = [word for one in (*run.settings, f"train.max_steps={steps}") for word in ("--set", one)]
        where = ["--data", str(self.data), "--output", str(run.folder), "--loader", str(self.plan["loader"])]
        said = run.folder.parent / f"{run.name}.txt"
        said.parent.mkdir(parents=True, exist_ok=True)
        with said.open("a", encoding="utf-8") as file:
            command = [sys.executable, "-m", "cli.train", self.plan["recipe"], *where, "--resume", *words]
            print(f"$ pss-train {' '.join(command[3:])}", file=file, flush=True)
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False)
        if done.returncode:
            last = said.read_text(encoding="utf-8").splitlines()[-_LAST_LINES:]
            raise Stopped(
                done.returncode, "\n".join([*last, f"{run.name} did not train; all that it said is in {said}"])
            )

    def trained(self, chosen: Mapping[str, Mapping[str, Mapping[str, int]]]) -> dict[tuple[str, str, int], Run]:
        """The runs of `train`, by the key of the column, arm and seed. Those of several columns may be one."""
        return {
            (key, arm.name, seed): self.layout.run(arm, seed, epochs[arm.name])
            for key, by_seed in chosen.items()
            for arm in self.arms
            for seed in self.plan["seeds"]
            for epochs in [by_seed[str(seed)]]
            if arm.name in epochs
        }

    def measured_paces(self, maps: Callable[[Config], Tensor | None] = lambda config: None) -> dict[str, Pace]:
        """Of every arm before anything is trained, from a few measured steps, data at hand; `maps` as of
        `estimate.epoch_seconds`."""
        runs = {arm.name: self.layout.run(arm, self.plan["seeds"][0], self.layout.epochs) for arm in self.arms}
        measured = {
            name: estimate.epoch_seconds(run, self.layout.config, self.num_images, self.num_classes, maps)
            for name, run in runs.items()
        }
        return {
            arm.name: Pace(measured.get(arm.start or arm.name, measured[REFERENCE]), measured[arm.name])
            for arm in self.arms
        }

    def estimated(self, paces: Mapping[str, Pace]) -> tuple[float, dict[str, dict[str, int]]]:
        """Seconds of training all of a new comparison, the start of processes included, and about how many epochs each
        arm has by column."""
        seed = self.plan["seeds"][0]
        chosen = {
            column.key: self.epochs_at(column, paces, self.layout.epochs)
            if column.of == "time"
            else self._epochs(column, seed)
            for column in self.columns
        }
        runs = [(arm, epochs[arm.name]) for epochs in chosen.values() for arm in self.arms if arm.name in epochs]
        seconds = estimate.total_seconds(self.layout, runs, paces, len(self.plan["seeds"]), self.turn)
        if EPOCHS not in self.columns and any(column.of == "time" for column in self.columns):
            for arm in self.arms:
                seconds += self.pilot(arm).epochs * (paces[arm.name].own + estimate.START_SECONDS)
        return seconds, chosen


def _short(value: Any) -> str:
    told = ", ".join(value) if isinstance(value, dict) else str(value)
    return told if len(told) < 60 else f"{told[:60]}…"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """With the arguments that every comparison has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, required=True, help="a folder made by pss-convert")
    made.add_argument("--output", type=Path, required=True, help="folder of runs and results; goes on with those in it")
    made.add_argument("--recipe", default="cifar10", help="what to train")
    made.add_argument(
        "--arms", nargs="+", metavar="ARM", help=f"which to compare, {REFERENCE} among them; all by default"
    )
    made.add_argument(
        "--arms-file",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="TOML with further arms, or others of the same name",
    )
    made.add_argument("--seeds", nargs="+", type=int, default=[0], help="each is a run of every arm")
    made.add_argument("--epochs", type=int, help="of the dense run; those of the recipe by default")
    made.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change the recipe")
    made.add_argument("--turn", type=int, help="epochs that a run does before the next one; a fifth of all by default")
    made.add_argument("--loader", default="auto", help="as of pss-train; chosen once for all runs")
    made.add_argument("--batch-size", type=int, default=64, help="of evaluation")
    made.add_argument("--device", help="of evaluation; a GPU where there is one by default")
    made.add_argument("--ema", action="store_true", help="evaluate the moving averages of the weights")
    made.add_argument("--plan", action="store_true", help="measure a few steps, say what it would take, train nothing")
    return made


@contextmanager
def leaving(parsed: argparse.ArgumentParser) -> Iterator[None]:
    """Within, a run that stops and settings that cannot be end the process, with the run's exit code or with 2."""
    try:
        yield
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.code)
    except ValueError as error:
        parsed.error(str(error))


def check(arguments: argparse.Namespace, parsed: argparse.ArgumentParser) -> None:
    """Leave with a message where the arguments of `parser` cannot be."""
    if len(set(arguments.seeds)) < len(arguments.seeds):
        parsed.error("--seeds names one twice")
    if arguments.turn is not None and arguments.turn < 1:
        parsed.error(f"--turn is {arguments.turn}; a turn has at least 1 epoch")
    if arguments.epochs is not None and arguments.epochs < 1:
        parsed.error(f"--epochs is {arguments.epochs}; a run has at least 1 epoch")
    if arguments.batch_size < 1:
        parsed.error(f"--batch-size is {arguments.batch_size}; a batch has at least 1 image")
