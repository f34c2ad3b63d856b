"""What `pss-train RECIPE --doctor` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from torch import Tensor

import pipelines
from cli.feeding import print_wrapped, show_feeding
from pipelines.base import Backend, DataError
from pipelines.probe import images_per_second
from pipelines.storage.manifest import find_maps
from pipelines.storage.maps import LabelMaps
from pss.config import Config
from pss.planning.doctor import Diagnosis, diagnose, measure_training
from pss.planning.feeding import Feed, estimated_feeds
from pss.planning.plan import Plan, plan
from pss.planning.simulation import remedies
from pss.runtime import processes as dist

_SECONDS = 4.0
_NAMES: dict[Backend, str] = {"torch": "torch", "dali": "dali", "ffcv": "ffcv (as stored)"}


def examine(config: Config, data: pipelines.DataPath | None, loader: Backend) -> None:
    """Measure, on one process, training and every loader that can read the data, and show what follows.

    Raises:
        ValueError: there is no data, or several processes were started.
        DataError: the loader that was asked for cannot read the data, or none can.
    """
    if data is None:
        raise ValueError("--doctor measures the loader; give --data")
    dataset = pipelines.open_dataset(data)
    planned = plan(
        config, num_images=dataset.epoch_samples(config.data, config.train.batch_size), num_classes=len(dataset.classes)
    )
    with dist.start() as world:
        if world.size > 1:
            raise ValueError("--doctor looks at one process; run it without torchrun")
        rates, failures = measure_loaders(config, data, loader, str(world.device))
        maps = some_maps(config, data)
        levels = measure_training(config, planned, len(dataset.classes), world.device, maps)
    backend = loader
    if backend == "auto":  # FFCV shows other pixels, and is never chosen over the others
        originals = {name: rate for name, rate in rates.items() if name != "ffcv"} or rates
        backend = max(originals, key=lambda name: originals[name])
    found = diagnose(config, planned, levels, rates[backend], world.device.type)
    show(config, planned, found, rates, backend=backend, device=str(world.device))
    for name, reason in failures.items():
        typer.echo(f"{name} was not measured: {reason}")


def some_maps(config: Config, data: pipelines.DataPath) -> Tensor | None:
    """The first label maps of the run, if it learns from any."""
    if config.data.label_maps is None:
        return None
    maps = LabelMaps(find_maps(Path(data), "train", config.data.label_maps))
    return maps.rows(np.arange(min(maps.num_samples, config.train.batch_size)))


def measure_loaders(
    config: Config, data: pipelines.DataPath, wanted: Backend, device: str
) -> tuple[dict[Backend, float], dict[Backend, str]]:
    """Images per second of every loader that can read the training images, and why others cannot.

    Raises:
        DataError: `wanted` cannot, or none can.
    """
    rates: dict[Backend, float] = {}
    failures: dict[Backend, DataError] = {}
    candidates: tuple[Backend, ...] = ("torch", "dali", "ffcv")
    for backend in candidates:
        options: dict[str, Any] = {
            "config": config.data,
            "batch_size": config.train.batch_size // config.train.accumulate,
            "seed": config.train.seed,
            "device": device,
            "num_workers": config.train.num_workers,
        }
        try:
            built = pipelines.build(
                data, "train", train=True, loader=backend, label_maps=config.data.label_maps, **options
            )
            try:
                rates[backend] = images_per_second(built, _SECONDS)
            finally:
                built.close()
        except DataError as error:
            failures[backend] = error
    if (failure := failures.get(wanted)) is not None or not rates:
        raise failure or failures["torch"]
    return rates, {name: str(error) for name, error in failures.items()}


def show(
    config: Config, planned: Plan, found: Diagnosis, rates: dict[Backend, float], *, backend: Backend, device: str
) -> None:
    """Both rates at each level, which bounds it, which loaders would keep up, and what to change."""
    typer.echo(f"{config.recipe}: one process on {device}, {backend} loader alone: {found.loader_rate:,.0f} images/s")
    typer.echo(f"\n{'ρ':>6} {'pixels':>7} {'steps':>8} {'tokens':>8} {'trains img/s':>14} {'of loader':>10}  bound by")
    for level in planned.levels:
        rate = found.train_rates[level]
        typer.echo(
            f"{level.rho:>6.3g} {level.img_size:>7} {level.share:>8.1%} {level.tokens:>8,} {rate:>14,.0f} "
            f"{rate / found.loader_rate:>10.2f}  {found.bound(level)}"
        )
    wanted = planned.average_demand * found.machine.images_per_second
    enough = found.loader_rate >= wanted
    typer.echo(
        f"\non average training takes in {wanted:,.0f} images/s: the loader "
        f"{'is fast enough for that' if enough else 'is too slow for that'};\n"
        f"the run would wait for data {found.simulated.data_wait:.1%} of the time"
    )
    if found.simulated.data_wait <= 0.01:
        typer.echo("nothing to change: the model bounds the run")
    else:
        _show_cures(config, planned, found, enough=enough, backend=backend, device=device)
    feeds = [Feed(_NAMES[name], rate, "measured") for name, rate in rates.items()]
    chosen = feeds[list(rates).index(backend)]
    seconds: Sequence[float] = [planned.batch_size / found.train_rates[level] for level in planned.levels]
    if config.data.decode_once == 1 and not device.startswith("cuda"):
        feeds += estimated_feeds(feeds)
    show_feeding(config, planned, feeds, chosen, lambda _: seconds, device=torch.device(device).type)
    typer.echo(_memory(device))


def _show_cures(
    config: Config, planned: Plan, found: Diagnosis, *, enough: bool, backend: Backend, device: str
) -> None:
    for remedy in remedies(config, planned, found.machine):
        print_wrapped(f"cure: {remedy.what}, after which it waits {remedy.data_wait:.1%}", "  ")
    if not enough:
        if device.startswith("cuda") and backend != "dali":
            typer.echo("  try: --loader dali, which decodes on the GPU")
        if backend != "ffcv":
            typer.echo("  try: pss-convert --format ffcv and --loader ffcv, which decodes prepared images")
        typer.echo("  try: more processor cores, and --set train.num_workers=N")


def _memory(device: str) -> str:
    """What there is for a queue."""
    found = []
    for line in (
        Path("/proc/meminfo").read_text(encoding="utf-8").splitlines() if Path("/proc/meminfo").exists() else ()
    ):
        if line.startswith("MemAvailable:"):
            found.append(f"{int(line.split()[1]) * 1024 / 1e9:,.1f} GB of the host's")
    if device.startswith("cuda"):
        found.append(f"{torch.cuda.mem_get_info(device)[0] / 1e9:,.1f} GB of the GPU's")
    return f"memory that is free for a queue here: {' and '.join(found) or 'not known'}"
