"""What `pss-eval RUN --cascade` does: fit thresholds, say what they reach, write it, and export what runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cli import outputs
from cli.errors import flush
from cli.rhos import parse_rhos

if TYPE_CHECKING:
    from pipelines import DataPath
    from pss.inference.opening import Run
    from pss.runtime.processes import World

FILES = ("cascade.json", "cascade.png")
"""What is written."""


@dataclass(frozen=True)
class Wish:
    """The cascade that was asked for."""

    rhos: tuple[float, ...]
    """Ascending; none for the usual ones."""
    max_drop: float
    gmacs: float | None
    fit_split: str | None


def wish(
    cascade: str | None,
    chosen_by: str,
    max_drop: float | None,
    gmacs: float | None,
    fit_split: str | None,
    *,
    dynamic: bool,
    int8: bool,
    push: bool,
) -> Wish | None:
    """What the options ask for, `chosen_by` being the one that chooses a ρ; None if they ask for no cascade.

    Raises:
        ValueError: what does not go together, or is no number of ρ.
    """
    if cascade is None:
        for option, value in (("--target-gmacs", gmacs), ("--fit-split", fit_split)):
            if value is not None:
                raise ValueError(f"{option} is for a cascade; add --cascade 0.4,0.7,1.0, or leave it out")
        return None
    if chosen_by not in ("", "--max-drop"):
        raise ValueError(f"{chosen_by} chooses one ρ, and --cascade runs several; leave out one of them")
    if gmacs is not None and max_drop is not None:
        raise ValueError("--max-drop and --target-gmacs are both given; fit the cascade to one of them")
    if gmacs is not None and not 0 < gmacs < float("inf"):
        raise ValueError(f"--target-gmacs is {gmacs:g}; give a number above 0")
    if dynamic or push:
        option = "--push" if push else "--dynamic"
        raise ValueError(f"{option} does not go with --cascade, whose --export leaves ρ free anyway; leave it out")
    if int8:
        raise ValueError(
            "--int8 does not go with --cascade: thresholds are fitted to the model as it is; leave one out"
        )
    rhos = () if cascade == "auto" else tuple(sorted(parse_rhos(cascade, "--cascade")))
    if len(rhos) == 1 or len(rhos) > 4:
        raise ValueError(f"--cascade {cascade} names {len(rhos)} ρ; name two to four, such as 0.4,0.7,1.0, or auto")
    return Wish(rhos, 0.0 if max_drop is None else max_drop, gmacs, fit_split)


def run(
    one: Run,
    name: str,
    wanted: Wish,
    data: DataPath,
    folder: Path,
    compared: Sequence[float] | None,
    *,
    export: Path | None,
    world: World,
    **options: Any,
) -> None:
    """Fit, say, write and export. Raises `ValueError` and `OSError`."""
    from pss.api.cascading import Target, cascade_of
    from pss.inference.cascade import DEFAULT
    from pss.runtime import files

    target = Target(None if wanted.gmacs is not None else wanted.max_drop, wanted.gmacs)
    rhos = wanted.rhos or DEFAULT
    found = cascade_of(
        one, name, data, rhos, target, compared=compared, fit_split=wanted.fit_split, world=world, **options
    )
    typer.echo("\n".join(lines(found.to_dict())))
    flush()  # before anything is written, which may fail
    writing = outputs.Writing()
    for file, content in found.contents().items():
        with writing.result(str(folder / file)):
            files.write(folder / file, content())
    if export is not None:
        from pss.inference.export import export as export_model

        with writing.result(str(export)):
            worst = export_model(one, export, point=None, dynamic=True, more=found.metadata(one))
            typer.echo(
                f"{export}: any ρ, with the cascade in its metadata; its logits differ from the model's by {worst:.1g} "
                "at most",
                err=True,
            )
    if writing.written:
        typer.echo(f"wrote {outputs.listed(writing.written)}", err=True)
    writing.close()


def lines(found: dict[str, Any]) -> Iterator[str]:
    """What `Found.to_dict` holds, for people."""
    stages, unit, per = found["stages"], "G", 1.0
    if found["gmacs"] < 0.1:
        unit, per = "M", 1e3
    rhos = " → ".join(f"{stage['rho']:g}" for stage in stages)
    yield (
        f"cascade ρ {rhos}, {found['target']}: thresholds from {found['fitted_images']:,} images, measured on "
        f"{found['images']:,} others"
    )
    yield f"{'ρ':>9} {'sure at':>9} {'of images':>10}"
    for stage in stages:
        sure = "always" if stage["threshold"] is None else f"{stage['threshold']:.3f}"
        yield f"{stage['rho']:>9g} {sure:>9} {stage['share']:>10.1%}"
    yield f"{'':>9} {'top-1 %':>9} {unit + 'MACs':>10} {'images/s':>10}"
    rows = [("cascade", found), *((f"ρ {one['rho']:g}", one) for one in found["singles"])]
    for name, row in rows:
        yield f"{name:>9} {row['top1']:>9.2f} {per * row['gmacs']:>10.4g} {row['images_per_second']:>10,.0f}"
    against, same = found["against_largest"], found["at_equal_top1"]
    yield (
        f"against ρ {against['rho']:g}: {against['difference']:+.2f} ± {against['difference_error']:.2f} points of "
        f"top-1, {_fewer(against['saved'])} MACs"
    )
    if same is not None:
        word = _fewer(same["saved"])
        yield f"against the single ρ of equal top-1 ({per * same['gmacs']:.4g} {unit}MACs): {word} MACs"
    else:
        yield "no single ρ has as much top-1"
    gained = found["top1"] - found["at_equal_cost"]["top1"]
    yield f"against the single ρ of equal cost: {gained:+.2f} points of top-1 (± {found['top1_error']:.2f})"
    if gained <= 0 and same is not None and same["saved"] <= 0:
        enough = [one for one in found["singles"] if one["top1"] >= found["top1"] and one["gmacs"] <= found["gmacs"]]
        alone = f": ρ {enough[0]['rho']:g} alone, say" if enough else ""
        yield f"the cascade gains nothing here: a single ρ does as well for as much, or less{alone}"


def _fewer(saved: float) -> str:
    """A share that is saved, or spent beyond, in words."""
    return f"{abs(saved):.0%} {'fewer' if saved >= 0 else 'more'}"
