"""pss-eval: accuracy and cost of trained runs at each rho; the choice of a rho; models for other programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli import cascades, outputs
from cli.cascades import wish
from cli.common import CACHE_DIR, CACHE_GB, VERSION, found_data, make_app
from cli.errors import flush, run
from cli.rhos import parse_rhos

if TYPE_CHECKING:
    import torch

    from pss.api.evaluation import Evaluated
    from pss.inference.opening import Run

_LARGEST_BATCH = 10**6

app = make_app()


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
    data: Annotated[
        str | None,
        typer.Option(
            help="The data set, as given to pss-train; for anything that asks for accuracy.", show_default=False
        ),
    ] = None,
    rho: Annotated[
        str | None,
        typer.Option(
            help="Shares of patches to keep: a list 1.0,0.8,... or a range low:high:step "
            "(default: those of the method, such as 1.0,0.8,0.6,0.4,0.2; where ρ is to be chosen, all there are).",
            show_default=False,
        ),
    ] = None,
    sort: Annotated[
        Literal["magnitude", "random"] | None,
        typer.Option(help="Which patches to keep (default: as trained).", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for report.html and rho.json, .csv and .png (default: the run's, or what runs share)."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Which split to evaluate on.")] = "val",
    loader: Annotated[Literal["auto", "dali", "ffcv", "torch"], typer.Option(help="What decodes the images.")] = "auto",
    cache_dir: Annotated[Path | None, CACHE_DIR] = None,
    cache_gb: Annotated[float | None, CACHE_GB] = None,
    batch_size: Annotated[
        int, typer.Option(help="Images per batch, also for the speed.", min=1, max=_LARGEST_BATCH)
    ] = 64,
    ema: Annotated[bool, typer.Option("--ema", help="Evaluate the moving average of the weights.")] = False,
    best: Annotated[
        bool, typer.Option("--best", help="Of a run, take the checkpoint of the best validation, not the newest.")
    ] = False,
    push: Annotated[
        Path | None,
        typer.Option(help="Also write the model into this folder, ready for the Hugging Face Hub.", show_default=False),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            "--license", help="With --push: the model's licence on its card, such as apache-2.0.", show_default=False
        ),
    ] = None,
    budget_ms: Annotated[
        float | None,
        typer.Option(help="Choose the largest ρ at which one batch takes so many ms here.", show_default=False),
    ] = None,
    target_ips: Annotated[
        float | None,
        typer.Option(help="Choose the largest ρ that gives so many images per second here.", show_default=False),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Choose the smallest ρ that costs at most so many points of top-1.", show_default=False),
    ] = None,
    cascade: Annotated[
        str | None,
        typer.Option(
            help="Look at every image at the first of these ρ, 0.4,0.7,1.0 say, and at those that are uncertain again "
            "at the next; fitted to --max-drop (default: 0) or --target-gmacs.",
            show_default=False,
        ),
    ] = None,
    target_gmacs: Annotated[
        float | None,
        typer.Option(help="With --cascade: what an image may cost on average, in GMACs.", show_default=False),
    ] = None,
    fit_split: Annotated[
        str | None,
        typer.Option(
            help="With --cascade: the split to fit thresholds on (default: one half of --split, not measured on).",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            help="Images per batch for --budget-ms (default: 1) and --target-ips (default: --batch-size).",
            show_default=False,
            min=1,
            max=_LARGEST_BATCH,
        ),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            help="Write the model as .onnx or .pt2, for one --rho, a chosen one, or --dynamic.", show_default=False
        ),
    ] = None,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Export with ρ free at each call.")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Export .onnx in 8 bits, and measure it beside the float form on --data.")
    ] = False,
    predict: Annotated[
        list[str] | None,
        typer.Option(help="Say what an image file is, or those in a folder; may be repeated.", show_default=False),
    ] = None,
    top: Annotated[
        int | None, typer.Option(help="With --predict: how many classes (default: 5).", min=1, show_default=False)
    ] = None,
    format: Annotated[
        Literal["table", "json", "csv"] | None,
        typer.Option(help="With --predict: what is printed (default: table).", show_default=False),
    ] = None,
    version: Annotated[bool, VERSION] = False,
) -> None:
    """Sweep ρ: accuracy, GFLOPs, speed with the loader and without, latency and memory of each run at each ρ.

    Or choose a ρ (--budget-ms, --target-ips, --max-drop), or export a model for other programs (--export).
    """
    demand = Demand(budget_ms, target_ips, max_drop, batch)
    rhos = None if rho is None else parse_rhos(rho)
    if predict:
        if given := [
            name
            for name, value in (
                ("--data", data),
                ("--output", output),
                ("--push", push),
                ("--license", licence),
                ("--export", export),
                (demand.option, demand.option),
                ("--cascade", cascade),
                ("--sort", sort),
                ("--dynamic", dynamic),
                ("--int8", int8),
                ("--split", split != "val"),
                ("--loader", loader != "auto"),
                ("--cache-dir", cache_dir),
                ("--cache-gb", cache_gb),
            )
            if value
        ]:
            raise ValueError(f"{given[0]} does not go with --predict, which looks at image files alone; leave it out")
        if len(runs) > 1 or (rhos is not None and len(rhos) > 1):
            raise ValueError("--predict takes one model at one --rho; name one")
        at = None if rhos is None else rhos[0]
        _predict(runs[0], predict, at, top or 5, format or "table", batch_size=batch_size, ema=ema, best=best)
        return
    if top is not None or format is not None:
        raise ValueError("--top and --format are for --predict; add it, or leave them out")
    wanted = wish(
        cascade, demand.option, max_drop, target_gmacs, fit_split, dynamic=dynamic, int8=int8, push=push is not None
    )
    single = [
        "--cascade" if wanted else "",
        demand.option,
        *(name for name, value in (("--export", export), ("--push", push)) if value is not None),
    ]
    if len(runs) > 1 and any(single):
        raise ValueError(f"{next(filter(None, single))} is for one model and {len(runs)} are named; name one")
    sweeping = export is None and not demand.option and wanted is None
    if push is not None and not sweeping:
        raise ValueError("--push writes the table of a sweep along; leave out --export and what chooses ρ")
    if licence is not None and push is None:
        raise ValueError("--license is for the card of a pushed model; add --push, or leave it out")
    if dynamic and (export is None or demand.option or rhos):
        raise ValueError("--dynamic goes with --export alone: a file whose ρ is free at each call")
    if int8 and export is None:
        raise ValueError("--int8 goes with --export FILE.onnx; add it, or leave --int8 out")
    if data is None and (sweeping or wanted or max_drop is not None or int8):
        raise ValueError("--data is missing; name the data set to evaluate on, as given to pss-train")
    outputs.check_paths(output=output, export=export, push=push)

    import pipelines
    from cli.export import Wanted8, check_export, write_export
    from pss.api.evaluation import REPORT, check_data, measure, open_runs
    from pss.inference import report, sweep, table
    from pss.inference.publishing import facts
    from pss.inference.publishing.pushing import write_model
    from pss.runtime import files
    from pss.runtime import processes as dist

    results = cascades.FILES if wanted else (*sweep.FILES, REPORT)

    def check_targets() -> None:
        if export is not None:
            check_export(export, int8=int8)
        if push is not None:
            from pss.inference.hub import check_target as check_pushing

            check_pushing(push)
            facts.check_licence(licence)
        if output is not None and (sweeping or wanted):
            outputs.check_folder(output, results, given=True)

    place = found_data(data, cache_dir, cache_gb)
    dataset = None if place is None else pipelines.open_dataset(place)
    names = sweep.distinct_names(runs)
    with dist.start() as world:
        if world.size > 1 and not sweeping:
            raise ValueError(f"{next(filter(None, single))} is for one process; start it without torchrun")
        outputs.agree(world, check_targets)
        loaded = open_runs(runs, world, ema=ema, best=best, sort=sort)
        for point in (rhos or ()) if len(loaded) == 1 else ():  # beside others, a method without a knob has one row
            loaded[0].method.check_point(point)
        if dataset is not None:
            check_data(loaded, runs, dataset, split)
        for note in (note for one in loaded for note in one.notes if world.is_main):
            typer.echo(note, err=True)

        def measured(at: Sequence[float] | None) -> Evaluated:
            assert place is not None
            return measure(loaded, names, place, at, split=split, loader=loader, batch_size=batch_size, world=world)

        folder = output or sweep.default_output(loaded)
        if output is None and (sweeping or wanted):
            outputs.agree(world, lambda: outputs.check_folder(folder, results, given=False))
        if sweeping:
            if push is not None:
                loaded[0].published()  # raises for what cannot be
            if world.is_main and (missing := report.missing()) is not None:
                typer.echo(f"there will be no report: {missing}", err=True)
            found, writing = measured(rhos), outputs.Writing()
            if world.is_main:
                with writing.result("the table"):  # first: whatever happens to the files, it is not lost
                    table.show(found.rows)
                    flush()
                made: dict[str, str | bytes] = {}
                for name, content in found.contents().items():
                    with writing.result(str(folder / name)), sweep.stage(f"writing {name}", world):
                        made[name] = content()
                        files.write(folder / name, made[name])
                if push is not None and dataset is not None:
                    with writing.result(str(push)):
                        about = facts.of(loaded[0], dataset=dataset.root.name, split=split, licence=licence)
                        write_model(push, loaded[0], names[0], found.rows, about, made)
                if told := [name for name in writing.written if name != "the table"]:
                    typer.echo(f"wrote {outputs.listed(told)}", err=True)
            world.barrier()
            writing.close()
        if wanted is not None:
            assert place is not None
            cascades.run(
                loaded[0], names[0], wanted, place, folder, rhos,
                split=split, loader=loader, batch_size=batch_size, world=world, export=export,
            )  # fmt: skip
            return
        if demand.option:
            rhos = [choose(demand, loaded[0], rhos, None if place is None else measured, batch_size, world.device)]
        if export is not None:
            quantised = None if not int8 or place is None else Wanted8(place, split, loader, batch_size)
            write_export(loaded[0], export, rhos, dynamic=dynamic, int8=quantised)


def _predict(run: str, images: Sequence[str], rho: float | None, top: int, form: str, **options: Any) -> None:
    from pss.api import prediction

    found = prediction.predict(run, images, rho=rho, top=top, **options)
    typer.echo(
        {"table": prediction.as_table, "json": prediction.as_json, "csv": prediction.as_csv}[form](found), nl=False
    )
    flush()
    if unread := [one for one in found if one.error]:
        raise ValueError(f"{len(unread)} of {len(found)} images could not be read; {unread[0].error}")


@dataclass(frozen=True)
class Demand:
    """What ρ is to be chosen by."""

    budget_ms: float | None
    target_ips: float | None
    max_drop: float | None
    batch: int | None

    def __post_init__(self) -> None:
        given = {name: value for name, value in self._wishes().items() if value is not None}
        for name, value in given.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value:g}; it must be a number that is not negative")
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given; choose ρ by one of them")
        if self.batch is not None and (not given or self.max_drop is not None):
            raise ValueError("--batch goes with --budget-ms or --target-ips; for a sweep it is --batch-size")

    def _wishes(self) -> dict[str, float | None]:
        return {"--budget-ms": self.budget_ms, "--target-ips": self.target_ips, "--max-drop": self.max_drop}

    @property
    def option(self) -> str:
        """The option that was given; nothing if none was."""
        return next((name for name, value in self._wishes().items() if value is not None), "")


def choose(
    demand: Demand,
    one: Run,
    rhos: list[float] | None,
    measure: Callable[[Sequence[float]], Evaluated] | None,
    batch_size: int,
    device: torch.device,
) -> float:
    """The ρ that meets `demand`; says what it is and, where there is data to measure it on, what it costs."""
    from pss.inference import choose as chooser
    from pss.inference import table
    from pss.methods import mean_tokens

    if demand.max_drop is not None:
        assert measure is not None
        candidates = sorted({1.0, *(rhos or [number / 20 for number in range(1, 21)])}, reverse=True)
        rows = measure(chooser.levels(one, candidates)[::-1]).rows
        chosen = chooser.accurate_enough(
            [row["rho"] for row in rows], [row["top1"] for row in rows], max_drop=demand.max_drop
        )
        rows = [row for row in rows if row["rho"] in (chosen, 1.0)]
        reason = f"the smallest of {len(candidates)} ρ that costs at most {demand.max_drop:g} points of top-1"
    else:
        batch = demand.batch or (1 if demand.budget_ms is not None else batch_size)
        choice = chooser.fast_enough(
            one, batch=batch, device=device, budget_ms=demand.budget_ms, target_ips=demand.target_ips, rhos=rhos
        )
        chosen, got = choice.rho, choice.measured
        unit = "ms" if demand.budget_ms is not None else "images/s"
        reason = (
            f"the largest that meets {demand.option} {demand.budget_ms or demand.target_ips:g} with batches of {batch} "
            f"here: {got.median:.4g} {unit} ({got.low:.4g}–{got.high:.4g})"
        )
        rows = [] if measure is None else measure(sorted({1.0, chosen}, reverse=True)).rows
    if rows:
        table.show(rows)
    saved = 1 - one.method.cost(chosen).forward / one.method.cost().forward
    drop = ""
    if rows:
        less = rows[0]["top1"] - rows[-1]["top1"]
        drop = f", {abs(less):.2f} points of top-1 {'less' if less >= 0 else 'more'}"
    typer.echo(
        f"ρ {chosen:.4g} ({mean_tokens(one.method.tokens(chosen))} of {one.method.model.num_tokens} tokens), {reason}; "
        f"against ρ 1 {saved:.0%} fewer FLOPs{drop}"
    )
    flush()  # before anything is written, which may fail
    return chosen


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
