"""What the models of a comparison are like: accuracy over the split, costs, speeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pipelines
from pss.config import Config
from pss.inference.accuracy import accuracy, evaluation_inputs
from pss.inference.opening import Run, load_run
from pss.inference.sweep import predict
from pss.inference.timing import Spread, latencies, rates
from pss.planning.plan import plan
from pss.runtime import files
from pss.runtime.precision import autocast
from pss.runtime.processes import World
from tools.comparing.turns import Training

EVALUATED = "evaluated.json"


def accuracies(
    run: Training, data: Path, *, loader: str, batch_size: int, device: torch.device
) -> list[dict[str, Any]]:
    """Top-1 and GFLOPs of a run at each of its method's operating points, the trained one first; kept in its folder."""
    path, step = run.folder / EVALUATED, run.rows()[-1]["step"]
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if kept["step"] == step:
            points: list[dict[str, Any]] = kept["points"]
            return points
    opened, world = load_run(run.folder, device), World(0, 1, device)
    config = opened.config.data
    made = pipelines.build(
        data,
        "val",
        config=config,
        train=False,
        batch_size=batch_size,
        device=str(device),
        loader=loader,  # type: ignore[arg-type]
    )
    method = opened.method
    try:
        found = accuracy(
            method.predict_with_cost if method.costs_vary else method.predict,
            evaluation_inputs(made, config, device),
            world,
            points=method.points(),
            autocast=autocast(opened.config, device),
            with_cost=method.costs_vary,
        )
    finally:
        made.close()
    points = []
    for point, result in zip(method.points(), found, strict=True):
        cost = method.cost(point)
        total = cost.forward if result.macs is None else result.macs.mean
        points.append(
            {
                "point": point,
                "top1": result.top1,
                "loss": result.loss,
                "gflops_backbone": (total - cost.extra) / 1e9,
                "gflops_extra": cost.extra / 1e9,
                "gflops": total / 1e9,
            }
        )
    files.write(path, json.dumps({"step": step, "points": points}, indent=1))
    return points


def speeds(
    runs: Mapping[str, Training], *, batch_size: int, device: torch.device, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Of each run at its operating points: images a second in batches, and milliseconds for one image.

    All in one process and interleaved, on random images: what is compared is models, on one machine.
    """
    opened = {name: load_run(run.folder, device) for name, run in runs.items()}
    cases = [(name, one, point) for name, one in opened.items() for point in one.method.points()]

    def calls(count: int) -> list[Any]:
        return [partial(predict, one, _images(one, count, device), point) for _, one, point in cases]

    faster = rates(calls(batch_size), num_images=batch_size, device=device, rounds=rounds)
    sooner = latencies(calls(1), device=device, rounds=rounds)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for (name, _, point), rate, wait in zip(cases, faster, sooner, strict=True):
        found[name].append({"point": point, "images_per_second": _told(rate), "latency_ms": _told(wait)})
    return found


def _told(spread: Spread) -> list[float]:
    """Median, smallest and largest."""
    return [spread.median, spread.low, spread.high]


def _images(run: Run, count: int, device: torch.device) -> torch.Tensor:
    size = run.config.data.img_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)


def parameters(run: Training) -> int:
    """Of the trained model, with what its method adds."""
    method = load_run(run.folder, torch.device("cpu")).method.deployed()
    return sum(parameter.numel() for parameter in method.parameters())


def training_gflops(runs: Sequence[Training], num_images: int, num_classes: int) -> dict[str, float]:
    """What training costs, over an entry's runs: GFLOPs of an image on average, by part, and PFLOPs in all.

    Multiply-accumulates, forward and backward; a teacher's forward passes are counted.
    """
    sums, epochs = dict.fromkeys(("backbone", "extra", "teacher", "all"), 0.0), 0
    for run in runs:
        config = Config.from_json(run.folder / "config.json")
        planned = plan(config.with_settings(["train.max_steps=none"]), num_images=num_images, num_classes=num_classes)
        for level in planned.levels:
            weight, cost = level.share * run.epochs, level.cost
            sums["backbone"] += weight * cost.backbone
            sums["extra"] += weight * cost.extra
            sums["teacher"] += weight * cost.teacher
            sums["all"] += weight * cost.training
        epochs += run.epochs
    return {name: value / epochs / 1e9 for name, value in sums.items()} | {"pflops": sums["all"] * num_images / 1e15}
