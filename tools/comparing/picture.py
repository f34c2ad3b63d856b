"""The picture of a comparison: accuracy against training time, and against the rate of inference."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from pss.inference.plots import series_style
from tools.comparing.lines import COLUMNS, total_seconds


def draw(result: dict[str, Any]) -> bytes:
    """A PNG. An arm is a colour and a marker; filled at equal epochs, hollow at equal time; seeds are small."""
    arms = list(dict.fromkeys(line["arm"] for line in result["lines"]))
    most = max(total_seconds(run) for run in result["runs"])
    unit, per = time_unit(most)
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    by_time, by_rate = figure.subplots(1, 2)
    reference = result["plan"]["reference"]
    for line in result["lines"]:
        number, filled, first = arms.index(line["arm"]), line["column"] == "epochs", line["points"][0]
        if line["arm"] == reference and not filled:
            continue  # the same runs
        runs = [run for run in result["runs"] if (run["column"], run["arm"]) == (line["column"], line["arm"])]
        style = _style(number, filled)
        seeds = [run["points"][0]["top1"] for run in runs]
        times = [total_seconds(run) / per for run in runs]
        _point(by_time, times, seeds, first["top1"], (min(times), statistics.fmean(times), max(times)), style)
        rates = [statistics.median(_rates(run["points"][0])) for run in runs]
        _point(by_rate, rates, seeds, first["top1"], first["images_per_second"], style)
        if filled and len(line["points"]) > 1:
            along = sorted(
                (point["point"], point["images_per_second"][1], point["top1"].mean) for point in line["points"]
            )
            _, xs, ys = zip(*along, strict=True)
            by_rate.plot(xs, ys, **(style | {"markersize": 4.5}), linewidth=1, alpha=0.6, zorder=1)
    by_time.set_xlabel(f"{unit} of training, with pre-training and teacher")
    by_rate.set_xlabel("images per second, model alone; thin lines: other operating points")
    by_rate.set_xscale("log")
    by_rate.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    by_rate.xaxis.set_minor_locator(NullLocator())
    by_rate.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    by_time.set_xlim(left=0)
    for axes in (by_time, by_rate):
        axes.set_ylabel("top-1 accuracy, %")
        axes.grid(alpha=0.25, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.08, y=0.1)
    marks = [Line2D([], [], label=arm, linewidth=1, **_style(number, True)) for number, arm in enumerate(arms)]
    grey = {"color": "#666666", "marker": "o", "linestyle": "", "markersize": 8}
    fills = {"epochs": {}, "time": {"markerfacecolor": "white", "markeredgewidth": 1.6}}
    there = {line["column"] for line in result["lines"]}
    marks += [Line2D([], [], label=COLUMNS[of], **grey, **fill) for of, fill in fills.items() if of in there]
    marks.append(Line2D([], [], label="one seed", **(grey | {"markersize": 3.5, "alpha": 0.5})))
    figure.legend(handles=marks, loc="outside right center", frameon=False)
    spread = (
        "\nwhiskers: ± one standard deviation over seeds; range of times, quartiles of rates"
        if len(result["plan"]["seeds"]) > 1
        else ""
    )
    figure.suptitle(f"{result['title']}{spread}", fontsize=11)
    return as_png(figure)


def time_unit(seconds: float) -> tuple[str, int]:
    """In which times of up to so many seconds are drawn, and how many seconds it has."""
    return ("hours", 3600) if seconds > 7200 else ("minutes", 60) if seconds > 120 else ("seconds", 1)


def as_png(figure: Figure) -> bytes:
    """A picture, as it is written."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    return picture.getvalue()


def _style(number: int, filled: bool) -> dict[str, Any]:
    style = series_style(number, black_first=True)
    face = style["color"] if filled else "white"
    return style | {"markersize": 8.5, "markerfacecolor": face, "markeredgewidth": 1.6}


def _rates(point: dict[str, Any]) -> list[float]:
    return [point["images"] / seconds for seconds in point["seconds_batch"]]


def _point(
    axes: Axes,
    xs: Sequence[float],
    ys: Sequence[float],
    top1: Any,
    across: tuple[float, float, float],
    style: dict[str, Any],
) -> None:
    """Seeds, and their mean with whiskers; `across` is where those along x begin, the point, and where they end."""
    low, middle, high = across
    small = {"markersize": 4, "markeredgewidth": 0.8, "alpha": 0.5}
    style = style | {"linestyle": ""}
    axes.plot(xs, ys, **(style | small), zorder=2)
    axes.errorbar(
        middle, top1.mean, yerr=top1.deviation, xerr=[[middle - low], [high - middle]], capsize=3, linewidth=1.2,
        zorder=3, **style,
    )  # fmt: skip
