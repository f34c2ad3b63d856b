"""What a study of schedules found: its lines, its page, and the picture of accuracy against time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pss.inference.plots import series_style
from tools.benchmarks.measure import table, told
from tools.comparing.page import csv_of, duration, interval
from tools.comparing.picture import as_png, time_unit
from tools.comparing.statistics import Mean, paired

Row = dict[str, Any]


def lines(runs: Sequence[Row], columns: Sequence[str], reference: str, rhos: Sequence[float], whole: Row) -> list[Row]:
    """One line for every column and arm.

    Args:
        runs: Of every column, arm and seed: `column`, `arm`, `seed`, `epochs`, `seconds`, `arithmetic` (in epochs of
            dense training) and `top1`, by rho.
        columns: Keys, in the order of the page.
        reference: The arm that the others are held against: its run of the same column and seed.
        rhos: Where accuracy is compared.
        whole: By seed, the reference's run of full length: what times and arithmetic are shares of.
    """
    made = []
    for column in columns:
        of_column = [run for run in runs if run["column"] == column]
        theirs = {run["seed"]: run for run in of_column if run["arm"] == reference}
        for arm in dict.fromkeys(run["arm"] for run in of_column):
            own = {run["seed"]: run for run in of_column if run["arm"] == arm}
            made.append(
                {
                    "column": column,
                    "arm": arm,
                    "epochs": [run["epochs"] for run in own.values()],
                    "seconds": Mean.of([run["seconds"] for run in own.values()]),
                    "time_of_dense": [run["seconds"] / whole[seed]["seconds"] for seed, run in own.items()],
                    "arithmetic_of_dense": statistics.fmean(
                        run["arithmetic"] / whole[seed]["arithmetic"] for seed, run in own.items()
                    ),
                    "top1": {rho: Mean.of([run["top1"][rho] for run in own.values()]) for rho in rhos},
                    "difference": {rho: _paired(own, theirs, rho) for rho in rhos},
                    "difference_to_whole": {rho: _paired(own, whole, rho) for rho in rhos},
                }
            )
    return made


def _paired(own: Row, theirs: Row, rho: float) -> Mean:
    return paired({seed: run["top1"][rho] for seed, run in own.items()},
                  {seed: theirs[seed]["top1"][rho] for seed in own})  # fmt: skip


def share_reached(points: Sequence[tuple[float, float]]) -> tuple[str, float] | None:
    """The smallest share of dense training's time at which an arm is not behind whole dense training.

    Args:
        points: Of runs of several lengths: share of the time, and accuracy less that of whole dense training.

    Returns:
        Whether it is the shortest run itself (`at most`), or was found between two runs on the straight line
        (`about`), and the share. None where even the longest is behind.
    """
    ordered = sorted(points)
    if not ordered:
        return None
    if ordered[0][1] >= 0:
        return "at most", ordered[0][0]
    for (before, behind), (after, ahead) in pairwise(ordered):
        if ahead >= 0:
            return "about", before + (after - before) * -behind / (ahead - behind)
    return None


def markdown(result: Row) -> str:
    """The whole page."""
    plan, rhos = result["plan"], result["rhos"]
    parts = [f"# {result['title']}", "", told(result), "", "```sh", result["command"], "```", ""]
    parts += [f"![{result['title']}](study.png)", ""]
    for column, name in result["columns"].items():
        own = [line for line in result["lines"] if line["column"] == column]
        parts += [f"## {name[0].upper()}{name[1:]}", "", _introduction(column, plan["reference"]), ""]
        top1 = " | ".join(f"top-1 % at ρ = {rho:g}" for rho in rhos)
        head = f"training | epochs | time | time, of dense | arithmetic, of dense | {top1}"
        parts += table(head, (" | ".join(_accuracy(line, rhos)) for line in own))
        others = [line for line in own if line["arm"] != plan["reference"]]
        head = "training | " + " | ".join(f"ρ = {rho:g}" for rho in rhos)
        parts += ["", "Against dense training at the same ρ, in points, paired by seed (95 % CI):", ""]
        parts += table(
            head, (" | ".join([line["arm"], *(interval(line["difference"][rho]) for rho in rhos)]) for line in others)
        )
        parts.append("")
    if reached := _reached(result):
        parts += ["## Time to the accuracy of dense training", "", _REACHED, ""]
        parts += table(
            "training | " + " | ".join(f"at ρ = {rho:g}" for rho in rhos),
            (" | ".join([arm, *shares]) for arm, shares in reached.items()),
        )
        parts.append("")
    notes = [f"`{name}`: {arm['note']}" for name, arm in plan["arms"].items() if arm["note"]]
    parts += ["## What was trained", "", *(f"* {note}" for note in notes), ""]
    parts += ["## What these numbers do not show", "", *(f"* {line}" for line in limits(result))]
    return "\n".join(parts) + "\n"


_REACHED = (
    "The smallest share of the time of a whole dense run after which training is, in the mean over seeds, as accurate "
    "as that run at the same ρ. Runs of several lengths were trained to their end; `about` lies between two of them "
    "on the straight line, and `at most` is the shortest one. A dash: not within the time of the longest."
)


def _introduction(column: str, reference: str) -> str:
    kind, _, share = column.partition("-")
    told = {
        "epochs": "Every arm is trained for as many epochs.",
        "time": f"Every arm is trained for the number of epochs whose time is nearest to that of the {reference} run"
        + (f" of {share} of the epochs." if share else "."),
        "arithmetic": f"Every arm is trained for the number of epochs whose arithmetic is nearest to that of the "
        f"{reference} run" + (f" of {share} of the epochs." if share else "."),
    }[kind]
    return f"{told} Means ± standard deviation over seeds; shares are of the whole {reference} run of the same seed."


def _accuracy(line: Row, rhos: Sequence[float]) -> list[str]:
    return [
        line["arm"],
        ", ".join(map(str, dict.fromkeys(line["epochs"]))),
        duration(line["seconds"]),
        Mean.of(line["time_of_dense"]).told(".2f"),
        f"{line['arithmetic_of_dense']:.2f}",
        *(line["top1"][rho].told(".2f") for rho in rhos),
    ]


def _reached(result: Row) -> dict[str, list[str]]:
    """For every arm whose runs have several lengths in time, what `share_reached` says at each rho."""
    timed = [line for line in result["lines"] if line["column"].partition("-")[0] == "time"]
    if len({line["column"] for line in timed}) < 2:
        return {}
    found = {}
    for arm in dict.fromkeys(line["arm"] for line in timed):
        shares = []
        for rho in result["rhos"]:
            points = [
                (Mean.of(line["time_of_dense"]).mean, line["difference_to_whole"][rho].mean)
                for line in timed
                if line["arm"] == arm
            ]
            reached = share_reached(points)
            shares.append("–" if reached is None else f"{reached[0]} {reached[1]:.2f}")
        found[arm] = shares
    return found


def limits(result: Row) -> list[str]:
    """What the numbers do not show, as the configuration has it."""
    plan, seeds = result["plan"], len(result["plan"]["seeds"])
    said = [
        f"{result['num_images']:,} training and {result['num_val_images']:,} validation images of "
        f"{result['num_classes']} classes, {result['img_size']} pixels; dense runs of {plan['epochs']} epochs. Longer "
        "runs on more images may rank the schedules otherwise.",
        "Settings that the arms share are those of the recipe; none was searched for any of them.",
        f"Times are those of {result['environment']['device']}, threads {result['environment']['threads']}, while runs "
        "took turns; what a schedule saves depends on the machine, the model and the batch.",
    ]
    if seeds == 1:
        said.append("One seed: there is no spread, and no difference here can be told from chance.")
    else:
        count = (len(plan["arms"]) - 1) * len(result["columns"]) * len(result["rhos"])
        said.append(
            f"The intervals take differences over {seeds} seeds for normally distributed, and are for one comparison "
            f"each; {count} are made, of which one in twenty leaves its interval by chance."
        )
    for column, name in result["columns"].items():
        own = [line for line in result["lines"] if line["column"] == column]
        if not column.startswith("time"):
            continue
        if missing := [arm for arm in plan["arms"] if arm not in {line["arm"] for line in own}]:
            said.append(f"{', '.join(missing)} cannot be trained in that time ({name}): even one epoch exceeds it.")
        given = next(Mean.of(line["time_of_dense"]).mean for line in own if line["arm"] == plan["reference"])
        off = {line["arm"]: Mean.of(line["time_of_dense"]).mean / given - 1 for line in own}
        if late := [f"{arm} {value:+.0%}" for arm, value in off.items() if abs(value) > 0.05]:
            said.append(f"Not all arms met the training time that they were given ({name}): {', '.join(late)}.")
    return said


def as_csv(result: Row) -> str:
    """A row for every column, arm and rho."""
    return csv_of([_flat(line, rho) for line in result["lines"] for rho in result["rhos"]])


def _flat(line: Row, rho: float) -> Row:
    top1, difference = line["top1"][rho], line["difference"][rho]
    return {
        "column": line["column"],
        "arm": line["arm"],
        "rho": rho,
        "epochs": " ".join(map(str, dict.fromkeys(line["epochs"]))),
        "seconds": line["seconds"].mean,
        "time_of_dense": Mean.of(line["time_of_dense"]).mean,
        "arithmetic_of_dense": line["arithmetic_of_dense"],
        "top1": top1.mean,
        "top1_sd": top1.deviation,
        "difference": difference.mean,
        "difference_ci95": difference.half_width,
    }


def draw(result: Row) -> bytes:
    """A PNG: accuracy against training time, of finished runs of every length, and during the longest."""
    arms = list(result["plan"]["arms"])
    styles = {arm: series_style(number, black_first=True) for number, arm in enumerate(arms)}
    kinds = {column.partition("-")[0] for column in result["columns"]}
    kind = next(one for one in ("time", "arithmetic", "epochs") if one in kinds)
    lines = [line for line in result["lines"] if line["column"].partition("-")[0] == kind]
    most = max(line["seconds"].mean for line in lines)
    unit, per = time_unit(most)
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    finished, during = figure.subplots(1, 2)
    rho = result["rhos"][0]
    for arm in arms:
        own = sorted((line for line in lines if line["arm"] == arm), key=lambda line: line["seconds"].mean)
        if not own:
            continue
        xs = [line["seconds"].mean / per for line in own]
        deviations = [line["top1"][rho].deviation or 0 for line in own]
        finished.errorbar(
            xs, [line["top1"][rho].mean for line in own], yerr=deviations, capsize=3, linewidth=1.4, markersize=6,
            label=arm, **styles[arm],
        )  # fmt: skip
        longest = own[-1]["column"]
        curves = [run["curve"] for run in result["runs"] if (run["column"], run["arm"]) == (longest, arm)]
        _curve(during, curves, per, styles[arm])
    finished.set_title("finished runs", fontsize=11)
    during.set_title("during the longest runs, after each epoch", fontsize=11)
    for axes, shown in ((finished, rho), (during, 1.0)):  # a run validates on all patches
        axes.set_ylabel(f"top-1 accuracy at ρ = {shown:g}, %")
        axes.set_xlabel(f"{unit} of training")
        axes.set_xlim(0, 1.04 * axes.dataLim.x1)
        axes.grid(alpha=0.25, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = finished.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    several = "\nmeans over seeds, whiskers: ± one standard deviation" if len(result["plan"]["seeds"]) > 1 else ""
    figure.suptitle(f"{result['title'].replace('`', '')}{several}", fontsize=12)
    return as_png(figure)


def _curve(axes: Axes, curves: Sequence[Sequence[tuple[float, float]]], per: float, style: Row) -> None:
    """The mean over seeds, up to the shortest of them: seeds may have different numbers of epochs."""
    if not curves:
        return
    points = list(zip(*(curve[: min(map(len, curves))] for curve in curves), strict=True))
    xs = [statistics.fmean(seconds for seconds, _ in one) / per for one in points]
    ys = [statistics.fmean(top1 for _, top1 in one) for one in points]
    axes.plot(xs, ys, linewidth=1.4, markersize=4, **style)
