"""Trained runs measured beside each other in one process: accuracy, arithmetic, and speed on real images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pipelines
from pipelines.base import Backend, DataConfig
from pss.config import Config
from pss.inference import report, sweep
from pss.inference.accuracy import accuracy, evaluation_inputs
from pss.inference.opening import Run as Opened
from pss.inference.opening import open_run
from pss.planning.plan import plan
from pss.runtime import files, processes
from pss.runtime.precision import autocast
from tools.comparing.turns import Run

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How runs are measured."""

    data: Path
    loader: Backend
    batch_size: int
    ema: bool = False
    device: str | None = None
    """None is a GPU where there is one."""
    rounds: int = 7
    """In which speeds are measured."""

    @contextmanager
    def world(self) -> Iterator[processes.World]:
        """This process, on that device."""
        with processes.start() as world:
            yield world if self.device is None else processes.World(0, 1, torch.device(self.device))

    def validation_split(self, config: DataConfig, device: torch.device) -> Any:
        """What reads it."""
        return pipelines.build(
            self.data, "val", config=config, batch_size=self.batch_size, train=False, loader=self.loader,
            device=str(device),
        )  # fmt: skip


def evaluate(runs: Sequence[Run], options: Options, page: Path) -> dict[str, list[Row]]:
    """Rows for every run at each of its method's operating points, by the run's name; the report goes to `page`.

    Beside what a sweep knows, a row has `seconds_1` and `seconds_batch`: what a call took in each of the interleaved
    rounds, with one image of the validation split and with a batch of them, all runs in turns.
    """
    with options.world() as world:
        opened = [open_run(str(run.folder), world.device, ema=options.ema) for run in runs]
        names = [run.name for run in runs]
        found = sweep.sweep(
            opened,
            names=names,
            points=None,
            make_loader=partial(options.validation_split, device=world.device),
            batch_size=options.batch_size,
            world=world,
            rounds=options.rounds,
            loader_rounds=1,  # no comparison is made of it
        )
        if report.available():
            report.write(found, opened, names, page)
        rows: dict[str, list[Row]] = {name: [] for name in names}
        run_of = dict(zip(names, opened, strict=True))
        for row, (of_batches, of_images) in zip(found.rows, found.seconds, strict=True):
            own = {"seconds_1": of_images, "seconds_batch": of_batches, "images": options.batch_size}
            rows[row["run"]].append(row | own | costs_of(run_of[row["run"]], row))
    return rows


def costs_of(one: Opened, row: Row) -> Row:
    """Parameters, and GFLOPs (multiply-accumulates) of a prediction, the backbone and extra parts apart."""
    method = one.method
    model = sum(part.numel() for part in method.model.parameters())
    whole = sum(part.numel() for part in method.parameters())
    extra = method.cost(row["rho"]).extra / 1e9
    return {
        "parameters_backbone": model,
        "parameters_extra": whole - model,
        "gflops_backbone": row["gflops"] - extra,
        "gflops_extra": extra,
        "gflops_total": row["gflops"],
        # What a method tells of weights that are zero, and computed all the same.
        "parameters_active": row.get("active_params", whole),
        "gflops_theoretical": row.get("theoretical_gflops"),
    }


def training_costs(run: Run, configured: Callable[[Run], Config], num_images: int, num_classes: int) -> Row:
    """GFLOPs (multiply-accumulates) of a training step for one image, averaged over the steps of the run and of the one
    that it starts from; and those of all of it, over those of as many epochs of dense training."""
    parts = [run] if run.needs is None else [run.needs, run]
    epochs = sum(part.epochs for part in parts)
    row: Row = dict.fromkeys(("training_backbone", "training_extra", "training_teacher", "training_step"), 0.0)
    spent = 0.0
    for part in parts:
        planned = plan(configured(part), num_images=num_images, num_classes=num_classes)
        share = part.epochs / epochs
        for level in planned.levels:
            weight = share * level.share / 1e9
            row["training_backbone"] += weight * level.cost.backbone
            row["training_extra"] += weight * level.cost.extra
            row["training_teacher"] += weight * level.cost.teacher
            row["training_step"] += weight * level.cost.training
        spent += planned.mean_cost * part.epochs
    return row | {"arithmetic_epochs": spent}


def accuracies(
    runs: Sequence[Run], options: Options, points: Sequence[float], folder: Path
) -> dict[str, dict[float, float]]:
    """Top-1 accuracy in percent of every run at every one of `points`, by the run's name; nothing is timed.

    What is found is kept in `folder`, one file for each run, and read there the next time.
    """
    found: dict[str, dict[float, float]] = {}
    with options.world() as world:
        for run in runs:
            path = folder / f"{run.name}{'-ema' if options.ema else ''}.json"
            kept = _kept(path)
            if missing := [point for point in points if point not in kept]:
                kept |= _top1(open_run(str(run.folder), world.device, ema=options.ema), missing, options, world)
                files.write(path, json.dumps({f"{point:g}": top1 for point, top1 in kept.items()}, indent=1) + "\n")
                print(f"{run.name}: {', '.join(f'{kept[point]:.2f} % at {point:g}' for point in points)}", flush=True)
            found[run.name] = {point: kept[point] for point in points}
    return found


def _kept(path: Path) -> dict[float, float]:
    try:
        return {float(point): float(top1) for point, top1 in json.loads(path.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError):
        raise ValueError(f"{path} is damaged; remove it, and the run is evaluated once more") from None


def _top1(one: Opened, points: Sequence[float], options: Options, world: processes.World) -> dict[float, float]:
    loader = options.validation_split(one.config.data, world.device)
    try:
        results = accuracy(
            one.method.predict,
            evaluation_inputs(loader, one.config.data, world.device),
            world,
            points=sweep.operating_points(one, points),
            autocast=autocast(one.config, world.device),
        )
    finally:
        loader.close()
    return {point: result.top1 for point, result in zip(points, results, strict=True)}
