"""pss-train: train a recipe on a data set."""

from __future__ import annotations

import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cli.common import CACHE_DIR, CACHE_GB, VERSION, found_data, make_app, recipe_names, setting_names
from cli.errors import Failed, run

if TYPE_CHECKING:
    from pss.config import Config

app = make_app()

_began: float | None = None  # the process, by `time.perf_counter`, before anything large is imported

_MOST_MACHINES = 10**5  # GPUs of a node, or nodes
_STOPPED = 75  # EX_TEMPFAIL: schedulers take it as "run again"
_CTRL_C = 130  # what shells expect, who ask whether a script is to go on


def _list_recipes(show: bool) -> None:
    if not show:
        return
    from pss.recipes import summaries

    found = summaries()
    width = max(map(len, found))
    for name, summary in found.items():
        typer.echo(f"{name:{width}}  {summary}")
    raise typer.Exit


@app.command()
def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="What to train: a recipe of --list, a file of one (.yaml, .toml, .json), or the folder of a run, for "
            "its settings.",
            show_default=False,
            autocompletion=recipe_names,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A folder made by pss-convert, or its address (s3://bucket/set, https://…), or a folder with "
            "train|val/class/*.jpg.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The run's folder: log, checkpoints, config.", show_default=False)
    ] = None,
    loader: Annotated[Literal["auto", "dali", "ffcv", "torch"], typer.Option(help="What decodes the images.")] = "auto",
    cache_dir: Annotated[Path | None, CACHE_DIR] = None,
    cache_gb: Annotated[float | None, CACHE_GB] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="Change the recipe; repeatable. --set help shows all there is to set.",
            autocompletion=setting_names,
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Begin with the weights of that run, and its settings if no recipe is named.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue the run in --output where it stopped, or begin it; also --resume auto."
        ),
    ] = False,
    budget_hours: Annotated[
        float | None,
        typer.Option(
            help="Choose train.epochs so that all of it, start and validation too, takes so many hours here at most.",
            show_default=False,
        ),
    ] = None,
    budget_of_dense: Annotated[
        float | None,
        typer.Option(
            help="The same, as a share of what dense training of the recipe's epochs takes.", show_default=False
        ),
    ] = None,
    list_recipes: Annotated[
        bool, typer.Option("--list", help="Show the recipes and leave.", is_eager=True, callback=_list_recipes)
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Train nothing; print the recipe as a file with all its settings.")
    ] = False,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Train nothing; show rho, costs and what the loader must deliver."),
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option(help="With --plan: draw rho and the learning rate into this PNG.", show_default=False),
    ] = None,
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
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress; warnings and errors only.")] = False,
    version: Annotated[bool, VERSION] = False,
) -> None:
    """Train a recipe, alone or under torchrun (`torchrun --nproc-per-node 8 --no-python pss-train ...`).

    Ends with 0; 2 for what you can put right; 75 where SIGTERM stopped it and 130 after Ctrl-C, both saved, so that
    --resume goes on; 1 for anything else.
    """
    from pss.api.training import configuration
    from pss.api.training import train as train_run
    from pss.starting import check_shapes

    settings = list(settings or [])
    asked = [text for text in settings if text == "help"]
    config = configuration(recipe, [text for text in settings if text != "help"], start)
    if (budget_hours, budget_of_dense) != (None, None) and (asked or show or doctor):
        option = "--budget-hours" if budget_hours is not None else "--budget-of-dense"
        raise ValueError(f"{option} measures how long the run takes; leave out --show, --set help and --doctor")
    if asked or show:
        typer.echo(_help_of(config) if asked else _file_of(config, recipe or str(start)), nl=False)
        return
    if plan:
        from cli.plan import Wanted, fitting, show_plan

        check_shapes(config)
        files, found = tuple(measured or ()), found_data(data, cache_dir, cache_gb)
        wanted = Wanted(gpu, gpus, nodes, cores, loader, loader_rate, gpu_rate, files)
        if (budget_hours, budget_of_dense) != (None, None):
            config = fitting(config, found, wanted, settings, budget_hours, budget_of_dense, _began)
        show_plan(config, found, wanted, picture)
        return
    if picture is not None:
        raise ValueError("--picture draws what --plan shows; add --plan, or leave it out")
    if (gpu, gpus, nodes, cores, loader_rate, gpu_rate, measured or None) != (None, 1, 1, None, None, None, None):
        raise ValueError(
            "--gpu, --loader-rate, --gpu-rate, --gpus, --nodes, --cores and --measured are for --plan; add it, or "
            "leave them out"
        )
    if doctor:
        from cli.doctor import examine

        check_shapes(config)
        examine(config, found_data(data, cache_dir, cache_gb), loader)
        return
    if data is None or output is None:
        missing = [name for name, value in (("--data", data), ("--output", output)) if value is None]
        raise ValueError(f"give {' and '.join(missing)}; only --plan, --show and --set help need neither")
    from pss.runtime.processes import LostProcess
    from pss.training.setup import Interrupted

    say = (lambda line: None) if quiet else (lambda line: typer.echo(line, err=True))
    try:
        train_run(
            recipe,
            data,
            output,
            settings=settings,
            start=start,
            loader=loader,
            cache_dir=cache_dir,
            cache_gb=cache_gb,
            resume=resume,
            budget_hours=budget_hours,
            budget_of_dense=budget_of_dense,
            began=_began,
            quiet=quiet,
            say=say,
        )
    except LostProcess as lost:
        raise Failed(str(lost)) from lost
    except Interrupted as stopped:
        if os.environ.get("RANK", "0") == "0":
            typer.echo(str(stopped), err=True)
        raise typer.Exit(_CTRL_C if stopped.by_user else _STOPPED) from None


def _file_of(config: Config, name: str) -> str:
    from pss.recipes import files

    return f"# {name}, resolved; a file of it is trained as it is: pss-train FILE.yaml\n{files.write(config)}"


def _help_of(config: Config) -> str:
    """All settings: what each is in this run, what it takes, and what it does."""
    import textwrap

    from pss.explain import explain

    lines = [f"settings of {config.recipe} with method {config.method}; change one with --set NAME=VALUE"]
    section = ""
    for setting in explain(config):
        if (begins := setting.name.rpartition(".")[0]) != section:
            section = begins
            lines.append("")
        lines.append(f"{setting.name} = {setting.value or 'empty'}   ({setting.takes})")
        doc = setting.doc if setting.reader is None else f"{setting.doc} Read with {setting.reader} only."
        lines += textwrap.wrap(doc, 96, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines) + "\n"


def main() -> None:
    global _began
    _began = time.perf_counter()
    # `--resume auto` is what schedulers' scripts often say; it is what --resume does.
    words = sys.argv[1:]
    run(app, [word for before, word in pairwise(["", *words]) if (before, word) != ("--resume", "auto")])


if __name__ == "__main__":
    main()
