"""One table for many runs at many rhos: accuracy over a whole split, cost, and speed side by side."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from pipelines.base import Batch, DataConfig, Loader
from pipelines.loaders.prefetch import Inputs
from pss.inference.accuracy import Accuracy, Shown, accuracy, evaluation_inputs
from pss.inference.exhibit import EXHIBITED, Curator, Exhibit
from pss.inference.opening import Run
from pss.inference.plots import plot_sweep
from pss.inference.text import cell, printable
from pss.inference.timing import Spread, call_seconds, enough_memory, loader_rates, peak_memory
from pss.methods import Point, mean_tokens
from pss.models.files import found_at
from pss.models.settings import KEY
from pss.runtime import files
from pss.runtime.precision import autocast
from pss.runtime.processes import World

Row = dict[str, Any]
MakeLoader = Callable[[DataConfig], Loader]

_MIB = 2**20


@dataclass(frozen=True)
class Sweep:
    """What a sweep found."""

    rows: list[Row]
    """For every run at every rho, in that order."""
    exhibits: list[Exhibit]
    """For every run, what it keeps of the images."""
    seconds: list[tuple[list[float], list[float]]] = field(default_factory=list)
    """For every row, what a batch and what a single image took in each of the rounds."""


def sweep(
    runs: Sequence[Run],
    *,
    names: Sequence[str],
    points: Sequence[float] | None,
    make_loader: MakeLoader,
    batch_size: int,
    world: World,
    rounds: int = 7,
    loader_rounds: int = 3,
) -> Sweep:
    """Measure every run at every operating point: at `points`, or at those of its method; a method without a knob as it
    was trained.

    Accuracy is over the whole split, on all processes together. What is timed is timed with all points, and where no
    loader is involved all runs, interleaved in one go, by every process for itself:

    * `images_per_second`: the model alone, on the first images of the split, as its cost may depend on what they show;
    * `images_per_second_with_loader`: from the files of the split to logits;
    * `latency_ms`: the model alone, on one image, until the result is there.

    `peak_memory_mib` is the weights and what predicting one batch takes besides (`timing.peak_memory`).

    Raises:
        ValueError: an operating point that a model cannot be run at, or more memory than there is; before the split is
            evaluated.
    """
    found: list[tuple[list[Accuracy], list[Spread], Exhibit]] = []
    points_of = [operating_points(one, points) for one in runs]

    told = f"batches of {batch_size} images (--batch-size)"
    images: dict[DataConfig, Tensor] = {}
    with enough_memory(told):
        for one in runs:
            if (data := one.config.data) not in images:
                images[data] = _first_images(make_loader(data), data, batch_size, world.device)

    def calls(num_images: int) -> list[Callable[[], Tensor]]:
        return [
            partial(predict, one, images[one.config.data][:num_images], point)
            for one, own in zip(runs, points_of, strict=True)
            for point in own
        ]

    with (
        enough_memory(told),
        torch.inference_mode(),
        stage("trying a batch at every point", world),
    ):
        batches = calls(batch_size)
        for call in batches:  # before the split is evaluated, which may take hours
            call()
    for name, one, own in zip(names, runs, points_of, strict=True):
        loader = make_loader(one.config.data)
        try:
            found.append(_evaluate(name, one, own, loader, world, loader_rounds))
        finally:
            loader.close()

    with stage("timing batches", world):
        of_batches = call_seconds(batches, world.device, rounds=rounds)
    with stage("timing single images", world):
        of_images = call_seconds(calls(1), world.device, rounds=rounds, one_by_one=True)
    with stage("measuring memory", world):
        memory = [peak_memory(call, world.device) for call in batches]

    rows: list[Row] = []
    for name, one, own, (accuracies, with_loader, _) in zip(names, runs, points_of, found, strict=True):
        weights = sum(value.nbytes for name, value in one.method.state_dict().items() if not name.endswith(KEY))
        for place, point in enumerate(own):
            result, timed = accuracies[place], len(rows)
            extra, speed = memory[timed], Spread.of([batch_size / seconds for seconds in of_batches[timed]])
            wait = Spread.of([1e3 * seconds for seconds in of_images[timed]])
            rows.append(
                {
                    "run": name,
                    "method": one.config.method,
                    "sort": one.method.model.sort,
                    "rho": point,
                    "knob": one.method.knob,
                    "tokens": mean_tokens(one.method.tokens(point)),
                    "top1": round(result.top1, 4),
                    "top5": round(result.top5, 4),
                    "loss": round(result.loss, 6),
                    **_gflops(one, point, result),
                    **speed.named("images_per_second", 1),
                    **with_loader[place].named("images_per_second_with_loader", 1),
                    **wait.named("latency_ms", 4),
                    "peak_memory_mib": None if extra is None else round((weights + extra) / _MIB, 1),
                    "num_images": result.num_images,
                    "batch_size": batch_size,
                    "step": one.step,
                    "processes": world.size,
                    "device": world.device_name,
                    "torch": torch.__version__,
                    **one.method.facts(),
                }
            )
    return Sweep(rows, [exhibit for *_, exhibit in found], list(zip(of_batches, of_images, strict=True)))


def _first_images(loader: Loader, config: DataConfig, count: int, device: torch.device) -> Tensor:
    """As many images of a split as a model takes, (count, 3, S, S); over and over where it has fewer."""
    try:
        inputs = evaluation_inputs(loader, config, device)
        inputs.set_epoch(0)
        first = next(iter(inputs)).images
    finally:
        loader.close()
    return first.repeat(-(-count // len(first)), 1, 1, 1)[:count]


def operating_points(run: Run, wanted: Sequence[float] | None) -> tuple[Point, ...]:
    """Where a run is to be measured: at the points that are `wanted`, or at those of its method.

    A method without a knob is measured once, as it was trained.

    Raises:
        ValueError: its model cannot be run at one of them.
    """
    own = run.method.points()
    points = own if wanted is None or own == (None,) else tuple(wanted)
    for point in points:
        run.method.check_point(point)
    return points


def predict(run: Run, images: Tensor, point: Point) -> Tensor:
    """Logits (B, classes) in the run's own precision."""
    with autocast(run.config, images.device):
        return run.method.predict(images, point)


def observed(
    one: Run,
    points: Sequence[Point],
    inputs: Inputs[Shown],
    world: World,
    *,
    size: int = EXHIBITED,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[list[Accuracy], Exhibit]:
    """Accuracy of a run at each of `points`, and what it keeps of `size` images; `advance` is told what is done."""
    curator = Curator(
        one.method,
        points=points,
        num_samples=inputs.num_samples,
        world=world,
        autocast=lambda: autocast(one.config, world.device),
        size=size,
    )

    def observe(batch: Batch, images: Tensor, logits: list[Tensor]) -> None:
        curator(batch, images, logits)
        advance(len(images))

    accuracies = accuracy(
        one.method.predict_with_cost if one.method.costs_vary else one.method.predict,
        inputs,
        world,
        points=points,
        autocast=autocast(one.config, world.device),
        observe=observe,
        with_cost=one.method.costs_vary,
    )
    return accuracies, curator.exhibit()


def _evaluate(
    name: str, one: Run, points: Sequence[Point], loader: Loader, world: World, rounds: int = 3
) -> tuple[list[Accuracy], list[Spread], Exhibit]:
    """Accuracy, speed with the loader, and the exhibit of one run at every operating point."""
    inputs = evaluation_inputs(loader, one.config.data, world.device)
    with progress(name, loader.num_samples, world) as advance:
        accuracies, exhibit = observed(one, points, inputs, world, advance=advance)
    calls = [partial(predict, one, point=point) for point in points]
    with stage(f"timing {name} with its loader", world):
        return accuracies, loader_rates(calls, inputs, device=world.device, rounds=rounds), exhibit


def _gflops(one: Run, point: Point, result: Accuracy) -> Row:
    """Of one image: what all images cost, or the mean of what each did, with the 5th and the 95th percentile."""
    cost, seen = one.method.cost(point), result.macs
    return {
        "gflops": cost.forward / 1e9 if seen is None else seen.mean / 1e9,
        "gflops_low": None if seen is None else seen.low / 1e9,
        "gflops_high": None if seen is None else seen.high / 1e9,
        "gflops_extra": cost.extra / 1e9,
    }


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write `rho.json` (a list of rows), `rho.csv` and `rho.png` into `folder`, each in one move.

    Raises:
        OSError: one cannot be written, which the error names; what is there is whole.
    """
    for name, content in FILES.items():
        files.write(folder / name, content(rows))


def finite(value: Any) -> Any:
    """What JSON can hold of a result: numbers that are not finite, which it does not know, are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return value


def _json(rows: Sequence[Row]) -> str:
    return json.dumps(finite(rows), indent=2, allow_nan=False) + "\n"


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    fields = dict.fromkeys(name for row in rows for name in row)
    table = csv.DictWriter(text, fieldnames=list(fields), lineterminator="\n")
    table.writeheader()
    table.writerows({name: cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


FILES: dict[str, Callable[[Sequence[Row]], str | bytes]] = {
    "rho.json": _json,
    "rho.csv": _csv,
    "rho.png": plot_sweep,
}
"""What is written of a sweep, by name."""


def distinct_names(sources: Sequence[str | Path]) -> list[str]:
    """Each source's own name, or as many of its last parts as it takes to tell the sources apart, all printable."""
    paths = [Path(source).resolve() if found_at(source) else Path(str(source)) for source in sources]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = [printable("/".join(path.parts[-depth:])) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"{sources[0]} is named more than once; name each run once")


def default_output(runs: Sequence[Run]) -> Path:
    """The run's own folder, or the nearest folder that holds all of several; the current one if none has a folder."""
    folders = [one.folder.resolve() for one in runs if one.folder is not None]
    return Path(os.path.commonpath(folders)) if folders else Path()


@contextmanager
def stage(told: str, world: World) -> Iterator[None]:
    """Within, the main process's terminal says what is done. Nothing moves there: it would be timed along."""
    console = Console(stderr=True, markup=False, emoji=False)
    still = Progress(
        TextColumn("{task.description} …", markup=False),
        console=console,
        transient=True,
        auto_refresh=False,
        disable=not (world.is_main and console.is_terminal),
    )
    still.add_task(told)
    with still:
        yield


class progress:
    """A bar over the images of a split, on the main process's terminal."""

    def __init__(self, name: str, total: int, world: World) -> None:
        told = TextColumn("{task.description}", markup=False)
        columns = (told, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True, markup=False, emoji=False)
        self._bar = Progress(
            *columns, console=console, transient=True, disable=not (world.is_main and console.is_terminal)
        )
        self._task = self._bar.add_task(f"evaluating {name}", total=total)
        self._factor = world.size

    def __enter__(self) -> Callable[[int], None]:
        self._bar.start()
        return lambda count: self._bar.advance(self._task, count * self._factor)

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()
