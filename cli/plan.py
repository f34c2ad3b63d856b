"""What `pss-train RECIPE --plan` prints."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from pss.config import Config
from pss.planning.plan import Plan
from pss.planning.simulation import Machine, queue_batches, remedies, run_on

_WIDTH = 72
_TFLOPS = 290.0  # what an H200 sustains at the rates that `tools.benchmarks.step` aims at


def show(config: Config, planned: Plan, whose: str = "") -> None:
    """The run by levels, its arithmetic, what it asks of the loader, and a drawing of rho; `whose`: the images."""
    epochs = f"{config.train.epochs:,} epochs of {planned.steps_per_epoch:,} steps"
    typer.echo(f"{config.recipe}: {planned.num_images:,} images{whose}, {epochs}, {planned.batch_size:,} images a step")
    typer.echo(planned.course)
    typer.echo(f"\n{'ρ':>6} {'pixels':>7} {'steps':>9} {'tokens':>8} {'GMACs':>9} {'of dense':>9}")
    for level in planned.levels:
        cost = level.cost.training / planned.dense.training
        typer.echo(
            f"{level.rho:>6.3g} {level.img_size:>7} {level.share:>9.1%} {level.tokens:>8,} "
            f"{level.cost.forward / 1e9:>9.4g} {cost:>9.1%}  {level.stage.name}".rstrip()
        )
    dense = planned.epoch_macs / planned.mean_cost
    typer.echo(f"\nan epoch takes {planned.epoch_macs / 1e15:.4g} PMACs, {dense / 1e15:.4g} at ρ = 1 throughout")
    before = ""
    if cooldown := planned.cooldown_epochs:
        before = f" ({planned.saving_before_cooldown:.1%} without the last {cooldown} epochs at ρ = 1)"
    typer.echo(f"arithmetic saved, and at most that much time: {planned.saving:.1%}{before}")
    typer.echo(
        f"the loader must deliver {planned.average_demand:.2f} times what training takes in at ρ = 1, "
        f"and {planned.peak_demand:.2f} times at its fastest"
    )
    typer.echo(f"\nρ over the run, {planned.total_steps:,} steps")
    draw(planned.rhos)
    if planned.steps_per_epoch < planned.total_steps:
        typer.echo(f"\nρ over the first epoch, {planned.steps_per_epoch:,} steps")
        draw(planned.rhos[: planned.steps_per_epoch])


def draw(rhos: Sequence[float]) -> None:
    """rho against the step, as blocks: of each column the smallest and the largest rho, and what lies between."""
    width = min(_WIDTH, len(rhos))
    # A column begins where the one before it ended, so that the line has no gaps.
    columns = [rhos[max(0, i * len(rhos) // width - 1) : (i + 1) * len(rhos) // width] for i in range(width)]
    for tenth in range(10, 0, -1):
        low, high = (tenth - 1) / 10, tenth / 10
        marks = "".join("█" if min(part) <= high + 1e-9 and max(part) > low + 1e-9 else " " for part in columns)
        typer.echo(f"{f'{high:.1f}' if tenth % 2 == 0 else '':>4} ┤{marks}".rstrip())
    typer.echo("     └" + "─" * width)


def show_machine(
    config: Config, planned: Plan, *, gpus: int, nodes: int, loader_rate: float, gpu_rate: float | None
) -> None:
    """The run on a machine: how long it takes, how long it waits for data at each level, and what would cure that."""
    assumed = gpu_rate is None
    if gpu_rate is None:
        gpu_rate = 1e12 * _TFLOPS / (2 * planned.dense.training)
    machine = Machine(
        processes=gpus * nodes,
        images_per_second=gpu_rate * gpus * nodes,
        loader_images_per_second=loader_rate * nodes,
        queue_bytes=config.data.prefetch_bytes,
    )
    simulated = run_on(planned, machine, config.data.img_size)
    how = f"assumed, {_TFLOPS:.0f} TFLOP/s; --gpu-rate says what yours does" if assumed else "as given"
    typer.echo(
        f"\non {nodes} x {gpus} GPUs: {gpu_rate:,.0f} images/s each at ρ = 1 ({how}), "
        f"{loader_rate:,.0f} images/s decoded by a node, "
        f"{queue_batches(planned, machine, config.data.img_size):,} batches ready"
    )
    busy = sum(planned.step_seconds(machine.images_per_second))
    dense = planned.total_steps * planned.batch_size / min(machine.images_per_second, machine.loader_images_per_second)
    typer.echo(
        f"{hours(simulated.seconds)} in all, {hours(busy)} if data were always there; "
        f"dense training {hours(dense)}: {1 - simulated.seconds / dense:.1%} saved"
    )
    if simulated.data_wait <= 0.01:
        typer.echo(f"it waits for data {simulated.data_wait:.1%} of the time: the loader keeps up")
        return
    by_level = [0.0 for _ in planned.levels]
    for number, waited in zip(planned.level_of_step, simulated.waited, strict=True):
        by_level[number] += waited
    several = len({level.img_size for level in planned.levels}) > 1
    names = [f"ρ {level.rho:g}" + f" at {level.img_size} px" * several for level in planned.levels]
    shares = ", ".join(
        f"{name}: {waited / simulated.seconds:.1%}" for name, waited in zip(names, by_level, strict=True)
    )
    typer.echo(f"it waits for data {simulated.data_wait:.1%} of the time ({shares})")
    for remedy in remedies(config, planned, machine):
        typer.echo(f"  cure: {remedy.what}, after which it waits {remedy.data_wait:.1%}")


def hours(seconds: float) -> str:
    """As a person says it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
