"""`pss.train`: a recipe trained on a data set, as `pss-train` does it."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pipelines
from pipelines.base import Backend, Loader
from pipelines.remote.windows import Windows
from pss import recipes
from pss.api import budgeting
from pss.config import Config, changes_of_run
from pss.inference.plots import plot_training
from pss.planning.budget import Chosen
from pss.runs import loggers, records
from pss.runs.checkpoint import list_checkpoints, load_latest
from pss.runs.lock import CHECKPOINTS, CONFIG, CURVES, SUMMARY, claim
from pss.runs.log import read_rows
from pss.runtime import files, processes
from pss.runtime.files import in_words
from pss.runtime.processes import World
from pss.starting import check_folders, check_machine, check_maps, check_shapes, check_steps
from pss.training.trainer import Trainer

LoaderName = Literal["auto", "dali", "ffcv", "torch"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """A run as it lies in its folder."""

    folder: Path

    @property
    def config(self) -> Config:
        """Its settings."""
        return Config.from_json(self.folder / CONFIG)

    @property
    def summary(self) -> dict[str, Any]:
        """`summary.json`: whether it is finished, its epochs and steps, its seconds, the best and the last row."""
        found: dict[str, Any] = records.read(self.folder / SUMMARY, records.Versioned, remedy="train it again")
        return found

    def rows(self, kind: str = "epoch") -> list[dict[str, Any]]:
        """The rows of `log.jsonl` of one kind: `epoch`, `step` or `start`."""
        return read_rows(self.folder, kind)

    def figure(self) -> bytes:
        """Loss, accuracy and ρ over the epochs, a PNG."""
        return plot_training(self.rows())


def configuration(
    recipe: Config | str | Path | None, settings: Sequence[str] = (), start: str | Path | None = None
) -> Config:
    """The configuration that `pss-train` trains.

    Args:
        recipe: a configuration, or what `pss.recipes.get` finds by its name; None for the settings of `start`.
        settings: changes, each `section.key=value`.
        start: the folder of a run to begin with the weights of.

    Raises:
        ValueError: a recipe or a setting that there is not, or a value that cannot be.
    """
    if recipe is None:
        if start is None:
            raise ValueError("no recipe is named; name one of pss-train --list, or a run to go on from with --from")
        recipe = start
    config = recipe if isinstance(recipe, Config) else recipes.get(str(recipe))
    if start is not None:
        if (Path(start) / CHECKPOINTS).is_dir() and not list_checkpoints(Path(start) / CHECKPOINTS):
            raise ValueError(f"--from {start}: the run has no checkpoint yet; let it train first")
        config = config.with_settings([f"model.weights={start}"])
    return config.with_settings(settings) if settings else config


def train(
    recipe: Config | str | Path | None,
    data: pipelines.DataPath,
    output: str | Path,
    *,
    settings: Sequence[str] = (),
    start: str | Path | None = None,
    loader: LoaderName = "auto",
    cache_dir: str | Path | None = None,
    cache_gb: float | None = None,
    resume: bool = False,
    budget_hours: float | None = None,
    budget_of_dense: float | None = None,
    began: float | None = None,
    quiet: bool = False,
    say: Say | None = None,
) -> Trained:
    """Train a recipe, alone or as one of the processes that torchrun started.

    Args:
        recipe: see `configuration`.
        data: a folder that `pss-convert` made, or its address (s3://…, https://…), or a folder of class folders.
        output: the run's folder.
        settings: changes to the recipe, each `section.key=value`.
        start: the folder of a run to begin with the weights of: a run of its own, with its own optimizer and schedule.
        loader: what decodes the images.
        cache_dir: for data at an address: where this machine keeps what its processes fetch; `pss` in the user's cache
            folder if None.
        cache_gb: how much that may be, in GB (10^9 bytes); as much as there is if None. A training set that is larger
            is read in the windowed order (`data.window`).
        resume: go on with the run in `output`, or begin it where there is none; at the length that it was planned with.
        budget_hours: choose the number of epochs so that the whole takes at most so many hours here.
        budget_of_dense: the same, as a share of the time that dense training of the recipe's epochs would take.
        began: when the clock of such a budget began to run, by `time.perf_counter`; now if None.
        quiet: show no progress.
        say: is given what is worth a line; it goes to stderr by default, and nowhere where it is quiet.

    Raises:
        ValueError: a setting, a folder or data that cannot be.
        OSError: something cannot be read or written.
        Interrupted: Ctrl-C or SIGTERM came, and the run is saved (`pss.training.setup`).
        LostProcess: another process has died (`pss.runtime.processes`).
    """
    began = time.perf_counter() if began is None else began
    config = configuration(recipe, settings, start)
    output = Path(output)
    budget = budgeting.wanted(budget_hours, budget_of_dense, config, settings)
    tell = say if say is not None else (lambda line: None) if quiet else (lambda line: print(line, file=sys.stderr))
    check_shapes(config)
    loggers.check(config.train.loggers)
    if output.is_file():
        raise ValueError(f"--output {output} is a file; name a folder")
    data = pipelines.find_data(data, cache_dir, cache_gb)
    check_folders(Path(data), output)
    dataset = pipelines.open_dataset(data)
    config = _in_windows(config, data, output if resume else None)
    if dataset.manifest is not None:
        check_maps(config, dataset.manifest.label_maps)
    if budget is not None and resume and (output / CONFIG).exists():
        config = budgeting.as_planned(config, output, dataset, settings)
        budget = None
    with (
        processes.start(config.train.timeout_seconds) as world,
        claim(output, world, lambda: _admit(output, config, resume), tell),
    ):
        speak = tell if world.is_main else lambda line: None
        if config.train.batch_size % (world.size * config.train.accumulate):
            raise ValueError(
                f"train.batch_size is {config.train.batch_size}, which {world.size} processes cannot share evenly in "
                f"{config.train.accumulate} parts each (train.accumulate)"
            )
        if loader == "auto":
            loader, reason = _choose_loader(data, output if resume else None, config, world)
            speak(f"--loader auto: {loader} ({reason})")
        make = partial(_make_loaders, dataset=dataset, loader=loader, world=world)
        if budget is not None:
            config = budgeting.plan_run(
                budget, config, settings, dataset, make, output=output, world=world, began=began, say=speak
            )
            check_shapes(config)
        train_loader, val_loader = make(config)
        try:
            backends = {one.backend for one in (train_loader, val_loader) if one is not None}
            check_machine(config, settings, device=world.device.type, backends=backends)
            check_steps(config, train_loader.steps_per_epoch)
            classes = list(dataset.classes)
            trainer = Trainer(
                config, train_loader, val_loader, classes=classes, output=output, world=world, quiet=quiet
            )
            if world.is_main:
                records.write(output / CONFIG, config.to_dict())
            for line in _first_words(trainer, len(classes), data):
                speak(line)
            world.barrier()
            trainer.fit()
            if world.is_main:
                _draw(output, speak)
            held_out = str(data) if val_loader is not None else "a data set with a validation split"
            speak(f"done: {output}; next: pss-eval {output} --data {held_out}")
        except RuntimeError as error:
            if world.size > 1 and processes.is_lost(error):
                raise processes.LostProcess(world.rank, error) from error
            raise
        finally:
            train_loader.close()
            if val_loader is not None:
                val_loader.close()
            if world.is_main:
                budgeting.account(output, time.perf_counter() - began, speak)
    return Trained(output)


def fit_to_budget(
    config: Config,
    data: pipelines.DataPath,
    settings: Sequence[str] = (),
    *,
    loader: LoaderName = "auto",
    budget_hours: float | None = None,
    budget_of_dense: float | None = None,
    began: float | None = None,
) -> Chosen:
    """What `train` would train in such a time; measured here, and nothing is kept. Raises `ValueError` as it does."""
    began = time.perf_counter() if began is None else began
    data, budget = pipelines.find_data(data), budgeting.wanted(budget_hours, budget_of_dense, config, settings)
    assert budget is not None
    dataset, config = pipelines.open_dataset(data), _in_windows(config, data, None)
    with processes.start() as world, budgeting.scratch(None, world) as folder:
        backend: Any = _choose_loader(data, None, config, world)[0] if loader == "auto" else loader
        make = partial(_make_loaders, dataset=dataset, loader=backend, world=world)
        return budgeting.choose_run(budget, config, settings, dataset, make, folder=folder, world=world, began=began)


def _make_loaders(
    config: Config, *, dataset: pipelines.DataSet, loader: Backend, world: World
) -> tuple[Loader, Loader | None]:
    """Of the training images and the validation images, if there are any, on this process."""
    options: dict[str, Any] = {
        "config": config.data,
        "batch_size": config.train.batch_size // world.size,
        "seed": config.train.seed,
        "rank": world.rank,
        "world_size": world.size,
        "device": world.device,
        "num_workers": config.train.num_workers,
    }
    data = dataset.root
    own: dict[str, Any] = {"label_maps": config.data.label_maps, "epochs": config.train.epochs}
    train = pipelines.build(data, "train", train=True, loader=loader, **own, **options)
    try:
        if "val" not in dataset.splits:
            return train, None
        # Accuracy is measured on the original bytes, which FFCV's files do not hold.
        backend = pipelines.choose_backend(data, "val", beside=loader)
        return train, pipelines.build(data, "val", train=False, loader=backend, **options)
    except BaseException:
        train.close()
        raise


def _in_windows(config: Config, data: Path | pipelines.RemoteSet, resumed: Path | None) -> Config:
    """The run, in the windowed order if its training set does not fit the cache, or if the run was begun in that."""
    if not isinstance(data, pipelines.RemoteSet) or config.data.window is not None:
        return config
    if resumed is not None and (resumed / CONFIG).exists():
        theirs = Config.from_json(resumed / CONFIG).data
        window, groups = theirs.window, theirs.groups
    else:
        processes_in_all = int(os.environ.get("WORLD_SIZE", "1"))
        window = data.choose_window(config.data, config.train.batch_size, processes_in_all)
        groups = config.data.groups
    if window is None:
        return config
    return config.with_settings([f"data.window={window}", f"data.groups={groups}"])


def _draw(output: Path, speak: Say) -> None:
    """Draw the run's curves; that it cannot be done is no reason to fail."""
    try:
        files.write(output / CURVES, Trained(output).figure())
    except Exception as error:
        speak(f"{output / CURVES} could not be drawn ({in_words(error)})")


def _first_words(trainer: Trainer, num_classes: int, data: Path | pipelines.RemoteSet) -> list[str]:
    config, loader = trainer.config, trainer.train_loader
    begin = f"continuing at step {trainer.step}" if trainer.step else "starting"
    lines = [
        f"{config.recipe}: {begin}, {config.method} on {trainer.world.device.type}, {loader.num_samples:,} images, "
        f"{num_classes} classes, {trainer.total_steps:,} steps, {loader.backend} loader",
        trainer.method.course(),
    ]
    windows: Windows | None = getattr(loader, "windows", None)
    if windows is not None:
        settings = config.data
        left_out = f", which leaves out {windows.left_out:,} images, others each time" if windows.left_out else ""
        lines.append(
            f"windowed order: {settings.window} tars at a time of each of {settings.groups} groups, "
            f"{windows.steps_per_epoch:,} steps an epoch{left_out}"
        )
    if trainer.val_loader is None:
        lines.append(
            f"{data} has no validation split: no accuracy will be measured, and no checkpoint is noted as the best one"
        )
    if trainer.moved is not None:
        lines.append(trainer.moved)
    if trainer.started_from is not None:
        lines.append(f"weights of {config.model.weights}: {trainer.started_from}")
    return lines


def _admit(output: Path, config: Config, resume: bool) -> None:
    """Raise `ValueError` where the run in `output`, if there is one, is not to be continued, or is another one."""
    saved = output / CONFIG
    if not resume and (saved.exists() or list_checkpoints(output / CHECKPOINTS)):
        raise ValueError(f"{output} already holds a run; add --resume to continue it, or choose another --output")
    if not saved.exists():
        return  # checkpoints that were copied alone have settings of their own, which are compared
    theirs = Config.from_json(saved)
    if changed := changes_of_run(theirs, config):
        same = dataclasses.replace(config, recipe=theirs.recipe)
        remedy = (
            "repeat its --set options, or choose another --output"
            if changes_of_run(theirs, same)
            else f"name the recipe as it was, {theirs.recipe}"
        )
        raise ValueError(
            f"--resume: the run in {output} has other settings (saved, now): {'; '.join(changed)}; {remedy}; --from "
            f"{output} with another --output begins a new run with its weights"
        )


def _choose_loader(data: pipelines.DataPath, resumed: Path | None, config: Config, world: World) -> tuple[Any, str]:
    """What `auto` stands for, the same on every process, and why."""
    from pipelines.probe import probe

    choice = None
    if world.is_main:
        saved = load_latest(resumed / CHECKPOINTS) if resumed is not None else None
        if saved is not None:
            choice = f"{saved[0]['loader']['backend']} the run began with it"
        else:
            workers = config.train.num_workers
            found = probe(data, "train", config=config.data, num_workers=workers, device=str(world.device))
            choice = f"{found.backend} {found.reason}"
    backend, _, reason = (world.broadcast(choice) or "").partition(" ")
    return backend, reason
