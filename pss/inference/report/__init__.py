"""The report of a sweep: one HTML file with everything in it, which opens from disk without a network."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from pss.inference.exhibit import Exhibit, Picture
from pss.inference.opening import Run
from pss.inference.sweep import COLUMNS, Row, Sweep, write_text
from pss.runs.log import read_rows

MISSING = "report.html needs plotly; run: pip install 'patch-sampling-schedule[report]'"
"""What to say where no report can be made."""

_MAX_POINTS = 1000
_SMOOTHING = 0.9


def available() -> bool:
    """Whether reports can be made here."""
    return find_spec("plotly") is not None


def write(found: Sweep, runs: Sequence[Run], names: Sequence[str], path: Path) -> None:
    """Write the report of a sweep over `runs`, which the table calls `names`."""
    content = {
        "rows": found.rows,
        "table": {
            "headings": ["run", *(heading for heading, _ in COLUMNS)],
            "cells": [[row["run"], *(text(row) for _, text in COLUMNS)] for row in found.rows],
        },
        "runs": [
            {"name": name, **_exhibit(exhibit, run), "training": _training(run)}
            for name, run, exhibit in zip(names, runs, found.exhibits, strict=True)
        ],
    }
    write_text(path, _page(content, _title(names), _about(found.rows)))


def _page(content: dict[str, Any], title: str, about: str) -> str:
    from plotly.offline import get_plotlyjs

    own = files("pss.inference.report")
    # "</" would end the script element, whatever language it is in.
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    page = own.joinpath("report.html").read_text(encoding="utf-8")
    page = page.replace("{{title}}", html.escape(title)).replace("{{about}}", html.escape(about))
    for mark, value in (
        ("{{style}}", own.joinpath("report.css").read_text(encoding="utf-8")),
        ("{{script}}", own.joinpath("report.js").read_text(encoding="utf-8")),
        ("{{plotly}}", get_plotlyjs()),
        ("{{data}}", data),  # last, as it may hold anything
    ):
        before, found, after = page.partition(mark)
        assert found, mark
        page = before + value + after
    return page


def _title(names: Sequence[str]) -> str:
    return " and ".join(names) if len(names) < 4 else f"{len(names)} runs"


def _about(rows: Sequence[Row]) -> str:
    row = rows[0]
    return (
        f"{row['num_images']:,} images, {row['device']}, torch {row['torch']}, batches of {row['batch_size']}. "
        "Speeds are medians of interleaved rounds, with the slowest and the fastest. FLOPs are multiply-accumulates."
    )


def _exhibit(exhibit: Exhibit, run: Run) -> dict[str, Any]:
    classes = run.classes or [f"class {number}" for number in range(run.num_classes)]
    return {
        "rhos": exhibit.points,
        "grid": exhibit.grid,
        "blocks": exhibit.num_blocks,
        "tokens": exhibit.tokens,
        "kept": [round(sum(shares)) for shares in exhibit.frequencies],  # on average over the images
        "frequencies": [[round(share, 4) for share in shares] for shares in exhibit.frequencies],
        "pictures": [_picture(picture, classes) for picture in exhibit.pictures],
    }


def _picture(picture: Picture, classes: Sequence[str]) -> dict[str, Any]:
    return {
        "label": classes[picture.label],
        "source": _data_uri(picture.pixels),
        "views": [
            {
                "kept": view.kept,
                "depths": view.depths,
                "top": [[classes[number], round(chance, 4)] for number, chance in view.top],
            }
            for view in picture.views
        ],
    }


def _data_uri(pixels: Tensor) -> str:
    """uint8 (3, S, S) as an image in the text of a page."""
    image, buffer = Image.fromarray(pixels.permute(1, 2, 0).numpy()), io.BytesIO()
    kind = "png" if max(image.size) <= 64 else "jpeg"
    image.save(buffer, format=kind, **({"quality": 85} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _training(run: Run) -> dict[str, Any] | None:
    """The curves of a run's log: by optimizer step and by hours of training, validation not counted."""
    if run.folder is None or not (run.folder / "log.jsonl").is_file():
        return None
    steps, epochs = read_rows(run.folder, "step"), read_rows(run.folder, "epoch")
    if not epochs:
        return None
    ends = [0, *(row["step"] for row in epochs)]
    hours = np.cumsum([0.0, *(row["train_seconds"] / 3600 for row in epochs)])

    def curve(rows: Sequence[dict[str, Any]], key: str, smoothing: float = 0.0) -> dict[str, list[float]]:
        values: list[float] = []
        for row in rows:
            values.append(smoothing * values[-1] + (1 - smoothing) * row[key] if values else row[key])
        at = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _MAX_POINTS)).round().astype(int)).tolist()
        places = [rows[number]["step"] for number in at]
        return {
            "steps": places,
            "hours": [round(float(hour), 6) for hour in np.interp(places, ends, hours)],
            "values": [round(values[number], 5) for number in at],
        }

    return {
        "loss": curve(steps, "loss", _SMOOTHING),
        "val_loss": curve(epochs, "val_loss"),
        "top1": curve(epochs, "top1"),
    }
