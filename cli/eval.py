"""pss-eval: accuracy and speed of trained runs at each rho."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli.errors import run

if TYPE_CHECKING:
    from pss.runs import Run

app = typer.Typer(add_completion=True, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def evaluate(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Run folders of pss-train, checkpoints in them, folders or hf-hub:owner/name that --push wrote, "
            "timm:NAME, or NAME=FILE for a weights file of the timm model NAME. Several are compared.",
            metavar="RUN...",
        ),
    ],
    data: Annotated[Path, typer.Option(help="The data set, as given to pss-train.", show_default=False)],
    rho: Annotated[
        str, typer.Option(help="Shares of patches to keep: a list 1.0,0.8,... or a range low:high:step.")
    ] = "1.0,0.8,0.6,0.4,0.2",
    sort: Annotated[
        Literal["magnitude", "random"] | None,
        typer.Option(help="Which patches to keep (default: as trained).", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for rho.json, rho.csv and rho.png (default: the run's, or what runs share)."),
    ] = None,
    split: Annotated[str, typer.Option(help="Which split to evaluate on.")] = "val",
    loader: Annotated[Literal["auto", "dali", "ffcv", "torch"], typer.Option(help="What decodes the images.")] = "auto",
    batch_size: Annotated[int, typer.Option(help="Images per batch, also for the speed.", min=1)] = 64,
    ema: Annotated[bool, typer.Option("--ema", help="Evaluate the moving average of the weights.")] = False,
    push: Annotated[
        Path | None,
        typer.Option(help="Also write the model into this folder, ready for the Hugging Face Hub.", show_default=False),
    ] = None,
) -> None:
    """Sweep ρ: accuracy, GFLOPs, speed with the loader and without, latency and memory of each run at each ρ."""
    rhos = parse_rhos(rho)
    if push is not None and len(runs) > 1:
        raise ValueError(f"--push writes one model and {len(runs)} runs are named; name one")

    import pipelines
    from pss import dist, hub, sweep
    from pss.runs import open_run

    dataset = pipelines.open_dataset(data)
    names = sweep.distinct_names(runs)
    with dist.start() as world:
        loaded = [open_run(source, world.device, ema=ema, sort=sort) for source in runs]
        for one, source in zip(loaded, runs, strict=True):
            check_classes(one, source, data, dataset.classes)
        options: dict[str, Any] = {
            "batch_size": batch_size,
            "train": False,
            "loader": loader,
            "rank": world.rank,
            "world_size": world.size,
            "device": world.device,
        }
        found = sweep.sweep(
            loaded,
            names=names,
            rhos=rhos,
            make_loader=lambda config: pipelines.build(data, split, config=config, **options),
            batch_size=batch_size,
            world=world,
        )
        if world.is_main:
            folder = output or sweep.default_output(loaded)
            sweep.write(found.rows, folder)
            sweep.show(found.rows)
            typer.echo(f"wrote {folder / 'rho.json'}, rho.csv and rho.png", err=True)
            if push is not None:
                (one,) = loaded
                card = hub.card(names[0], rows=found.rows, columns=sweep.COLUMNS, architecture=one.config.model.name)
                hub.save(push, one.published(), card)
                typer.echo(f"wrote {push}: config.json, model.safetensors and README.md", err=True)
        world.barrier()


def check_classes(run: Run, source: str, data: Path, classes: Sequence[str]) -> None:
    """Raise `DataError` where a run tells other classes apart than the data set has."""
    from pipelines.base import DataError

    if run.num_classes != len(classes):
        raise DataError(
            f"{source} was trained on {run.num_classes} classes and {data} has {len(classes)}; "
            "evaluate it on the data set it was trained on"
        )
    if run.classes is not None and run.classes != list(classes):
        raise DataError(f"{source} and {data} name their classes differently; evaluate on the data it was trained on")


def parse_rhos(text: str) -> list[float]:
    """The rhos of `--rho`, in the order given. Raises `ValueError` for an empty list or a value outside (0, 1]."""
    try:
        if ":" in text:
            low, high, step = (float(part) for part in text.split(":"))
            if step <= 0:
                raise ValueError
            count = int((high - low) / step + 1e-9)
            values = [round(low + number * step, 9) for number in range(count, -1, -1)]
        else:
            values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(
            f"--rho {text}: write numbers with commas, as in 1.0,0.6,0.2, or a range 0.2:1.0:0.1"
        ) from None
    if not values:
        raise ValueError("--rho is empty; write numbers with commas, as in 1.0,0.6,0.2")
    for value in values:
        if not 0 < value <= 1:
            raise ValueError(f"--rho {value:g} is out of range; rho is the share of patches kept, in (0, 1]")
    return list(dict.fromkeys(values))


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
