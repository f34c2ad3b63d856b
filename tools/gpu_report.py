"""The report of the GPU suite: what its parts measured, goals first."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from tools.benchmarks.measure import table

GOALS = {
    ("rates-deit-s-224", "saving"): 0.345,
    ("rates-vit-b-224", "saving"): 0.342,
    ("rates-deit-s-384", "saving"): 0.364,
    ("rates-deit-s-224", "images/s at rho 1"): 10500,
    ("rates-vit-b-224", "images/s at rho 1"): 3600,
    ("rates-deit-s-384", "images/s at rho 1"): 2800,
    ("train", "data wait"): -0.03,
}
"""By part and figure, for one H200; a negative goal is the most there may be."""


def report(title: str, environment: dict[str, Any], parts: Iterable[str], kept: dict[str, dict[str, Any]]) -> str:
    """As markdown; `kept` has the results there are, by part."""
    goals = [
        f"{part} | {figure} | {_goal_cells(figure, goal, figures(kept.get(part)).get(figure))}"
        for (part, figure), goal in GOALS.items()
    ]
    statuses = []
    for name in parts:
        result = kept.get(name, {"status": "not run yet", "reason": None})
        said = [*result.get("notes", ()), *([result["reason"]] if result["reason"] else [])]
        status = (result["status"] + (f": {'; '.join(said)}" if said else "")).replace("|", "/")
        statuses.append(f"{name} | {status} | {result.get('seconds', '–')} | {result.get('commit', '–')}")
    lines = [f"# {title}", "", ", ".join(f"{key} {value}" for key, value in environment.items()), ""]
    lines += table("part | figure | goal | reached | met", goals)
    lines += ["", *table("part | status | seconds | commit", statuses)]
    for name, result in kept.items():
        if result["told"].strip():
            lines += ["", f"## {name}", "", *_fenced(result)]
    return "\n".join(lines) + "\n"


def figures(result: dict[str, Any] | None) -> dict[str, float]:
    """What a part's result says of the goals, by the name of the figure."""
    if result is None or result["status"] != "done":
        return {}
    found = {}
    measured = result["measured"].get("rates") or result["measured"].get("train")
    if measured is not None:
        if measured["savings"]:
            found["saving"] = statistics.median(measured["savings"])
        if "1" in measured["levels"]:
            seconds = statistics.median(measured["levels"]["1"]["seconds"])
            found["images/s at rho 1"] = int(measured["settings"]["batch"]) / seconds
        if measured["data_wait"] is not None:
            found["data wait"] = measured["data_wait"]
    return found


def _goal_cells(figure: str, goal: float, reached: float | None) -> str:
    def show(value: float) -> str:
        return f"{value:,.0f}" if figure.startswith("images") else f"{value:.1%}"

    bound = f"{'at most' if goal < 0 else 'at least'} {show(abs(goal))}"
    if reached is None:
        return f"{bound} | – | not measured"
    return f"{bound} | {show(reached)} | {'yes' if (reached <= -goal if goal < 0 else reached >= goal) else 'no'}"


def _fenced(result: dict[str, Any]) -> list[str]:
    """What a part printed: tables as they are, other text word for word."""
    text: str = result["told"].strip()
    return [text] if result["status"] == "done" and "|---|" in text else ["```", text, "```"]
