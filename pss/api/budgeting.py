"""A run for a given time: planned before it begins, and held against the clock when it is over."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pipelines
from pipelines.probe import images_per_second
from pss.config import Config
from pss.planning.budget import Budget, Chosen, Clock, check_settings, choose, dense_of, named, said
from pss.planning.length import of_length
from pss.planning.plan import Level, Plan
from pss.planning.rehearsal import MakeLoaders, opened, rehearse
from pss.planning.taken import Taken
from pss.runs import records
from pss.runs.lock import BUDGET, CONFIG, SUMMARY
from pss.runtime.files import in_words
from pss.runtime.processes import World

Say = Callable[[str], None]

_SHARE, _LEAST_SECONDS, _MOST_SECONDS = 0.06, 3.0, 30.0  # of the time that there is, what measuring takes, about
_USUAL_SECONDS = 6.0  # where it is not known yet how much time there is
_LOADER_SECONDS = 2.0


def wanted(hours: float | None, of_dense: float | None, config: Config, settings: Sequence[str]) -> Budget | None:
    """The budget that was asked for, if any was.

    Raises:
        ValueError: two were, or it is no time, or settings say how long the run is.
    """
    if hours is None and of_dense is None:
        return None
    budget = Budget(hours, of_dense)
    check_settings(budget, config, settings)
    return budget


def choose_run(
    budget: Budget,
    config: Config,
    settings: Sequence[str],
    dataset: pipelines.DataSet,
    make_loaders: MakeLoaders,
    *,
    folder: Path,
    world: World,
    began: float,
) -> Chosen:
    """The longest run that the budget has time for; every process must call this.

    Args:
        budget: What there is.
        config: As the recipe has it.
        settings: What was set by hand, and stays as it is.
        dataset: What is trained on.
        make_loaders: For a configuration.
        folder: For a checkpoint that is written to see how long that takes.
        world: The processes.
        began: When the clock began to run, by `time.perf_counter`.

    Raises:
        ValueError: not even the shortest run fits.
    """
    seconds = _USUAL_SECONDS
    if budget.hours is not None:
        seconds = min(_MOST_SECONDS, max(_LEAST_SECONDS, _SHARE * 3600 * budget.hours))
    sizes = {
        "num_images": dataset.epoch_samples(config.data, config.train.batch_size),
        "num_classes": len(dataset.classes),
    }
    if sizes["num_images"] < config.train.batch_size:
        raise ValueError(
            f"{sizes['num_images']} images do not fill one batch of {config.train.batch_size}; lower train.batch_size"
        )

    def measure(of: Config, planned: Plan, levels: list[Level]) -> Taken:
        with scratch(folder, world) as own:  # dense training's checkpoint is none of this run's
            return rehearse(
                of,
                planned,
                levels,
                make_loaders=make_loaders,
                classes=dataset.classes,
                folder=own,
                world=world,
                seconds=seconds,
            )

    def now() -> float:
        return world.agreed(time.perf_counter() - began)

    rate = _loader_rate(config, make_loaders, world) if world.device.type == "cuda" else None
    options: dict[str, Any] = {"rehearse": measure, "loader_rate": rate, "processes": world.size, **sizes}
    own, dense = Clock(config, kept=named(settings), **options), Clock(dense_of(config), **options)
    return choose(budget, own, dense, now)


def plan_run(
    budget: Budget,
    config: Config,
    settings: Sequence[str],
    dataset: pipelines.DataSet,
    make_loaders: MakeLoaders,
    *,
    output: Path,
    world: World,
    began: float,
    say: Say,
) -> Config:
    """`choose_run` for the run in `output`, which is told, and noted there. Raises `ValueError`, and `OSError`."""
    with scratch(output, world) as folder:
        chosen = choose_run(budget, config, settings, dataset, make_loaders, folder=folder, world=world, began=began)
    for line in chosen.words():
        say(line)
    if world.is_main:
        records.write(output / BUDGET, noted(budget, chosen))
    return chosen.config


def noted(budget: Budget, chosen: Chosen) -> dict[str, Any]:
    """What was asked for, chosen and predicted, as `budget.json` and `summary.json` have it."""
    return {
        "option": budget.option,
        "value": budget.value,
        "given_seconds": round(chosen.given_seconds, 3),
        "dense_seconds": None if chosen.dense_seconds is None else round(chosen.dense_seconds, 3),
        "epochs": chosen.config.train.epochs,
        "predicted": chosen.predicted.to_dict(),
        "actual_seconds": 0.0,
        "starts": 0,
    }


def as_planned(config: Config, output: Path, dataset: pipelines.DataSet, settings: Sequence[str]) -> Config:
    """The configuration at the length that the run in `output` was planned with."""
    saved = Config.from_json(output / CONFIG)
    steps = dataset.epoch_samples(config.data, config.train.batch_size) // config.train.batch_size
    return of_length(config, saved.train.epochs, max(1, steps), named(settings))


def account(output: Path, seconds: float, say: Say) -> None:
    """Note in the folder of a run that was planned what it has taken since it was started, and, in `summary.json` and
    in words, how that compares. What an earlier start took is added, unless it was killed."""
    if not (output / BUDGET).exists():
        return
    try:
        found = records.read(output / BUDGET, records.Versioned, remedy="remove it")
        found |= {"actual_seconds": round(found["actual_seconds"] + seconds, 3), "starts": found["starts"] + 1}
        records.write(output / BUDGET, found)
        if not (output / SUMMARY).exists():
            return
        summary = records.read(output / SUMMARY, records.Versioned, remedy="train it again")
        told = {name: value for name, value in found.items() if name not in records.STAMP}
        records.write(output / SUMMARY, summary | {"budget": told})
        if summary["finished"]:
            say(said(found))
    except (OSError, ValueError, KeyError, TypeError) as error:  # the run itself is saved
        say(f"{output / BUDGET} could not be brought up to date ({in_words(error)})")


@contextmanager
def scratch(output: Path | None, world: World) -> Iterator[Path]:
    """A folder on the disk of `output`, or anywhere, that is there for as long as it is needed."""
    made = None
    if world.is_main:
        where = None if output is None else str(output)
        made = tempfile.mkdtemp(prefix=".rehearsal-", dir=where)
    try:
        told = world.broadcast(made)
        assert told is not None
        yield Path(told)
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _loader_rate(config: Config, make_loaders: MakeLoaders, world: World) -> float:
    """Images per second that all processes decode, each for itself."""
    with opened(make_loaders, config) as (train_loader, _):
        return world.agreed(world.size * images_per_second(train_loader, _LOADER_SECONDS))
