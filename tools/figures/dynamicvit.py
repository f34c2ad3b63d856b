"""Tables of DynamicViT's supplement (Rao et al. 2021), from a comparison of the arms in dynamicvit.toml."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tools.benchmarks.measure import table
from tools.comparing.statistics import Mean
from tools.figures.figure import Figure, Source

_PUBLISHED = {
    "stages-1": (77.4, 2.9), "stages-2": (79.2, 2.9), "stages-3": (79.3, 2.9),
    "kl-0": (79.17, None), "kl-0.5": (79.32, None), "kl-1": (79.23, None),
    "ratio-1": (79.15, None), "ratio-2": (79.32, None), "ratio-4": (79.29, None),
    "keep-0.9": (79.8, 4.0), "keep-0.8": (79.6, 3.4), "keep-0.7": (79.3, 2.9), "keep-0.6": (78.5, 2.5),
    "keep-0.5": (77.5, 2.2),
}  # fmt: skip
"""Top-1 and GFLOPs of DeiT-S on ImageNet-1k, by arm."""


def rows_of(source: Source, group: str) -> str:
    """Accuracy and cost of a group of arms under both ways of counting, beside the published ones."""
    rows = []
    for name in _names(group):
        runs = [run for run in source.runs if run["arm"] == name]
        points = [run["points"][0] for run in runs]
        top1, gflops = _PUBLISHED[name]
        cost = [Mean.of([point[key] for point in points]).mean for key in ("gflops_backbone", "gflops_total")]
        quoted = [f"{top1:g}", "–" if gflops is None else f"{gflops:g}"]
        mean = Mean.of([point["top1"] for point in points]).told(".2f")
        rows.append(" | ".join([name, mean, *(f"{one:.3g}" for one in cost), *quoted]))
    head = "arm | top-1 % | GFLOPs: backbone | with predictors | published: top-1 %, DeiT-S | GFLOPs"
    return "\n".join(table(head, rows)) + "\n"


def _names(group: str) -> tuple[str, ...]:
    return tuple(name for name in _PUBLISHED if name.startswith(f"{group}-"))


def _figure(number: int, group: str, shows: str) -> Figure:
    make: Callable[[Source], str] = partial(rows_of, group=group)
    spread = "mean ± standard deviation over seeds; published numbers in columns of their own"
    name = f"dynamicvit_{group}.md"
    return Figure((number,), name, "DynamicViT, supplement", shows, spread, make, arms=_names(group))


FIGURES = (
    _figure(1, "stages", "one, two and three stages of dropping"),
    _figure(2, "kl", "weights of divergence and distillation, both alike"),
    _figure(3, "ratio", "weight of the loss that holds the kept share"),
    _figure(4, "keep", "keep rates, each a run of its own"),
)
