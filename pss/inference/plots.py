"""Pictures of results."""

from __future__ import annotations

import io
import itertools
import re
import statistics
import warnings
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pss.inference.text import shortened

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette: told apart by people with any colour vision, and in grey by the markers."""
_LONGEST = 44  # characters of a name
_COLUMNS, _CHANGES = 400, 1000  # of a picture over the steps of a run: averages, and single steps
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":", "-.")
_LABELLED = 5
"""More runs than this are drawn without labels at their points, which would overprint each other."""


def series_style(number: int, *, black_first: bool = False) -> dict[str, Any]:
    """How series `number` of a picture is drawn: `color`, `marker` and `linestyle`, no two alike among 28.

    With `black_first`, black is the first series', which the others are compared with.
    """
    colours = COLOURS[-1:] + COLOURS[:-1] if black_first else COLOURS
    turn = number // len(colours)  # another marker and other dashes for each round of colours
    return {
        "color": colours[number % len(colours)],
        "marker": _MARKERS[(number + turn) % len(_MARKERS)],
        "linestyle": _DASHES[turn % len(_DASHES)],
    }


def plot_sweep(rows: Sequence[dict[str, Any]]) -> bytes:
    """Top-1 against throughput and against GFLOPs, one line per run, one labelled point per rho: a PNG.

    Runs whose names differ in their seed alone are one line, of their means; bars are their standard deviation in
    top-1, and the slowest and the fastest round of the rates.

    `rows` are those of `rho.json`: `run`, `rho`, `top1`, `gflops`, `images_per_second`, and how far the latter range.
    """
    rows = over_seeds(rows)
    # Small models cost so little that GFLOPs would be all zeros.
    in_mega = max(row["gflops"] for row in rows) < 0.1
    scale = 1000 if in_mega else 1
    for row in rows:
        ends = {end: row.get(f"gflops{end}") for end in ("", "_low", "_high")}
        row |= {f"cost{end}": None if value is None else scale * value for end, value in ends.items()}
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    speed, cost = figure.subplots(1, 2, sharey=True)
    runs = list(dict.fromkeys(row["run"] for row in rows))
    for axes, key, label in (
        (speed, "images_per_second", "images per second, model alone"),
        (cost, "cost", f"{'M' if in_mega else 'G'}FLOPs (multiply-accumulates) per image"),
    ):
        for number, run in enumerate(runs):
            points = sorted((row for row in rows if row["run"] == run), key=lambda row: float(row["rho"] or 0))
            _draw_run(axes, points, key, number, labelled=len(runs) <= _LABELLED)
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.4g}" if value < 1000 else f"{value:,.0f}")
        )
        axes.grid(alpha=0.25, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.08, y=0.1)
    speed.set_ylabel("top-1 accuracy, %")
    _name(figure, cost, runs)
    figure.suptitle("Accuracy against cost as ρ, the share of patches kept, varies", fontsize=12)
    return _png(figure)


_SEED = re.compile(r"[-_./ ]?\bseed[-_=]?\d+|[-_./ ]seed[-_=]?\d+", re.IGNORECASE)
_RANGING = ("images_per_second", "gflops")


def over_seeds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of runs whose names differ in a seed (`…seed3`) alone as one: means, and `top1_std` of several."""
    groups: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((_SEED.sub("", row["run"]) or row["run"], row["rho"]), []).append(row)
    merged = []
    for (name, _), own in groups.items():
        if len(own) == 1:
            merged.append(dict(own[0]))
            continue
        one = {**own[0], "run": f"{name} ({len(own)} seeds)", "top1": statistics.fmean(row["top1"] for row in own)}
        one["top1_std"] = statistics.stdev(row["top1"] for row in own)
        for key in _RANGING:
            one[key] = statistics.fmean(row[key] for row in own)
            for end, of in (("_low", min), ("_high", max)):
                known = [row[key + end] for row in own if row.get(key + end) is not None]
                one[key + end] = of(known) if known else None
        merged.append(one)
    return merged


def plot_training(rows: Sequence[dict[str, Any]]) -> bytes:
    """A run's losses and accuracy over its epochs, and the accuracy over its hours: a PNG.

    `rows` are those of `log.jsonl` of the kind `epoch`; what a row has none of is left out. A run without a
    validation split has its loss alone, over epochs and hours. Raises `ValueError` where there is no row.
    """
    if not rows:
        raise ValueError("log.jsonl holds no epoch yet; draw its curves once one is over")
    validated = any("top1" in row for row in rows)
    figure = Figure(figsize=(11 if validated else 7.5, 4.2), layout="constrained")
    losses, *others = figure.subplots(1, 3 if validated else 2)
    seconds = list(itertools.accumulate(row["train_seconds"] for row in rows))
    per, unit = (3600, "hours") if seconds[-1] >= 3600 else (60, "minutes")
    epochs = [row["epoch"] for row in rows]
    times = [value / per for value in seconds]
    loss_keys, score_keys = (
        {"loss": "training", "val_loss": "validation"},
        {"top1": "weights", "ema_top1": "their average"},
    )
    hours = others[-1]
    drawn: list[tuple[Axes, list[Any], dict[str, str]]] = [(losses, epochs, loss_keys)]
    drawn += [(scores, epochs, score_keys) for scores in others[:-1]]
    drawn.append((hours, times, score_keys if validated else loss_keys))
    for axes, xs, keys in drawn:
        for number, (key, name) in enumerate(keys.items()):
            ys = [row.get(key) for row in rows]
            if any(y is not None for y in ys):
                shown = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
                marker = _MARKERS[number] if len(shown) <= 30 else ""
                axes.plot(*zip(*shown, strict=True), color=COLOURS[number], marker=marker, markersize=4, label=name)
        axes.grid(alpha=0.25, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    losses.set(xlabel="epoch", ylabel="cross entropy")
    hours.set(xlabel=f"{unit} of training", ylabel="top-1 accuracy, %" if validated else "cross entropy")
    for scores in others[:-1]:
        scores.set(xlabel="epoch", ylabel="top-1 accuracy, %")
    for axes in (losses, *others[:-1]):
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
        style: dict[str, Any] = {"color": COLOURS[number], "marker": _MARKERS[number], "markersize": 5}
        axes.plot(xs, ys, linewidth=1.8, label=name, **style)
    for point in found["singles"]:
        place: dict[str, Any] = {"xytext": (3, -12), "textcoords": "offset points"}
        axes.annotate(f"{point['rho']:g}", (per * point["gmacs"], point["top1"]), color=COLOURS[0], fontsize=8, **place)
    rhos = " → ".join(f"{stage['rho']:g}" for stage in found["stages"])
    axes.errorbar(
        [per * found["gmacs"]],
        [found["top1"]],
        yerr=[found["top1_error"]],
        color=COLOURS[6],
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


def plot_plan(
    rhos: Sequence[float], rates: Sequence[tuple[int, float, float]], *, steps_per_epoch: int, title: str
) -> bytes:
    """A run before it is trained: ρ and the learning rate over all of it, and over its first epoch: a PNG.

    Args:
        rhos: of every step.
        rates: step, smallest and largest learning rate of the parameter groups, at some steps.
        steps_per_epoch: of the run.
        title: above the picture.
    """
    several = len(rhos) > steps_per_epoch
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes: Any = figure.subplots(2, 1 + several, sharex="col", sharey="row", squeeze=False)
    for column, (first, unit) in enumerate([(False, "epoch"), (True, "step of the first epoch")][: 1 + several]):
        last, per = (steps_per_epoch, 1) if first else (len(rhos), steps_per_epoch)
        upper, lower = axes[:, column]
        _draw_rhos(upper, rhos[:last], steps_per_epoch, per)
        shown = [rate for rate in rates if rate[0] < last]
        xs, lows, highs = [step / per for step, *_ in shown], [rate[1] for rate in shown], [rate[2] for rate in shown]
        if lows != highs:
            lower.fill_between(xs, lows, highs, color=COLOURS[1], alpha=0.2, linewidth=0)
        lower.plot(xs, highs, color=COLOURS[1], linewidth=1.8)
        lower.set(xlabel=unit, xlim=(0, last / per))
        if first:
            lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for part in axes.flat:
        part.grid(alpha=0.25, linewidth=0.7)
        part.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set(ylabel="ρ, share of patches kept", ylim=(0, 1.05))
    axes[1, 0].set_ylim(bottom=0)
    split = any(low != high for _, low, high in rates)
    axes[1, 0].set_ylabel("learning rate" + (", smallest to largest" if split else ""))
    axes[1, 0].ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    figure.suptitle(title, fontsize=12, parse_math=False)
    return _png(figure)


def _draw_rhos(axes: Axes, rhos: Sequence[float], steps_per_epoch: int, per: int) -> None:
    """ρ of every step, at step / `per`; where it changes too often for that, its range and mean, by epochs if there are
    many."""
    changes = [0, *(step for step in range(1, len(rhos)) if rhos[step] != rhos[step - 1])]
    if len(changes) <= _CHANGES:
        shown = [*(rhos[step] for step in changes), rhos[-1]]
        axes.step([step / per for step in (*changes, len(rhos))], shown, where="post", color=COLOURS[0])
        return
    columns = min(_COLUMNS, len(rhos) // steps_per_epoch)
    if columns < 20:
        columns = min(_COLUMNS, len(rhos))
    unit = steps_per_epoch if columns < _COLUMNS and len(rhos) >= 20 * steps_per_epoch else 1
    ends = [number * (len(rhos) // unit) // columns * unit for number in range(columns)] + [len(rhos)]
    parts = [rhos[begin:end] for begin, end in itertools.pairwise(ends)]
    xs = [end / per for end in ends]
    lows, highs, means = ([of(part) for part in parts] for of in (min, max, lambda part: sum(part) / len(part)))
    bounds = [*lows, lows[-1]], [*highs, highs[-1]]
    axes.fill_between(xs, *bounds, step="post", color=COLOURS[0], alpha=0.2, linewidth=0, label="range")
    label = "mean of an epoch" if unit > 1 else "mean"
    axes.step(xs, [*means, means[-1]], where="post", color=COLOURS[0], linewidth=1.6, label=label)
    axes.legend(frameon=False, loc="lower right", ncols=2)


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")  # a box is drawn for it
        figure.savefig(picture, dpi=150, format="png")
    return picture.getvalue()


def _name(figure: Figure, axes: Axes, runs: Sequence[str]) -> None:
    """The legend. Names are text there: no formulas between dollar signs, and none is left out for its underscore."""
    lines = [line for line in axes.lines if line.get_linestyle() != "None"]  # no caps of error bars
    names = [f"run {number}" for number in range(len(runs))]
    if len(runs) <= _LABELLED:
        legend = axes.legend(lines, names, frameon=False, loc="lower right")
    else:  # there would be curves below it
        legend = figure.legend(lines, names, frameon=False, loc="outside right center")
    for text, run in zip(legend.get_texts(), runs, strict=True):
        text.set_parse_math(False)
        text.set_text(shortened(run, _LONGEST))


def _draw_run(axes: Axes, points: Sequence[dict[str, Any]], key: str, number: int, *, labelled: bool) -> None:
    style = series_style(number)
    colour = style["color"]
    xs, ys = [point[key] for point in points], [point["top1"] for point in points]
    axes.plot(xs, ys, **style, markersize=5.5, linewidth=1.8)
    bars: dict[str, Any] = {"fmt": "none", "ecolor": colour, "elinewidth": 1, "capsize": 2.5, "alpha": 0.7}
    ranges = [(point[f"{key}_low"], point[f"{key}_high"]) for point in points if point.get(f"{key}_low") is not None]
    if len(ranges) == len(points):  # a mean need not lie between its 5th and its 95th percentile
        ends = [[max(0.0, x - low) for x, (low, _) in zip(xs, ranges, strict=True)]]
        ends.append([max(0.0, high - x) for x, (_, high) in zip(xs, ranges, strict=True)])
        axes.errorbar(xs, ys, xerr=ends, **bars)
    if any("top1_std" in point for point in points):
        axes.errorbar(xs, ys, yerr=[point.get("top1_std", 0.0) for point in points], **bars)
    if not labelled:
        return
    # Labels go above the upper curves and below the lower ones, and apart where two points nearly coincide, so that
    # they do not overprint each other.
    height, align = (7, "bottom") if number % 2 == 0 else (-8, "top")
    near = 0.03 * (max(xs) - min(xs))
    for place, (point, x, y) in enumerate(zip(points, xs, ys, strict=True)):
        crowded = place > 0 and abs(x - xs[place - 1]) < near
        shift = 0 if not crowded else 14 if x >= xs[place - 1] else -14
        shift += 13 * ("top1_std" in point)  # beside its bar
        rho = "as trained" if point["rho"] is None else f"{point['rho']:g}"
        label = f"ρ {rho}" if point is points[-1] and point["rho"] is not None else rho
        options: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": align}
        axes.annotate(label, (x, y), xytext=(shift, height), fontsize=8, color=colour, **options)
