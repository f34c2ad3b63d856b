"""What a figure is made from and what it leaves: a picture, and beside it the figures in it with their command.

A module of figures has `FIGURES: dict[str, Callable[[Path, Options], Made]]`, by the figure's number: called with the
folder for its files and with what it may use. One that needs runs and is given none trains small ones there.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from pss import recipes
from pss.config import Config
from tools.benchmarks.measure import environment
from tools.demo import command

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, told apart by people with any colour vision."""


@dataclass(frozen=True)
class Options:
    """What a figure may use."""

    recipe: str = "digits"
    settings: tuple[str, ...] = ()
    """Beside the recipe, as `section.key=value`."""
    data: Path | None = None
    """A data set of pss-convert; None makes one of the handwritten digits."""
    runs: tuple[Path, ...] = ()
    """Folders of runs that are to be drawn; with none, small ones are trained."""
    loader: str = "torch"

    def config(self, *settings: str) -> Config:
        """Of the recipe, with `settings` that those of the options may change."""
        return recipes.get(self.recipe).with_settings([*settings, *self.settings])


@dataclass(frozen=True)
class Made:
    """The files of a figure."""

    picture: Path
    table: Path


Figures = dict[str, Callable[[Path, Options], Made]]


def data_of(output: Path, options: Options) -> Path:
    """The data set of the options, or one that is made in `output`."""
    if options.data is not None:
        return options.data
    data = output / "data"
    if not data.exists():
        command("convert", "digits", str(data), "--format", "dali")
    return data


def runs_of(output: Path, options: Options, *settings: str, seeds: int) -> tuple[Path, ...]:
    """The runs of the options, or as many as there are seeds, trained in `output`."""
    if options.runs:
        return options.runs
    data, runs = data_of(output, options), []
    for seed in range(seeds):
        run = output / f"seed{seed}"
        words = [word for one in (*settings, *options.settings, f"train.seed={seed}") for word in ("--set", one)]
        where = ["--data", str(data), "--output", str(run), "--loader", options.loader, "--resume"]
        command("train", options.recipe, *where, *words)
        runs.append(run)
    return tuple(runs)


def save(figure: Figure, output: Path, name: str, found: dict[str, Any]) -> Made:
    """Write `name`.png and `name`.json: what was `found`, with the command, the machine and the versions."""
    made = Made(output / f"{name}.png", output / f"{name}.json")
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(made.picture, dpi=150, format="png")
    about = {"command": shlex.join(sys.argv), "environment": environment(torch.device("cpu"))}
    made.table.write_text(json.dumps(about | found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return made
