"""pss-train: train a recipe on a data set."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli.errors import Failed, run

if TYPE_CHECKING:
    from pss.config import Config
    from pss.runtime.processes import World

app = typer.Typer(add_completion=True, rich_markup_mode=None, pretty_exceptions_enable=False)

_MOST_MACHINES = 10**5  # GPUs of a node, or nodes
_STOPPED = 75  # EX_TEMPFAIL: schedulers take it as "run again"


def _list_recipes(show: bool) -> None:
    if not show:
        return
    from pss.recipes import RECIPES

    width = max(map(len, RECIPES))
    for name, recipe in RECIPES.items():
        summary = (recipe.__doc__ or "").strip().splitlines()[0]
        typer.echo(f"{name:{width}}  {summary}")
    raise typer.Exit


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="What to train; --list shows the recipes.", show_default=False)],
    data: Annotated[
        Path | None,
        typer.Option(help="A folder made by pss-convert, or one with train|val/class/*.jpg.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The run's folder: log, checkpoints, config.", show_default=False)
    ] = None,
    loader: Annotated[Literal["auto", "dali", "ffcv", "torch"], typer.Option(help="What decodes the images.")] = "auto",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change the recipe; repeatable.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue the run in --output where it stopped, or begin it; also --resume auto."
        ),
    ] = False,
    list_recipes: Annotated[
        bool, typer.Option("--list", help="Show the recipes and leave.", is_eager=True, callback=_list_recipes)
    ] = False,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Train nothing; show rho, costs and what the loader must deliver."),
    ] = False,
    doctor: Annotated[
        bool,
        typer.Option("--doctor", help="Train nothing; measure whether the model or the loader bounds each rho."),
    ] = False,
    loader_rate: Annotated[
        float | None, typer.Option(help="Images per second a node decodes: simulates the run on it.")
    ] = None,
    gpu_rate: Annotated[
        float | None,
        typer.Option(help="Images per second a GPU trains at rho = 1; by default an H200's share."),
    ] = None,
    gpu: Annotated[
        Literal["h100", "h200", "a100"] | None, typer.Option(help="Predict the run on such a GPU, with --plan.")
    ] = None,
    measured: Annotated[
        list[Path] | None,
        typer.Option(help="What tools.benchmarks.host_cost or launches wrote, for --gpu; repeatable."),
    ] = None,
    cores: Annotated[
        int | None, typer.Option(help="Processor cores of a node; 16 a GPU by default.", min=1, max=_MOST_MACHINES)
    ] = None,
    gpus: Annotated[int, typer.Option(help="GPUs of a node.", min=1, max=_MOST_MACHINES)] = 1,
    nodes: Annotated[int, typer.Option(help="Nodes.", min=1, max=_MOST_MACHINES)] = 1,
) -> None:
    """Train a recipe, alone or under torchrun (`torchrun --nproc-per-node 8 -m cli.train ...`)."""
    from pss import recipes
    from pss.starting import check_folders, check_machine, check_shapes, check_steps

    config = recipes.get(recipe).with_settings(settings or [])
    check_shapes(config)
    if plan:
        from cli.plan import Wanted, show_plan

        files = tuple(measured or ())
        show_plan(config, data, Wanted(gpu, gpus, nodes, cores, loader, loader_rate, gpu_rate, files))
        return
    if (gpu, gpus, nodes, cores, loader_rate, gpu_rate, measured or None) != (None, 1, 1, None, None, None, None):
        raise ValueError(
            "--gpu, --loader-rate, --gpu-rate, --gpus, --nodes, --cores and --measured are for --plan; add it, or "
            "leave them out"
        )
    if doctor:
        from cli.doctor import examine

        examine(config, data, loader)
        return
    if data is None or output is None:
        missing = [name for name, value in (("--data", data), ("--output", output)) if value is None]
        raise ValueError(f"give {' and '.join(missing)}; only --plan needs neither")
    import pipelines
    from pss.runs import records
    from pss.runs.lock import CONFIG, claim
    from pss.runtime import processes as dist
    from pss.training.trainer import Interrupted, Trainer

    if output.is_file():
        raise ValueError(f"--output {output} is a file; name a folder")
    check_folders(data, output)
    dataset = pipelines.open_dataset(data)
    with (
        dist.start(config.train.timeout_seconds) as world,
        claim(output, world, lambda: _admit(output, config, resume), lambda line: typer.echo(line, err=True)),
    ):
        if config.train.batch_size % (world.size * config.train.accumulate):
            raise ValueError(
                f"train.batch_size is {config.train.batch_size}, which {world.size} processes cannot share evenly in "
                f"{config.train.accumulate} parts each (train.accumulate)"
            )
        options: dict[str, Any] = {
            "config": config.data,
            "batch_size": config.train.batch_size // world.size,
            "seed": config.train.seed,
            "rank": world.rank,
            "world_size": world.size,
            "device": world.device,
            "num_workers": config.train.num_workers,
        }
        if loader == "auto":
            loader, reason = _choose_loader(data, output if resume else None, config, world)
            if world.is_main:
                typer.echo(f"--loader auto: {loader} ({reason})", err=True)
        train_loader = pipelines.build(
            data, "train", train=True, loader=loader, label_maps=config.data.label_maps, **options
        )
        val_loader = None
        try:
            # Accuracy is measured on the original bytes, which FFCV's files do not hold.
            val_backend = pipelines.choose_backend(data, "val", beside=loader)
            val_loader = pipelines.build(data, "val", train=False, loader=val_backend, **options)
            backends = {train_loader.backend, val_loader.backend}
            check_machine(config, settings or [], device=world.device.type, backends=backends)
            check_steps(config, train_loader.steps_per_epoch)
            trainer = Trainer(
                config, train_loader, val_loader, classes=list(dataset.classes), output=output, world=world
            )
            if world.is_main:
                records.write(output / CONFIG, config.to_dict())
                begin = f"continuing at step {trainer.step}" if trainer.step else "starting"
                typer.echo(
                    f"{recipe}: {begin}, {config.method} on {world.device.type}, {train_loader.num_samples:,} images, "
                    f"{len(dataset.classes)} classes, {trainer.total_steps:,} steps, {train_loader.backend} loader",
                    err=True,
                )
                typer.echo(trainer.method.course(), err=True)
                if trainer.moved is not None:
                    typer.echo(trainer.moved, err=True)
                if trainer.started_from is not None:
                    typer.echo(f"weights of {config.model.weights}: {trainer.started_from}", err=True)
            world.barrier()
            trainer.fit()
            if world.is_main:
                typer.echo(f"done: {output}; next: pss-eval {output} --data {data}", err=True)
        except RuntimeError as error:
            if world.size == 1 or not dist.is_lost(error):
                raise
            raise Failed(
                f"process {world.rank} has lost another one ({str(error).splitlines()[0]}), whose own last words say "
                "why; torchrun --max-restarts begins the job again, and --resume goes on from the newest checkpoint"
            ) from error
        except Interrupted:
            if world.is_main:
                typer.echo(f"stopped at step {trainer.step}; continue with --resume", err=True)
            raise typer.Exit(_STOPPED) from None
        finally:
            train_loader.close()
            if val_loader is not None:
                val_loader.close()


def _admit(output: Path, config: Config, resume: bool) -> None:
    """Raise `ValueError` where the run in `output`, if there is one, is not to be continued, or is another one."""
    from pss.config import Config, changes_of_run
    from pss.runs.checkpoint import list_checkpoints
    from pss.runs.lock import CHECKPOINTS, CONFIG

    saved = output / CONFIG
    if not resume and (saved.exists() or list_checkpoints(output / CHECKPOINTS)):
        raise ValueError(f"{output} already holds a run; add --resume to continue it, or choose another --output")
    if not saved.exists():
        return  # checkpoints that were copied alone have settings of their own, which are compared
    if changed := changes_of_run(Config.from_json(saved), config):
        raise ValueError(
            f"--resume: the run in {output} has other settings (saved, now): {'; '.join(changed)}; "
            "repeat its --set options, or choose another --output"
        )


def _choose_loader(data: Path, resumed: Path | None, config: Config, world: World) -> tuple[Any, str]:
    """What `--loader auto` stands for, the same on every process, and why."""
    from pipelines.probe import probe
    from pss.runs.checkpoint import load_latest
    from pss.runs.lock import CHECKPOINTS

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


def main() -> None:
    # `--resume auto` is what schedulers' scripts often say; it is what --resume does.
    words = sys.argv[1:]
    run(app, [word for before, word in pairwise(["", *words]) if (before, word) != ("--resume", "auto")])


if __name__ == "__main__":
    main()
