"""What `pss-train RECIPE --doctor` prints."""

from __future__ import annotations

import typer

from pss.config import Config
from pss.planning.doctor import Diagnosis
from pss.planning.plan import Plan
from pss.planning.simulation import remedies


def show(config: Config, planned: Plan, found: Diagnosis, *, backend: str, device: str) -> None:
    """Both rates at each level, which bounds it, and what to change."""
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
        f"{'is fast enough for that' if enough else 'is too slow for that'}; "
        f"the run would wait for data {found.simulated.data_wait:.1%} of the time"
    )
    if found.simulated.data_wait <= 0.01:
        typer.echo("nothing to change: the model bounds the run")
        return
    for remedy in remedies(config, planned, found.machine):
        typer.echo(f"  cure: {remedy.what}, after which it waits {remedy.data_wait:.1%}")
    if not enough:
        if device.startswith("cuda") and backend != "dali":
            typer.echo("  try: --loader dali, which decodes on the GPU")
        if backend != "ffcv":
            typer.echo("  try: pss-convert --format ffcv and --loader ffcv, which decodes prepared images")
        typer.echo("  try: more processor cores, and --set train.num_workers=N")
