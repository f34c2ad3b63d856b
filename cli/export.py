"""What `pss-eval RUN --export FILE` writes and says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from cli.errors import flush
from pipelines import DataPath
from pss.api.training import LoaderName
from pss.inference.opening import Run


@dataclass(frozen=True)
class Wanted8:
    """A file of 8 bits, and what it is measured on."""

    data: DataPath
    split: str
    loader: LoaderName
    batch_size: int


def check_export(path: Path, *, int8: bool) -> None:
    """Raise `ValueError` for a file that cannot be written here."""
    from pss.api.exporting import check_int8
    from pss.inference.export import check_target

    (check_int8 if int8 else check_target)(path)


def write_export(
    one: Run, path: Path, rhos: Sequence[float] | None, *, dynamic: bool, int8: Wanted8 | None = None
) -> None:
    """Write a model for other programs. Raises `ValueError` as `pss.inference.export.export`, or for several ρ."""
    from pss.inference.export import export
    from pss.inference.sweep import operating_points

    points = (1.0,) if dynamic else operating_points(one, rhos)
    if len(points) != 1 or (rhos is None and not dynamic and points != (None,)):
        raise ValueError("--export needs one ρ, as in --rho 0.6, or --dynamic")
    (point,) = points
    if int8 is not None:
        _write_int8(one, path, point, int8, dynamic=dynamic)
        return
    worst = export(one, path, point=point, dynamic=dynamic)
    how = "any ρ" if dynamic else "as trained" if point is None else f"ρ {point:.4g}"
    typer.echo(
        f"wrote {path}: {how}, any batch size; its logits differ from the model's by {worst:.1g} at most", err=True
    )


def _write_int8(one: Run, path: Path, point: float | None, wanted: Wanted8, *, dynamic: bool) -> None:
    from pss.api.exporting import export_int8

    made = export_int8(
        one,
        path,
        wanted.data,
        point=point,
        dynamic=dynamic,
        split=wanted.split,
        loader=wanted.loader,
        batch_size=wanted.batch_size,
        say=lambda line: typer.echo(line, err=True),
    )
    typer.echo(made.table(), nl=False)
    typer.echo(made.verdict())
    flush()
