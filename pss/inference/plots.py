"""Pictures of results."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pss.inference.text import shortened

# Okabe and Ito's palette: told apart by people with any colour vision, and in grey by the markers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LONGEST = 44  # characters of a name
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def plot_sweep(rows: Sequence[dict[str, Any]]) -> bytes:
    """Top-1 against throughput and against GFLOPs, one line per run, one labelled point per rho: a PNG.

    `rows` are those of `rho.json`: `run`, `rho`, `top1`, `gflops`, `images_per_second`.
    """
    # Small models cost so little that GFLOPs would be all zeros.
    in_mega = max(row["gflops"] for row in rows) < 0.1
    rows = [row | {"cost": row["gflops"] * (1000 if in_mega else 1)} for row in rows]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    speed, cost = figure.subplots(1, 2, sharey=True)
    runs = list(dict.fromkeys(row["run"] for row in rows))
    for axes, key, label in (
        (speed, "images_per_second", "images per second, model alone"),
        (cost, "cost", f"{'M' if in_mega else 'G'}FLOPs (multiply-accumulates) per image"),
    ):
        for number, run in enumerate(runs):
            points = sorted((row for row in rows if row["run"] == run), key=lambda row: float(row["rho"] or 0))
            _draw_run(axes, points, key, number)
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.4g}" if value < 1000 else f"{value:,.0f}")
        )
        axes.grid(alpha=0.25, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.08, y=0.1)
    speed.set_ylabel("top-1 accuracy, %")
    _name(cost, runs)
    figure.suptitle("Accuracy against cost as ρ, the share of patches kept, varies", fontsize=12)
    return _png(figure)


def plot_training(rows: Sequence[dict[str, Any]]) -> bytes:
    """A run's losses and accuracy over its epochs, and the accuracy over its hours: a PNG.

    `rows` are those of `log.jsonl` of the kind `epoch`; what a row has none of is left out. Raises `ValueError` where
    there is no row.
    """
    if not rows:
        raise ValueError("log.jsonl holds no epoch yet; draw its curves once one is over")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    losses, scores, hours = figure.subplots(1, 3)
    seconds = list(itertools.accumulate(row["train_seconds"] for row in rows))
    per, unit = (3600, "hours") if seconds[-1] >= 3600 else (60, "minutes")
    epochs = [row["epoch"] for row in rows]
    times = [value / per for value in seconds]
    for axes, xs, keys in (
        (losses, epochs, {"loss": "training", "val_loss": "validation"}),
        (scores, epochs, {"top1": "weights", "ema_top1": "their average"}),
        (hours, times, {"top1": "weights", "ema_top1": "their average"}),
    ):
        for number, (key, name) in enumerate(keys.items()):
            ys = [row.get(key) for row in rows]
            if any(y is not None for y in ys):
                shown = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
                marker = _MARKERS[number] if len(shown) <= 30 else ""
                axes.plot(*zip(*shown, strict=True), color=_COLOURS[number], marker=marker, markersize=4, label=name)
        axes.grid(alpha=0.25, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    losses.set(xlabel="epoch", ylabel="cross entropy")
    scores.set(xlabel="epoch", ylabel="top-1 accuracy, %")
    hours.set(xlabel=f"{unit} of training", ylabel="top-1 accuracy, %")
    for axes in (losses, scores):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _png(figure)


def plot_cascade(found: dict[str, Any]) -> bytes:
    """Top-1 against the mean cost of an image: single ρ, cascades fitted to several costs, and the one chosen; a PNG.

    `found` is what `cascade.json` holds.
    """
    per, unit = (1e3, "million") if max(one["gmacs"] for one in found["singles"]) < 0.1 else (1.0, "billion")
    figure = Figure(figsize=(6.6, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate((("a single ρ", found["singles"]), ("cascades", found["frontier"]))):
        xs, ys = [per * point["gmacs"] for point in points], [point["top1"] for point in points]
        style: dict[str, Any] = {"color": _COLOURS[number], "marker": _MARKERS[number], "markersize": 5}
        axes.plot(xs, ys, linewidth=1.8, label=name, **style)
    for point in found["singles"]:
        place: dict[str, Any] = {"xytext": (3, -12), "textcoords": "offset points"}
        axes.annotate(
            f"{point['rho']:g}", (per * point["gmacs"], point["top1"]), color=_COLOURS[0], fontsize=8, **place
        )
    rhos = " → ".join(f"{stage['rho']:g}" for stage in found["stages"])
    axes.errorbar(
        [per * found["gmacs"]],
        [found["top1"]],
        yerr=[found["top1_error"]],
        color=_COLOURS[6],
        marker="*",
        markersize=13,
        capsize=3,
        linestyle="none",
        label=f"ρ {rhos} (± standard error)",
    )
    axes.set(xlabel=f"{unit} multiply-accumulates of an image, on average", ylabel="top-1 accuracy, %")
    axes.set_title(f"A cascade against single ρ, on {found['images']:,} images", fontsize=12)
    axes.grid(alpha=0.25, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.08)
    axes.legend(frameon=False, loc="lower right")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")  # a box is drawn for it
        figure.savefig(picture, dpi=150, format="png")
    return picture.getvalue()


def _name(axes: Axes, runs: Sequence[str]) -> None:
    """The legend. Names are text there: no formulas between dollar signs, and none is left out for its underscore."""
    legend = axes.legend(axes.lines, [f"run {number}" for number in range(len(runs))], frameon=False, loc="lower right")
    for text, run in zip(legend.get_texts(), runs, strict=True):
        text.set_parse_math(False)
        text.set_text(shortened(run, _LONGEST))


def _draw_run(axes: Axes, points: Sequence[dict[str, Any]], key: str, number: int) -> None:
    colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
    xs, ys = [point[key] for point in points], [point["top1"] for point in points]
    axes.plot(xs, ys, color=colour, marker=marker, markersize=5.5, linewidth=1.8)
    # Labels go above the upper curves and below the lower ones, and apart where two points nearly coincide, so that
    # they do not overprint each other.
    height, align = (7, "bottom") if number % 2 == 0 else (-8, "top")
    near = 0.03 * (max(xs) - min(xs))
    for place, (point, x, y) in enumerate(zip(points, xs, ys, strict=True)):
        crowded = place > 0 and abs(x - xs[place - 1]) < near
        shift = 0 if not crowded else 14 if x >= xs[place - 1] else -14
        rho = "as trained" if point["rho"] is None else f"{point['rho']:g}"
        label = f"ρ {rho}" if point is points[-1] and point["rho"] is not None else rho
        options: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": align}
        axes.annotate(label, (x, y), xytext=(shift, height), fontsize=8, color=colour, **options)
