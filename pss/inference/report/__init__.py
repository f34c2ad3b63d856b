"""The report of a sweep: one HTML file with everything in it, which opens from disk without a network."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from pipelines.extras import need
from pss.inference.exhibit import Exhibit, Picture
from pss.inference.opening import Run
from pss.inference.sweep import Row, Sweep, finite
from pss.inference.table import COLUMNS
from pss.inference.text import printable
from pss.runs.log import read_rows
from pss.runtime import files

_MAX_POINTS = 1000
_SMOOTHING = 0.9
_MOST_CLASSES, _WORST, _CONFUSIONS = 50, 30, 12


def available() -> bool:
    """Whether reports can be made here."""
    return missing() is None


def missing() -> str | None:
    """What to say where no report can be made; None where one can."""
    try:
        need("report.html", "report", "plotly")
    except ValueError as error:
        return str(error)
    return None


def write(found: Sweep, runs: Sequence[Run], names: Sequence[str], path: Path) -> None:
    """Write the report of a sweep over `runs`, which the table calls `names`, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    files.write(path, page(found, runs, names))


def page(found: Sweep, runs: Sequence[Run], names: Sequence[str]) -> str:
    """The report as HTML."""
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
    return _page(content, _title(names), _about(found.rows))


def _page(content: dict[str, Any], title: str, about: str) -> str:
    from plotly.offline import get_plotlyjs

    own = resources.files("pss.inference.report")
    parts = {
        "title": html.escape(printable(title)),
        "about": html.escape(printable(about)),
        "style": own.joinpath("report.css").read_text(encoding="utf-8"),
        "script": own.joinpath("report.js").read_text(encoding="utf-8"),
        "plotly": get_plotlyjs(),
        "data": _data(content),
    }
    frame = own.joinpath("report.html").read_text(encoding="utf-8")
    # In one go, so that no part is looked for in another one: a run may be called {{data}}.
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], frame)


def _data(content: Any) -> str:
    """JSON that no parser of HTML, and no script, takes for anything else, whatever names there are in it.

    It is ASCII, and has none of the characters that begin, end or comment out an element: after `<!--<script>` a
    browser would look for the end of the page in vain.
    """
    data = json.dumps(finite(content), separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return data


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
        "classes": _classes(exhibit, classes),
    }


def _classes(exhibit: Exhibit, names: Sequence[str]) -> dict[str, Any]:
    """What of each class is right at every point, and what it is taken for: of all classes, or of the worst of many.

    Those are the same at all points. Classes of which the split has no image are left out.
    """
    labels, count = exhibit.labels.numpy(), len(names)
    sizes = np.bincount(labels, minlength=count)
    tables = []
    for answers in exhibit.answers.numpy():
        pairs, times = np.unique(labels * count + answers, return_counts=True)
        tables.append((pairs // count, pairs % count, times))
    rights = np.zeros((len(tables), count))
    for right, (true, taken, times) in zip(rights, tables, strict=True):
        right[true[true == taken]] = times[true == taken]
    largest = max(range(len(tables)), key=lambda place: exhibit.points[place] or 0.0)
    there = np.flatnonzero(sizes)
    shown = there
    if len(there) > _MOST_CLASSES:
        shown = np.sort(there[np.argsort(rights[largest][there] / sizes[there], kind="stable")[:_WORST]])
    place_of = np.full(count, len(shown))  # all others in one column
    place_of[shown] = np.arange(len(shown))
    return {
        "names": [names[number] for number in shown.tolist()],
        "sizes": sizes[shown].tolist(),
        "all": len(there),
        "points": [
            {
                "right": rights[number][shown].astype(int).tolist(),
                "matrix": _matrix(table, place_of, len(shown)),
                "confusions": _confusions(table, names, sizes),
            }
            for number, table in enumerate(tables)
        ],
    }


_Pairs = tuple[Any, Any, Any]
"""Arrays: labels, what the model took them for, and of how many images."""


def _matrix(table: _Pairs, place_of: Any, count: int) -> list[list[int]]:
    """Images by label and answer; the last column is of all answers that have none of their own."""
    found = np.zeros((count + 1, count + 1), dtype=int)
    np.add.at(found, (place_of[table[0]], place_of[table[1]]), table[2])
    return [[int(value) for value in row] for row in found[:count]]


def _confusions(table: _Pairs, names: Sequence[str], sizes: Any) -> list[list[Any]]:
    """The mistakes made most often: label, answer, images, and their share of the images of that label."""
    true, taken, times = (part[table[0] != table[1]] for part in table)
    order = np.argsort(-times, kind="stable")[:_CONFUSIONS].tolist()
    return [[names[true[n]], names[taken[n]], int(times[n]), round(float(times[n] / sizes[true[n]]), 4)] for n in order]


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
    """The curves of a run's log: by optimizer step and by hours of training, validation not counted.

    A log may have been cut short, or written by another version: what of it is no number is left out.
    """
    if run.folder is None:
        return None
    try:
        steps, epochs = read_rows(run.folder, "step"), read_rows(run.folder, "epoch")
    except (OSError, ValueError):  # the sweep is worth as much without it
        return None
    lasted = [row for row in epochs if _is_number(row.get("step")) and _is_number(row.get("train_seconds"))]
    ends = [0, *(row["step"] for row in lasted)]
    hours = np.cumsum([0.0, *(row["train_seconds"] / 3600 for row in lasted)])

    def curve(rows: Sequence[dict[str, Any]], key: str, smoothing: float = 0.0) -> dict[str, list[float]]:
        known = [row for row in rows if _is_number(row.get("step")) and _is_number(row.get(key))]
        values: list[float] = []
        for row in known:
            values.append(smoothing * values[-1] + (1 - smoothing) * row[key] if values else row[key])
        at = np.unique(np.linspace(0, len(known) - 1, min(len(known), _MAX_POINTS)).round().astype(int)).tolist()
        places = [known[number]["step"] for number in at]
        return {
            "steps": places,
            "hours": [round(float(hour), 6) for hour in np.interp(places, ends, hours)],
            "values": [round(float(values[number]), 5) for number in at],
        }

    curves = {
        "loss": curve(steps, "loss", _SMOOTHING),
        "val_loss": curve(epochs, "val_loss"),
        "top1": curve(epochs, "top1"),
    }
    return curves if any(one["steps"] for one in curves.values()) else None


def _is_number(value: Any) -> bool:
    """One that can be drawn: a step that was skipped has no loss, and one that diverged may have an infinite one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
