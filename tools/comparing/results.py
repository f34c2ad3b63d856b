"""What a comparison found: means, deviations, differences to the reference by seed, and the tables."""

from __future__ import annotations

import csv
import io
import math
import statistics
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.benchmarks.measure import table, told

Result = dict[str, Any]
Line = dict[str, Any]

COLUMNS = {"epochs": "At equal epochs", "time": "At equal training time"}

# 97.5 % quantiles of Student's t by degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def half_width(values: Sequence[float]) -> float | None:
    """Of the 95 % confidence interval of a mean, by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    quantile = _T[min(len(values) - 2, len(_T) - 1)]
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds; None for fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def line(column: str, arm: str, by_seed: dict[int, Line], reference: dict[int, Line]) -> Line:
    """An arm in a column: what its seeds come to, and how they differ from the reference's of the same seed."""
    seeds = sorted(by_seed)
    top1 = [by_seed[seed]["points"][0]["top1"] for seed in seeds]
    differences = [by_seed[seed]["points"][0]["top1"] - reference[seed]["points"][0]["top1"] for seed in seeds]
    seconds = [by_seed[seed]["seconds"] for seed in seeds]
    ratios = [by_seed[seed]["seconds"] / reference[seed]["seconds"] for seed in seeds]
    return {
        "column": column,
        "arm": arm,
        "seeds": seeds,
        "point": by_seed[seeds[0]]["points"][0]["point"],
        "top1": top1,
        "top1_mean": statistics.fmean(top1),
        "top1_deviation": deviation(top1),
        "difference_mean": statistics.fmean(differences),
        "difference_half_width": half_width(differences),
        "epochs": [by_seed[seed]["epochs"] for seed in seeds],
        "own_epochs": [by_seed[seed]["own_epochs"] for seed in seeds],
        "seconds": seconds,
        "time_ratio": ratios,
        "time_ratio_mean": statistics.fmean(ratios),
        "gflops": [by_seed[seed]["points"][0]["gflops"] for seed in seeds],
        "gflops_backbone": [by_seed[seed]["points"][0]["gflops_backbone"] for seed in seeds],
        "gflops_extra": [by_seed[seed]["points"][0]["gflops_extra"] for seed in seeds],
        "training": by_seed[seeds[0]]["training"],
    }


def _plus_minus(mean: float, spread: float | None, form: str) -> str:
    return f"{mean:{form}}" + ("" if spread is None else f" ± {spread:{form.lstrip('+')}}")


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _length(values: Line) -> str:
    """Epochs in all and, where an arm starts from another, its own."""
    own = "" if values["own_epochs"] == values["epochs"] else f", {_range(values['own_epochs'])} its own"
    return _range(values["epochs"]) + own


def _costs(values: Sequence[float], unit: float) -> str:
    return f"{statistics.fmean(values) * unit:.3g}"


def markdown(result: Result) -> str:
    """The report: both columns, the models, what was published elsewhere, and what all this does not show."""
    lines: list[Line] = result["lines"]
    reference, seeds = result["reference"], result["seeds"]
    # Small models cost so little that GFLOPs would be all zeros.
    small = max(max(one["gflops"]) for one in lines) < 0.1
    unit, name = (1e3, "MFLOPs") if small else (1.0, "GFLOPs")
    told_settings = f"; {', '.join(result['settings'])}" if result["settings"] else ""
    pages = [
        f"# {' · '.join(dict.fromkeys(one['arm'] for one in lines))}",
        "",
        f"`pss-train {result['recipe']}` on {result['num_images']:,} images, seeds {', '.join(map(str, seeds))}"
        f"{told_settings}. Made by `{result['command']}`.",
        told(result),
        "",
        "Top-1 on the validation split, mean ± standard deviation over seeds; beside it the difference to "
        f"{reference} with the same seed, mean ± half of its 95 % confidence interval (Student's t). Time is that of "
        "training alone, with what an arm starts from and its teacher. Costs are multiply-accumulates of an image.",
    ]
    for column, title in COLUMNS.items():
        rows = []
        for one in (one for one in lines if one["column"] == column):
            minutes = [seconds / 60 for seconds in one["seconds"]]
            difference = "–" if one["arm"] == reference else (
                _plus_minus(one["difference_mean"], one["difference_half_width"], "+.2f")
            )  # fmt: skip
            rows.append(
                " | ".join(
                    [
                        one["arm"],
                        _plus_minus(one["top1_mean"], one["top1_deviation"], ".2f"),
                        difference,
                        _length(one),
                        _plus_minus(statistics.fmean(minutes), deviation(minutes), ".2f"),
                        f"{one['time_ratio_mean']:.3f}",
                        f"{one['training']['all'] * unit:.3g}",
                        f"{one['training']['pflops']:.3g}",
                    ]
                )
            )
        head = (
            f"method | top-1 % | to {reference} | epochs | minutes | of {reference} | {name} an image, trained | "
            "PFLOPs in all"
        )
        pages += ["", f"## {title}", "", *table(head, rows)]
    rows = []
    for one in (one for one in lines if one["column"] == "epochs"):
        speeds = result["speeds"][one["arm"]][0]
        rate, wait = speeds["images_per_second"], speeds["latency_ms"]
        rows.append(
            " | ".join(
                [
                    one["arm"],
                    "as trained" if one["point"] is None else f"{one['point']:g}",
                    f"{result['parameters'][one['arm']] / 1e6:.3g}",
                    _costs(one["gflops_backbone"], unit),
                    _costs(one["gflops_extra"], unit),
                    _costs(one["gflops"], unit),
                    f"{rate[0]:,.0f} ({rate[1]:,.0f}–{rate[2]:,.0f})",
                    f"{wait[0]:.3g} ({wait[1]:.3g}–{wait[2]:.3g})",
                ]
            )
        )
    head = (
        f"method | at | M parameters | {name}, backbone | extra parts | total | images/s, batches of "
        f"{result['batch_size']} | ms, one image"
    )
    pages += ["", "## The models", "", "Speeds are medians of interleaved rounds, with the smallest and the largest."]
    pages += ["", *table(head, rows)]
    if published := result.get("published"):
        pages += ["", "## Published elsewhere", "", published["note"], ""]
        columns = list(published["rows"][0])
        pages += table(" | ".join(columns), (" | ".join(str(row[key]) for key in columns) for row in published["rows"]))
    pages += ["", "## What these numbers do not show", "", *(f"- {one}" for one in limits(result))]
    return "\n".join(pages)


def limits(result: Result) -> list[str]:
    """What must not be concluded, as the comparison was made."""
    found, seeds = [], len(result["seeds"])
    if result["num_images"] < 1_000_000:
        found.append(
            f"Anything about ImageNet: {result['num_images']:,} images of {result['img_size']} px and models of "
            f"{max(result['parameters'].values()) / 1e6:.2g} M parameters rank methods otherwise than large ones may."
        )
    if seeds < 5:
        found.append(
            f"Small differences: {seeds} seed{'s' * (seeds != 1)} tell only those that are far larger than the spread."
        )
    else:
        found.append("Differences whose interval holds 0: with these seeds, chance alone makes them.")
    found.append(
        "The best that each method can do: all have the recipe's settings and their published or default ones, and "
        "none was tuned here; as many comparisons as rows also make it likelier that one looks good by chance."
    )
    if result["environment"]["device"] == "cpu":
        found.append("Speed on a GPU: masks, gathers and short sequences cost there what they do not cost on a CPU.")
    found.append("Other machines: times and rates are this one's, which others use too.")
    return found


def as_csv(result: Result) -> str:
    """One row for each arm, column and seed."""
    rows = []
    for one in result["lines"]:
        for number, seed in enumerate(one["seeds"]):
            row = {"column": one["column"], "arm": one["arm"], "seed": seed, "point": one["point"]}
            names = (
                "top1",
                "epochs",
                "own_epochs",
                "seconds",
                "time_ratio",
                "gflops",
                "gflops_backbone",
                "gflops_extra",
            )
            row |= {name: one[name][number] for name in names}
            row |= {f"training_gflops_{name}": value for name, value in one["training"].items() if name != "pflops"}
            row |= {"training_pflops": one["training"]["pflops"], "parameters": result["parameters"][one["arm"]]}
            rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_published(path: Path) -> Result:
    """Rows from elsewhere: a TOML file with `note`, which says where they are from, and tables `[[rows]]`.

    Raises:
        ValueError: naming the file and what it lacks.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--published {path} cannot be read ({error}); name a TOML file") from None
    rows = raw.get("rows")
    alike = (
        isinstance(rows, list) and rows and all(isinstance(row, dict) and row.keys() == rows[0].keys() for row in rows)
    )
    if not alike or not isinstance(raw.get("note"), str):
        raise ValueError(
            f"--published {path} needs a note, which says where its figures are from, and [[rows]] of equal keys"
        )
    return {"note": raw["note"], "rows": rows}
