"""One table for many runs at many rhos: accuracy over a whole split, cost, and speed side by side."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipelines.base import DataConfig, Loader
from pipelines.device import DeviceTransform
from pss.dist import World
from pss.evaluate import accuracy, rates
from pss.plots import plot_sweep
from pss.runs import Run
from pss.train import autocast

Row = dict[str, Any]


def sweep(
    runs: Sequence[Run],
    *,
    names: Sequence[str],
    rhos: Sequence[float],
    make_loader: Callable[[DataConfig], Loader],
    batch_size: int,
    world: World,
) -> list[Row]:
    """Rows for every run at every rho, in that order.

    Accuracy is over the whole split, on all processes together. The speed is that of the model alone on a batch of
    random images, all runs and rhos interleaved in one go, and measured by every process for itself.
    """
    accuracies = []
    for name, one in zip(names, runs, strict=True):
        data = one.config.data
        loader = make_loader(data)
        try:
            with _progress(name, loader.num_samples, world) as advance:
                accuracies.append(
                    accuracy(
                        one.method.predict,
                        loader,
                        DeviceTransform(data, seed=0, train=False),
                        world,
                        rhos=rhos,
                        autocast=autocast(one.config, world.device),
                        on_batch=advance,
                    )
                )
        finally:
            loader.close()

    calls = []
    for one in runs:
        size = one.config.data.img_size
        images = torch.randn(batch_size, 3, size, size, device=world.device)
        calls += [partial(_predict, one, images, rho, world.device) for rho in rhos]
    speeds = rates(calls, num_images=batch_size, device=world.device)

    rows = []
    for number, (name, one) in enumerate(zip(names, runs, strict=True)):
        for rho, result, speed in zip(
            rhos, accuracies[number], speeds[number * len(rhos) : (number + 1) * len(rhos)], strict=True
        ):
            rows.append(
                {
                    "run": name,
                    "method": one.config.method,
                    "rho": rho,
                    "tokens": one.method.num_tokens(rho),
                    "top1": round(result.top1, 4),
                    "top5": round(result.top5, 4),
                    "loss": round(result.loss, 6),
                    "gflops": one.method.cost(rho) / 1e9,
                    "images_per_second": round(speed.median, 1),
                    "images_per_second_low": round(speed.low, 1),
                    "images_per_second_high": round(speed.high, 1),
                    "num_images": result.num_images,
                    "batch_size": batch_size,
                    "step": one.step,
                    "device": _device_name(world.device),
                    "torch": torch.__version__,
                }
            )
    return rows


def _predict(run: Run, images: torch.Tensor, rho: float, device: torch.device) -> torch.Tensor:
    with autocast(run.config, device):
        return run.method.predict(images, rho)


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write `rho.json` (a list of rows), `rho.csv` and `rho.png` into `folder`, each in one move."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_text(folder / "rho.json", json.dumps(rows, indent=2) + "\n")
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    _write_text(folder / "rho.csv", text.getvalue())
    plot_sweep(rows, folder / "rho.png")


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("run")
    for column in ("ρ", "tokens", "top-1 %", "top-5 %", "GFLOPs", "images/s"):
        table.add_column(column, justify="right")
    last = None
    for row in rows:
        if last not in (None, row["run"]):
            table.add_section()
        spread = f"{row['images_per_second_low']:,.0f}–{row['images_per_second_high']:,.0f}"
        table.add_row(
            row["run"] if row["run"] != last else "",
            f"{row['rho']:g}",
            str(row["tokens"]),
            f"{row['top1']:.2f}",
            f"{row['top5']:.2f}",
            f"{row['gflops']:.3g}",
            f"{row['images_per_second']:,.0f} ({spread})",
        )
        last = row["run"]
    Console().print(table)


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Each folder's own name, or as many of its last parts as it takes to tell the folders apart."""
    resolved = [folder.resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"{folders[0]} is named more than once; name each run once")


def default_output(folders: Sequence[Path]) -> Path:
    """The run's own folder, or the nearest folder that holds all of several runs."""
    return folders[0] if len(folders) == 1 else Path(os.path.commonpath([folder.resolve() for folder in folders]))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def _write_text(path: Path, text: str) -> None:
    staged = path.with_name(f".{path.name}.partial")
    staged.write_text(text, encoding="utf-8")
    staged.replace(path)


class _progress:
    """A bar over the images of a split, on the main process's terminal."""

    def __init__(self, name: str, total: int, world: World) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
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
