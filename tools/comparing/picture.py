"""Accuracy against training time, and against what the trained models reach."""

from __future__ import annotations

import io
import statistics
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Okabe and Ito's palette: told apart by people with any colour vision, and in grey by the markers.
_COLOURS = ("#000000", "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_COLUMNS = {"epochs": "full", "time": "none"}


def draw(result: dict[str, Any]) -> bytes:
    """A PNG: left what was trained by its time, in both columns, right all operating points by images a second."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    arms = list(dict.fromkeys(line["arm"] for line in result["lines"]))
    for line in result["lines"]:
        number = arms.index(line["arm"])
        minutes = [seconds / 60 for seconds in line["seconds"]]
        _point(left, minutes, line["top1"], number, _COLUMNS[line["column"]])
    for number, arm in enumerate(arms):
        points = result["points"][arm]
        rates = [speed["images_per_second"] for speed in result["speeds"][arm]]
        order = sorted(range(len(points)), key=lambda place: rates[place][0])
        style = {"color": _colour(number), "alpha": 0.6, "linewidth": 1}
        right.plot([rates[at][0] for at in order], [points[at]["top1_mean"] for at in order], **style)
        for at in order:
            low, high = rates[at][0] - rates[at][1], rates[at][2] - rates[at][0]
            right.errorbar(
                rates[at][0],
                points[at]["top1_mean"],
                xerr=[[low], [high]],
                yerr=points[at]["top1_deviation"] or 0,
                fmt=_marker(number),
                color=_colour(number),
                markersize=9 if at == 0 else 4,
                elinewidth=0.8,
                zorder=3,
            )
    left.set_xlabel("minutes of training in all, mean of the seeds")
    left.set_ylabel("top-1 accuracy, %")
    right.set_xlabel(f"images per second, batches of {result['batch_size']}, model alone")
    for axes in (left, right):
        axes.grid(alpha=0.25, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.08, y=0.1)
    columns = [
        Line2D([], [], marker="o", color="0.3", linestyle="", fillstyle="full", label="equal epochs"),
        Line2D([], [], marker="o", color="0.3", linestyle="", fillstyle="none", label="equal training time"),
        Line2D([], [], marker=".", color="0.6", linestyle="", label="one seed"),
    ]
    left.legend(handles=columns, frameon=False, loc="best", fontsize=9)
    names = [
        Line2D([], [], marker=_marker(number), color=_colour(number), linestyle="", label=arm)
        for number, arm in enumerate(arms)
    ]
    figure.legend(handles=names, frameon=False, loc="outside right center")
    seeds = len(result["seeds"])
    figure.suptitle(
        f"{result['recipe']}: accuracy against training time, and against speed ({seeds} seeds)", fontsize=12
    )
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    return picture.getvalue()


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _marker(number: int) -> str:
    return _MARKERS[number % len(_MARKERS)]


def _point(axes: Axes, across: list[float], up: list[float], number: int, fill: Any) -> None:
    """The mean with the standard deviation of the seeds, over the seeds themselves."""
    colour = _colour(number)
    axes.plot(across, up, ".", color=colour, alpha=0.35, markersize=5, zorder=2)
    axes.errorbar(
        statistics.fmean(across),
        statistics.fmean(up),
        yerr=statistics.stdev(up) if len(up) > 1 else 0,
        fmt=_marker(number),
        fillstyle=fill,
        color=colour,
        markersize=9,
        elinewidth=1,
        capsize=3,
        zorder=3,
    )
