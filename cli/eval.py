"""pss-eval: accuracy and speed of trained runs at each rho."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cli.errors import run

app = typer.Typer(add_completion=True, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def evaluate(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders of pss-train; several are compared.", metavar="RUN...")
    ],
    data: Annotated[Path, typer.Option(help="The data set, as given to pss-train.", show_default=False)],
    rho: Annotated[
        str, typer.Option(help="Shares of patches to keep: a list 1.0,0.8,... or a range low:high:step.")
    ] = "1.0,0.8,0.6,0.4,0.2",
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for rho.json, rho.csv and rho.png (default: the run's, or what runs share)."),
    ] = None,
    split: Annotated[str, typer.Option(help="Which split to evaluate on.")] = "val",
    loader: Annotated[Literal["auto", "dali", "ffcv", "torch"], typer.Option(help="What decodes the images.")] = "auto",
    batch_size: Annotated[int, typer.Option(help="Images per batch, also for the speed.", min=1)] = 64,
    ema: Annotated[bool, typer.Option("--ema", help="Evaluate the moving average of the weights.")] = False,
) -> None:
    """Sweep ρ: top-1, top-5, tokens, GFLOPs and images per second for each run at each ρ."""
    rhos = parse_rhos(rho)

    import pipelines
    from pipelines.base import DataError
    from pss import dist, sweep
    from pss.runs import load_run

    dataset = pipelines.open_dataset(data)
    with dist.start() as world:
        loaded = [load_run(folder, world.device, ema=ema) for folder in runs]
        for one, folder in zip(loaded, runs, strict=True):
            if len(one.classes) != len(dataset.classes):
                raise DataError(
                    f"{folder} was trained on {len(one.classes)} classes and {data} has {len(dataset.classes)}; "
                    "evaluate it on the data set it was trained on"
                )
            if one.classes != list(dataset.classes):
                raise DataError(
                    f"{folder} and {data} name their classes differently; evaluate on the data it was trained on"
                )
        options: dict[str, Any] = {
            "batch_size": batch_size,
            "train": False,
            "loader": loader,
            "rank": world.rank,
            "world_size": world.size,
            "device": world.device,
        }
        rows = sweep.sweep(
            loaded,
            names=sweep.distinct_names(runs),
            rhos=rhos,
            make_loader=lambda config: pipelines.build(data, split, config=config, **options),
            batch_size=batch_size,
            world=world,
        )
        if world.is_main:
            folder = output or sweep.default_output(runs)
            sweep.write(rows, folder)
            sweep.show(rows)
            typer.echo(f"wrote {folder / 'rho.json'}, rho.csv and rho.png", err=True)
        world.barrier()


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
