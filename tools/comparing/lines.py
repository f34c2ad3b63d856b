"""From measured runs to the lines of the table: one for every arm, in each of the two columns."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tools.benchmarks.measure import over, quartiles
from tools.comparing.statistics import Mean, paired

Row = dict[str, Any]

COLUMNS = {"epochs": "equal epochs", "time": "equal training time"}
"""What all arms have the same of."""


def lines(trained: Sequence[Row], reference: str) -> list[Row]:
    """One line for every column and arm, in the order of `trained`.

    Args:
        trained: For every column, arm and seed the run: `column`, `arm`, `seed`, `epochs`, `epochs_before`, `seconds`,
            `seconds_before`, and `points`, the rows of the evaluation, the first of them that of the main comparison.
        reference: The arm whose runs of the same seed the others are held against.
    """
    made = []
    by_arm: dict[tuple[str, str], dict[int, Row]] = {}
    for run in trained:
        by_arm.setdefault((run["column"], run["arm"]), {})[run["seed"]] = run
    for column in COLUMNS:
        for arm in [arm for of, arm in by_arm if of == column]:
            line = _line(column, arm, by_arm[column, arm], by_arm[column, reference])
            at_first = by_arm.get(("epochs", arm)), by_arm.get(("epochs", reference))
            made.append(line | {"time_at_pace": _time_at_pace(by_arm[column, arm], *at_first)})
    return made


def total_seconds(run: Row) -> float:
    """Of training, with the run that it starts from."""
    return float(run["seconds"] + run["seconds_before"])


def _time_at_pace(
    own: Mapping[int, Row], at_first: Mapping[int, Row] | None, dense: Mapping[int, Row] | None
) -> list[float] | None:
    """What the epochs of each seed would have taken at the pace of the arm's run of equal epochs, over what the dense
    run took beside that one. None where there are no such runs."""
    if at_first is None or dense is None:
        return None
    ratios = []
    for seed, run in own.items():
        first = at_first[seed]
        seconds = run["epochs"] * first["seconds"] / first["epochs"]
        if run["epochs_before"]:
            seconds += run["epochs_before"] * first["seconds_before"] / first["epochs_before"]
        ratios.append(seconds / total_seconds(dense[seed]))
    return ratios


def _line(column: str, arm: str, own: Mapping[int, Row], dense: Mapping[int, Row]) -> Row:
    one = next(iter(own.values()))
    points = []
    for place, first in enumerate(one["points"]):
        rows = {seed: run["points"][place] for seed, run in own.items()}
        top1 = {seed: row["top1"] for seed, row in rows.items()}
        theirs = {seed: dense[seed]["points"][0] for seed in own}
        rates = [row["images"] / second for row in rows.values() for second in row["seconds_batch"]]
        ratios = {
            key: [
                ratio
                for seed, row in rows.items()
                for ratio in (
                    over(theirs[seed][key], row[key]) if key == "seconds_batch" else over(row[key], theirs[seed][key])
                )
            ]
            for key in ("seconds_batch", "seconds_1")
        }
        points.append(
            {
                "point": first["rho"],
                "knob": first["knob"],
                "top1": Mean.of(list(top1.values())),
                "difference": paired(top1, {seed: row["top1"] for seed, row in theirs.items()}),
                "images_per_second": quartiles(rates),
                "rate_of_dense": quartiles(ratios["seconds_batch"]),
                "latency_ms": quartiles([1e3 * second for row in rows.values() for second in row["seconds_1"]]),
                "latency_of_dense": quartiles(ratios["seconds_1"]),
                **{
                    key: statistics.fmean(row[key] for row in rows.values())
                    for key in ("gflops_backbone", "gflops_extra", "gflops_total")
                },
            }
        )
    seconds = {seed: total_seconds(run) for seed, run in own.items()}
    return {
        "column": column,
        "arm": arm,
        "seeds": sorted(own),
        "epochs": [run["epochs"] for run in own.values()],
        "epochs_before": [run["epochs_before"] for run in own.values()],
        "seconds": Mean.of(list(seconds.values())),
        "seconds_before": Mean.of([run["seconds_before"] for run in own.values()]),
        "time_of_dense": [seconds[seed] / total_seconds(dense[seed]) for seed in own],
        "parameters_backbone": one["points"][0]["parameters_backbone"],
        "parameters_extra": one["points"][0]["parameters_extra"],
        "parameters_active": one["points"][0].get("parameters_active"),
        "gflops_theoretical": one["points"][0].get("gflops_theoretical"),
        **{
            key: statistics.fmean(run[key] for run in own.values())
            for key in ("training_backbone", "training_extra", "training_teacher", "training_step")
        },
        "arithmetic_of_dense": statistics.fmean(
            run["arithmetic_epochs"] / dense[seed]["arithmetic_epochs"] for seed, run in own.items()
        ),
        "points": points,
    }
