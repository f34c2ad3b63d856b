"""Figures of the patch sampling paper (McDanel & Huynh 2022), from runs of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from itertools import accumulate

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from pss import recipes
from pss.inference.plots import COLOURS, plot_sweep, series_style
from pss.planning.plan import plan
from tools.benchmarks.measure import table as lines_of
from tools.comparing.picture import as_png
from tools.comparing.statistics import Mean
from tools.figures.figure import Figure, Source


def curves(source: Source) -> bytes:
    """Training loss, validation loss and top-1 against epochs and against minutes of training: means and range."""
    canvas = Canvas(figsize=(11, 9), layout="constrained")
    grid = canvas.subplots(3, 2, sharey="row")
    for row, (key, label) in enumerate(
        (("loss", "training loss"), ("val_loss", "validation loss"), ("top1", "top-1, %"))
    ):
        for number, arm in enumerate(source.shown):
            runs = [run for run in source.runs if run["arm"] == arm]
            values = list(zip(*([one[key] for one in run["log"]] for run in runs), strict=True))
            before = statistics.fmean(run["epochs_before"] for run in runs)
            epochs = [before + one["epoch"] for one in runs[0]["log"]]
            spent = [
                accumulate((one["train_seconds"] for one in run["log"]), initial=run["seconds_before"]) for run in runs
            ]
            minutes = [statistics.fmean(at) / 60 for at in zip(*spent, strict=True)][1:]
            for axes, xs in zip(grid[row], (epochs, minutes), strict=True):
                mean = [statistics.fmean(one) for one in values]
                style = series_style(number, black_first=True) | {"marker": ""}
                axes.plot(xs, mean, label=arm, linewidth=1.6, **style)
                low, high = [min(one) for one in values], [max(one) for one in values]
                axes.fill_between(xs, low, high, color=style["color"], alpha=0.15, linewidth=0)
        grid[row][0].set_ylabel(label)
    grid[2][0].set_xlabel("epochs, those before fine-tuning included")
    grid[2][1].set_xlabel("minutes of training")
    canvas.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return _saved(canvas, [axes for row in grid for axes in row])


def over_rho(source: Source, arms: Sequence[str] | None = None) -> bytes:
    """Accuracy against rate and arithmetic at each operating point: the first seed of the arms."""
    first, shown = source.result["plan"]["seeds"][0], source.shown if arms is None else arms
    own = [run for run in source.runs if run["seed"] == first and run["arm"] in shown]
    return plot_sweep([point | {"run": run["arm"]} for run in own for point in run["points"]])


def schedules(source: Source) -> bytes:
    """ρ of every step under each schedule that the package has, over the epochs of the comparison."""
    told = source.result["plan"]
    names = ("fixed", "linear", "cosine", "cyclic")
    canvas = Canvas(figsize=(11, 2.8), layout="constrained")
    row = canvas.subplots(1, len(names), sharey=True)
    for axes, name in zip(row, names, strict=True):
        settings = [*told["settings"], f"schedule.name={name}"]
        config = recipes.get(told["recipe"]).with_settings([*settings, f"train.epochs={max(4, told['epochs'])}"])
        rhos = plan(config, num_images=told["num_images"], num_classes=source.result["num_classes"]).rhos
        axes.step(range(len(rhos)), rhos, color=COLOURS[0], linewidth=1, where="post")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylim(0, 1.05)
    row[0].set_ylabel("ρ")
    return _saved(canvas, list(row))


def step_times(source: Source) -> bytes:
    """Milliseconds of a step over its stage, as the logs have them: every epoch of every seed a point."""
    canvas = Canvas(figsize=(8, 4.2), layout="constrained")
    axes = canvas.subplots()
    arms = source.shown
    for number, arm in enumerate(arms):
        found: dict[float, list[float]] = {}
        for run in (run for run in source.runs if run["arm"] == arm):
            for row in run["log"]:
                for stage, level in row["by_rho"].items():
                    found.setdefault(float(stage.split()[0]), []).append(level["ms_per_step"])
        shift = 0.008 * (number - len(arms) / 2)
        style = series_style(number, black_first=True)
        xs = [rho + shift for rho, times in found.items() for _ in times]
        ys = [one for times in found.values() for one in times]
        axes.plot(xs, ys, ".", color=style["color"], alpha=0.25, markersize=4)
        levels = sorted(found)
        medians = [statistics.median(found[rho]) for rho in levels]
        axes.plot([rho + shift for rho in levels], medians, markersize=5, linewidth=1.3, label=arm, **style)
    axes.set_xlabel("share of tokens that a step sees")
    axes.set_ylabel("milliseconds a step")
    axes.set_ylim(bottom=0)
    canvas.legend(loc="outside right center", frameon=False, fontsize=9)
    return _saved(canvas, [axes])


def cells(source: Source, names: Sequence[str], published: str) -> str:
    """Accuracy and training time of some arms, beside what was published of them."""
    rows = []
    for name in names:
        runs = [run for run in source.runs if run["arm"] == name]
        top1 = Mean.of([run["points"][0]["top1"] for run in runs]).told(".2f")
        minutes = Mean.of([run["seconds"] / 60 for run in runs]).told(".2f")
        rows.append(" | ".join([name, top1, minutes, *(f"{one:g}" for one in _PUBLISHED[name])]))
    return "\n".join(lines_of(f"arm | top-1 % | minutes | published: {published}", rows)) + "\n"


def table(source: Source) -> str:
    """The comparison's own page."""
    return (source.folder / "comparison.md").read_text(encoding="utf-8")


def _saved(canvas: Canvas, every: list[Axes]) -> bytes:
    for axes in every:
        axes.grid(alpha=0.25, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    return as_png(canvas)


_BOTH = ("pss", "dynamicvit")
_PUBLISHED = {
    "cell-fixed-random": (82.76, 15.1), "cell-linear-random": (83.24, 17.0), "cell-cyclic-random": (83.29, 17.0),
    "cell-fixed-magnitude": (83.09, 15.1), "cell-linear-magnitude": (83.27, 17.0),
    "cell-cyclic-magnitude": (83.46, 17.0),
    "bias-without": (80.1,), "bias-without-pss": (78.2,), "bias-with": (81.1,), "bias-with-pss": (80.4,),
}  # fmt: skip
"""On ImageNet-1k, by arm of sampling.toml: top-1, and the hours of table 1."""
_CELLS, _BIASES = (tuple(name for name in _PUBLISHED if name.startswith(group)) for group in ("cell", "bias"))
_TABLE = "mean ± standard deviation over seeds; published numbers in columns of their own"
_SEEDS = "mean of the seeds; the band is from the lowest to the highest"
FIGURES = (
    Figure((20, 30, 31, 32), "training_curves.png", "PSS figures 1 (left), 7, 8 and 9",
           "training loss, validation loss and top-1 against epochs and time", _SEEDS, curves),
    Figure((21, 27), "over_rho.png", "PSS figures 1 (right) and 6", "top-1 against images/s and GFLOPs as ρ varies",
           "the first seed; medians of interleaved rounds", over_rho),
    Figure((23,), "schedules.png", "PSS figure 3", "ρ of each step", "none: schedules are functions of the step",
           schedules),
    Figure((24,), "step_times.png", "PSS figure 4", "time of a step by the share of tokens it sees",
           "every epoch of every seed, with medians", step_times),
    Figure((28,), "comparison.md", "PSS table 2", "hours, GFLOPs, images/s and top-1 by method",
           "mean ± standard deviation over seeds, quartiles of speeds", table),
    Figure((34,), "pss_and_dynamicvit.png", "PSS figure 11", "one checkpoint of DynamicViT over ρ, beside one of PSS",
           "the first seed; medians of interleaved rounds", partial(over_rho, arms=_BOTH), _BOTH),
    Figure((25,), "pss_table1.md", "PSS table 1", "schedules and sorts", _TABLE,
           partial(cells, names=_CELLS, published="top-1 %, ViT-B | hours"), _CELLS),
    Figure((29,), "pss_table3.md", "PSS table 3", "relative position bias with and without the schedule", _TABLE,
           partial(cells, names=_BIASES, published="top-1 %, DeiT-S"), _BIASES),
)  # fmt: skip
