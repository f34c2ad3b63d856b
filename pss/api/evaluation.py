"""`pss.evaluate`: accuracy and cost of trained models at each ρ, as `pss-eval` finds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pipelines
from pipelines.base import DataError
from pipelines.storage.manifest import canonical_split
from pss.api.cascading import Found, Target, cascade_of
from pss.api.training import LoaderName
from pss.inference import report, sweep, table
from pss.inference.exhibit import Exhibit
from pss.inference.opening import Run, open_run
from pss.inference.plots import plot_sweep
from pss.inference.text import printable
from pss.runtime import files, processes
from pss.runtime.processes import World

REPORT = "report.html"


@dataclass(frozen=True)
class Evaluated:
    """What was found."""

    runs: list[Run]
    """The models, opened."""
    names: list[str]
    """What tables call them."""
    rows: list[dict[str, Any]]
    """For every model at every operating point, in that order: accuracy, cost, rates with their spread."""
    exhibits: list[Exhibit]
    """For every model, what it keeps of some images."""
    cascade: Found | None = None
    """What `cascade` asked for."""

    def table(self) -> str:
        """The rows for people."""
        return table.table_of(self.rows)

    def figure(self) -> bytes:
        """Accuracy against rate and against cost, a PNG."""
        return plot_sweep(self.rows)

    def write(self, folder: str | Path) -> list[Path]:
        """Write `rho.json`, `rho.csv`, `rho.png`, where its packages are installed `report.html`, and of a cascade
        `cascade.json` and `cascade.png`.

        Raises:
            OSError: one cannot be written, which the error names; what is there is whole.
        """
        written = []
        for name, content in self.contents().items():
            files.write(Path(folder) / name, content())
            written.append(Path(folder) / name)
        return written

    def contents(self) -> dict[str, Any]:
        """What is written, by name: functions that return it."""
        made: dict[str, Any] = {name: lambda make=make: make(self.rows) for name, make in sweep.FILES.items()}
        if report.available():
            found = sweep.Sweep(self.rows, self.exhibits)
            made[REPORT] = lambda: report.page(found, self.runs, self.names)
        return made if self.cascade is None else made | self.cascade.contents()


def evaluate(
    runs: str | Path | Sequence[str | Path],
    data: pipelines.DataPath,
    *,
    rho: Sequence[float] | None = None,
    split: str = "val",
    sort: Literal["magnitude", "random"] | None = None,
    loader: LoaderName = "auto",
    batch_size: int = 64,
    ema: bool = False,
    best: bool = False,
    cascade: Sequence[float] | None = None,
    target: Target | None = None,
    fit_split: str | None = None,
    cache_dir: str | Path | None = None,
    cache_gb: float | None = None,
) -> Evaluated:
    """Evaluate models on a split, alone or as one of the processes that torchrun started.

    Args:
        runs: folders of runs, checkpoints, published folders, `timm:NAME` or `NAME=FILE`; one or several.
        data: the data set, as given to `train`, or its address.
        rho: operating points; those of each method if None.
        split: of the data set.
        sort: which patches are kept; as trained if None.
        loader: what decodes the images.
        batch_size: images per batch, also for the rates.
        ema: take the moving average of the weights.
        best: of a run, the checkpoint of the best validation, not the newest.
        cascade: two to four ρ, to look at every image at the smallest and at those that are uncertain again at the
            next; of one model.
        target: what the cascade is fitted to; no loss of top-1 against its largest ρ if None.
        fit_split: what it is fitted on; half of `split`, which it is not measured on, if None.
        cache_dir: for data at an address, see `train`.
        cache_gb: likewise.

    Raises:
        ValueError: what is named cannot be opened, or not be run so, or does not suit the data.
    """
    sources = [runs] if isinstance(runs, str | Path) else list(runs)
    data = pipelines.find_data(data, cache_dir, cache_gb)
    names, dataset = sweep.distinct_names(sources), pipelines.open_dataset(data)
    with processes.start() as world:
        loaded = open_runs(sources, world, ema=ema, best=best, sort=sort)
        check_data(loaded, sources, dataset, split)
        options: dict[str, Any] = {"split": split, "loader": loader, "batch_size": batch_size, "world": world}
        found = measure(loaded, names, data, rho, **options)
        if cascade is None:
            return found
        if len(loaded) > 1 or world.size > 1:
            raise ValueError(f"a cascade is of one model, on one process, and {len(loaded)} are named; name one")
        fitted = cascade_of(
            loaded[0], names[0], data, cascade, target or Target(), fit_split=fit_split, compared=rho, **options
        )
        return dataclasses.replace(found, cascade=fitted)


def open_runs(
    sources: Sequence[str | Path],
    world: World,
    *,
    ema: bool = False,
    best: bool = False,
    sort: Literal["magnitude", "random"] | None = None,
) -> list[Run]:
    """The models that `sources` name, on the device of `world`. Raises `ValueError` for one that cannot be had."""
    opened = []
    for source in sources:
        with sweep.stage(f"opening {printable(str(source))}", world):
            opened.append(open_run(str(source), world.device, ema=ema, best=best, sort=sort))
    return opened


def check_data(runs: Sequence[Run], sources: Sequence[str | Path], dataset: pipelines.DataSet, split: str) -> None:
    """Raise `DataError` where the data set has no such split, or a model tells other classes apart than it has."""
    if canonical_split(split) not in dataset.splits:
        (other,) = dataset.splits
        raise DataError(
            f"{dataset.root} has no {split} split; name another data set with --data, or add --split {other}"
        )
    for run, source in zip(runs, sources, strict=True):
        if run.num_classes != len(dataset.classes):
            raise DataError(
                f"{source} was trained on {run.num_classes} classes and {dataset.root} has {len(dataset.classes)}; "
                "evaluate it on the data set it was trained on"
            )
        if run.classes is not None and run.classes != list(dataset.classes):
            raise DataError(
                f"{source} and {dataset.root} name their classes differently; evaluate on the data it was trained on"
            )


def measure(
    runs: Sequence[Run],
    names: Sequence[str],
    data: pipelines.DataPath,
    points: Sequence[float] | None,
    *,
    split: str,
    loader: LoaderName,
    batch_size: int,
    world: World,
) -> Evaluated:
    """`pss.inference.sweep.sweep` of opened models on a split. Raises `ValueError` as it does."""
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "train": False,
        "loader": loader,
        "rank": world.rank,
        "world_size": world.size,
        "device": world.device,
    }
    found = sweep.sweep(
        runs,
        names=names,
        points=points,
        make_loader=lambda config: pipelines.build(data, split, config=config, **options),
        batch_size=batch_size,
        world=world,
    )
    return Evaluated(list(runs), list(names), found.rows, found.exhibits)
