"""What `pss-train RECIPE --plan` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import typer

import pipelines
from cli.feeding import hours, print_wrapped, show_feeding
from pipelines.base import Backend
from pss.config import Config
from pss.planning.feeding import Feed, assumed_feeds
from pss.planning.gpu import CARDS, Card, Host, Parts, Work, assumptions, predict, read_host, works
from pss.planning.plan import IMAGENET_CLASSES, IMAGENET_IMAGES, Plan, learning_rates, plan
from pss.planning.simulation import Machine, Simulated, prepared_batches, queue_batches, remedies, run_on
from pss.runtime.files import obstacle, write
from pss.starting import check_steps

_WIDTH = 72
_EIGHTHS = "▁▂▃▄▅▆▇█"
_TFLOPS = 290.0  # what an H200 sustains at the rates that `tools.benchmarks.step` aims at
_CORES = 16  # of a GPU's node, for each GPU


@dataclass(frozen=True)
class Wanted:
    """The machine that a plan is for, as the command line describes it."""

    gpu: str | None = None
    """One of `pss.planning.gpu.CARDS`."""
    gpus: int = 1
    nodes: int = 1
    cores: int | None = None
    """Of a node."""
    loader: Backend = "auto"
    loader_rate: float | None = None
    """Images per second that a node decodes."""
    gpu_rate: float | None = None
    """Images per second that a GPU trains at rho = 1."""
    measured: tuple[Path, ...] = ()
    """Files with figures of the host."""

    def check(self) -> None:
        """Raise `ValueError` for what does not go together."""
        for name, rate in (("--loader-rate", self.loader_rate), ("--gpu-rate", self.gpu_rate)):
            if rate is not None and not 1e-3 <= rate <= 1e12:
                raise ValueError(f"{name} is {rate}; give images per second, from 0.001 to 1e12")
        if self.gpu is not None and self.gpu_rate is not None:
            raise ValueError("--gpu predicts what a GPU trains and --gpu-rate says it; give one of them")
        if self.gpu is None and self.measured:
            raise ValueError("--measured holds figures for a prediction; add --gpu, or leave it out")
        if self.gpu is None and self.loader_rate is None and self != Wanted(loader=self.loader):
            raise ValueError(
                "--gpu-rate, --gpus, --nodes and --cores describe where to simulate the run; add --loader-rate, or "
                "--gpu"
            )

    @property
    def processes(self) -> int:
        return self.gpus * self.nodes

    @property
    def node_cores(self) -> int:
        return self.cores or _CORES * self.gpus

    def feeds(self, gpu_decodes: float, crops: int) -> tuple[list[Feed], Feed]:
        """The loaders to compare, and the one that is chosen."""
        feeds = assumed_feeds(self.node_cores, self.gpus, self.nodes, gpu_decodes, crops)
        wanted = "dali" if self.loader == "auto" else self.loader
        if self.loader_rate is None:
            return feeds, next(feed for feed in feeds if feed.backend == wanted)
        given = Feed(f"{wanted} (--loader-rate)", self.loader_rate * self.nodes, "given")
        return [given, *feeds], given


def show_plan(config: Config, data: pipelines.DataPath | None, wanted: Wanted, picture: Path | None = None) -> None:
    """All of `--plan`, on ImageNet-1k's number of images where there is no data; `picture` is where it is drawn.

    Raises:
        ValueError: options that do not go together, or a run that cannot be.
        OSError: the picture cannot be written.
    """
    wanted.check()
    if picture is not None and picture.suffix.lower() != ".png":
        raise ValueError(f"--picture {picture} is drawn as a PNG; name a file that ends in .png")
    if picture is not None and (reason := obstacle(picture)) is not None:
        raise ValueError(f"--picture {picture} cannot be written: {reason}; name another file")
    host = read_host(wanted.measured)
    num_images, num_classes = IMAGENET_IMAGES, IMAGENET_CLASSES
    if data is not None:
        dataset = pipelines.open_dataset(data)
        num_images, num_classes = dataset.epoch_samples(config.data, config.train.batch_size), len(dataset.classes)
    if steps_per_epoch := num_images // config.train.batch_size:
        check_steps(config, steps_per_epoch)
    planned = plan(config, num_images=num_images, num_classes=num_classes)
    show(config, planned, "" if data else " (ImageNet-1k's; --data counts yours)")
    if wanted.gpu is not None:
        show_gpu(config, planned, num_classes, wanted, host)
    elif wanted.loader_rate is not None:
        show_machine(config, planned, wanted)
    else:
        typer.echo(
            "\n--gpu h100 predicts the run on one, and which loaders keep up with it;\n--loader-rate says how one "
            "keeps up (see tools.benchmarks.loader), on --gpus and --nodes"
        )
    if picture is not None:
        write(picture, draw_plan(config, planned))
        typer.echo(f"wrote {picture}", err=True)


def draw_plan(config: Config, planned: Plan) -> bytes:
    """ρ and the learning rate of a run, a PNG."""
    from pss.inference.plots import plot_plan

    rates = [(rate.step, rate.low, rate.high) for rate in learning_rates(config, planned)]
    title = f"{config.recipe}: {config.train.epochs:,} epochs of {planned.steps_per_epoch:,} steps"
    title += f", {planned.saving:.0%} of the arithmetic saved" if planned.saving >= 0.005 else ""
    return plot_plan(planned.rhos, rates, steps_per_epoch=planned.steps_per_epoch, title=title)


def fitting(
    config: Config,
    data: pipelines.DataPath | None,
    wanted: Wanted,
    settings: Sequence[str],
    budget_hours: float | None,
    budget_of_dense: float | None,
    began: float | None,
) -> Config:
    """The run that such a time is enough for on this machine, and what to say of it. Raises `ValueError`."""
    from pss.api.training import fit_to_budget
    from pss.overrides import changes
    from pss.planning.budget import Budget

    option = Budget(budget_hours, budget_of_dense).option
    if data is None:
        raise ValueError(f"{option} measures training on this machine; give --data")
    if wanted.gpu is not None or wanted.loader_rate is not None:
        raise ValueError(f"{option} is for this machine, which is measured; leave out --gpu and --loader-rate")
    chosen = fit_to_budget(
        config,
        data,
        settings,
        loader=wanted.loader,
        budget_hours=budget_hours,
        budget_of_dense=budget_of_dense,
        began=began,
    )
    for line in (*chosen.words(), f"settings: {' '.join(changes(config.to_dict(), chosen.config.to_dict()))}"):
        print_wrapped(line)
    typer.echo()
    return chosen.config


def show(config: Config, planned: Plan, whose: str = "") -> None:
    """The run by levels, its arithmetic, what it asks of the loader, and a drawing of rho; `whose`: the images."""
    epochs = f"{config.train.epochs:,} epochs of {planned.steps_per_epoch:,} steps"
    print_wrapped(
        f"{config.recipe}: {planned.num_images:,} images{whose}, {epochs}, {planned.batch_size:,} images a step"
    )
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
    show_rates(config, planned)


def show_rates(config: Config, planned: Plan) -> None:
    """The learning rate over the run, in a line of blocks below its first, largest and last value."""
    rates = learning_rates(config, planned)
    top, first, last = max(rates, key=lambda rate: rate.high), rates[0], rates[-1]
    typer.echo(
        f"\nlearning rate over the run: {first.high:.3g} at first, {top.high:.3g} at most (epoch "
        f"{top.step / planned.steps_per_epoch:.3g}), {last.high:.3g} at the end"
    )
    width = min(_WIDTH, planned.total_steps)
    marks = ""
    for column in range(width):
        middle = (column + 0.5) * planned.total_steps / width
        nearest = min(rates, key=lambda rate: abs(rate.step - middle))
        marks += _EIGHTHS[round(nearest.high / top.high * (len(_EIGHTHS) - 1))]
    typer.echo(f"      {marks}")


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


def show_machine(config: Config, planned: Plan, wanted: Wanted) -> None:
    """The run on a machine: how long it takes, how long it waits for data at each level, and what would cure that."""
    gpus, nodes, loader_rate, gpu_rate = wanted.gpus, wanted.nodes, wanted.loader_rate, wanted.gpu_rate
    assert loader_rate is not None
    assumed = gpu_rate is None
    if gpu_rate is None:
        gpu_rate = 1e12 * _TFLOPS / (2 * planned.dense.training)
    machine = Machine(
        processes=gpus * nodes,
        images_per_second=gpu_rate * gpus * nodes,
        loader_images_per_second=loader_rate * nodes,
        queue_bytes=config.data.prefetch_bytes("cuda"),
        prepared_batches=prepared_batches("cuda"),
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
    else:
        _show_waiting(config, planned, machine, simulated)
    feeds, chosen = wanted.feeds(0, config.data.decode_once)
    dense_step = planned.batch_size / machine.images_per_second
    seconds = [dense_step * level.cost.training / planned.dense.training for level in planned.levels]
    show_feeding(config, planned, feeds, chosen, lambda _: seconds, wanted.processes)
    typer.echo(f"decoding on {wanted.node_cores} cores a node, by rates per core of 16 that work together")


def _show_waiting(config: Config, planned: Plan, machine: Machine, simulated: Simulated) -> None:
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
        print_wrapped(f"cure: {remedy.what}, after which it waits {remedy.data_wait:.1%}", "  ")


def show_gpu(config: Config, planned: Plan, num_classes: int, wanted: Wanted, host: Host) -> None:
    """What bounds each level on a card that is not at hand, how long the run takes, and which loaders keep up."""
    assert wanted.gpu is not None
    card = CARDS[wanted.gpu]
    *levels, dense = works(config, planned, num_classes, host)
    feeds, chosen = wanted.feeds(card.decodes, config.data.decode_once)

    def parts(work: Work, feed: Feed) -> Parts:
        return _parts(work, card, host, feed, planned.batch_size, wanted.processes)

    where = f"{wanted.nodes} x {wanted.gpus} " if wanted.processes > 1 else "one "
    batch = f"{planned.batch_size / wanted.processes:,.0f} images a step" + " on each" * (wanted.processes > 1)
    typer.echo(f"\nA PREDICTION for {where}{wanted.gpu.upper()}, {batch}, {chosen.name}; nothing of it is measured")
    typer.echo(" " * 36 + "milliseconds of a step")
    names = ("compute", "memory", "launches", "host", "loader")
    typer.echo(
        f"{'ρ':>6} {'pixels':>7} {'tokens':>8} "
        + " ".join(f"{name:>8}" for name in names)
        + "  bound by  if fed      img/s"
    )
    for level, work in zip(planned.levels, levels, strict=True):
        found = parts(work, chosen)
        milliseconds = " ".join(f"{1e3 * getattr(found, name):>8.1f}" for name in names)
        rate = planned.batch_size / found.fed
        typer.echo(
            f"{level.rho:>6.3g} {level.img_size:>7} {level.tokens:>8,} {milliseconds}  {found.bound:<9} "
            f"{replace(found, loader=0).bound:<9} {rate:>7,.0f}"
        )

    def seconds(feed: Feed) -> list[float]:
        return [parts(work, feed).step for work in levels]

    of_level = seconds(chosen)
    run = sum(of_level[number] for number in planned.level_of_step)
    alone = planned.total_steps * parts(dense, chosen).step
    epochs = planned.total_steps / planned.steps_per_epoch
    typer.echo(
        f"with data always there: {run / epochs / 60:.1f} min an epoch, {hours(run)} in all; dense "
        f"{alone / epochs / 60:.1f} min and {hours(alone)}: {1 - run / alone:.1%} saved"
    )
    show_feeding(config, planned, feeds, chosen, seconds, wanted.processes)
    typer.echo("\nassumed, and not measured:")
    for line in (
        *assumptions(card, host),
        f"decoding on {wanted.node_cores} cores a node, by rates per core of 16 that work together, at 224 px; "
        f"{card.decodes:,.0f} images/s on a GPU, published for an A100",
    ):
        print_wrapped(line, "- ")


def _parts(work: Work, card: Card, host: Host, feed: Feed, batch_size: int, processes: int) -> Parts:
    return predict(
        work,
        card,
        host,
        batch=max(1, batch_size // processes),
        backend=feed.backend,
        decodes=feed.images_per_second / processes,
    )
