"""Figures of Token Expansion: tokens by block and stage (10), what is selected and merged (12), time by stage (13)."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import pipelines
from pipelines.augment.device import DeviceTransform
from pss import methods
from pss.config import Config
from pss.inference.opening import load_run
from pss.methods.toe import ToE, merge, select, uniform_seeds
from pss.models.sampling import gather
from pss.runs.log import read_rows
from pss.training.setup import stages_of
from tools.figures.made import COLOURS, Figures, Made, Options, data_of, runs_of, save

PUBLISHED_SECONDS = {"stage 1": 948, "stage 2": 1244, "stage 3": 1488}
"""An epoch of DeiT-S at r_1 = 0.5 on ImageNet-1k (Huang et al., 2024, appendix, table 1; a mean of three)."""

_STEPS_PER_EPOCH = 50  # a drawing of tokens knows no data; cycles within an epoch have all their levels in as many


def shape_trace(output: Path, options: Options) -> Made:
    """Number 10: how many tokens each block sees, stage by stage, and in evaluation. No run is needed.

    Of any method: that of the recipe, `toe-s` say, or what `options.settings` choose.
    """
    config = options.config()
    with torch.device("meta"):
        method = methods.build(config, num_classes=1000, steps_per_epoch=_STEPS_PER_EPOCH)
    rows: list[dict[str, Any]] = [
        {
            "stage": f"ρ {stage}, {size} px",
            "share": count / (config.train.epochs * _STEPS_PER_EPOCH),
            "tokens": list(method.training_tokens(stage, size)),
            "gmacs": method.training_cost(stage, size).forward / 1e9,
        }
        for (stage, size), count in stages_of(method, config.train.epochs * _STEPS_PER_EPOCH).items()
    ]
    point = method.points()[0]
    tokens, cost = list(method.tokens(point)), method.cost(point).forward / 1e9
    rows.append({"stage": "evaluation", "share": None, "tokens": tokens, "gmacs": cost})
    blocks = len(method.model.blocks)
    figure = Figure(figsize=(2.6 + 0.62 * blocks, 1.5 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(
        [row["tokens"] for row in rows], cmap="Blues", aspect="auto", vmin=0, vmax=1.6 * method.model.num_tokens
    )
    for y, row in enumerate(rows):
        for x, count in enumerate(row["tokens"]):
            axes.text(x, y, f"{count}", ha="center", va="center", fontsize=8)
    labels = [row["stage"] + ("" if row["share"] is None else f": {row['share']:.0%} of the steps") for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_xticks(range(blocks), [f"{number + 1}" for number in range(blocks)], fontsize=8)
    axes.set_xlabel("block")
    axes.set_title(f"{config.recipe}, method {config.method}: tokens that each block sees", fontsize=10)
    return save(figure, output, "10-shape-trace", {"recipe": config.recipe, "method": config.method, "rows": rows})


def token_features(output: Path, options: Options) -> Made:
    """Number 12: patch tokens after the first block, all, those that are selected, and those after merging, in one
    plane: the two principal components of all three together. Of the first run's weights; of one that was not trained
    under Token Expansion, as it would be with the default settings."""
    run = load_run(runs_of(output, options, "method=toe", seeds=1)[0], torch.device("cpu"))
    method = run.method if isinstance(run.method, ToE) else _as_toe(run.method.model, run.config)
    batch = _validation_batch(data_of(output, options), run.config, options.loader, images=64)
    with torch.inference_mode():
        sets, spreads = _token_sets(method, batch)
    joint = torch.cat([one.flatten(0, 1) for one in sets.values()])
    centre = joint.mean(0)
    components = torch.linalg.svd(joint - centre, full_matrices=False)
    axes_of_plane = components.Vh[:2].T
    explained = (components.S[:2].square() / components.S.square().sum()).tolist()
    planes = {name: (one.flatten(0, 1) - centre) @ axes_of_plane for name, one in sets.items()}
    figure = Figure(figsize=(11, 4.1), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    for panel, (name, points), colour in zip(panels, planes.items(), COLOURS, strict=False):
        everything = planes["all"]
        panel.scatter(*everything.T.numpy(), s=4, color="#cccccc", linewidths=0)
        panel.scatter(*points.T.numpy(), s=5, color=colour, alpha=0.6, linewidths=0)
        panel.set_title(f"{name}: {sets[name].shape[1]} an image", fontsize=10)
        panel.set_xlabel(f"component 1 ({explained[0]:.0%} of the variance)")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"component 2 ({explained[1]:.0%})")
    figure.suptitle(
        f"{run.config.recipe}, step {run.step:,}: patch tokens of {len(batch)} images after block "
        f"{method.own.after}, stage 1 (grey: all)",
        fontsize=11,
    )
    found = {
        "run": run.name, "step": run.step, "images": len(batch), "explained": explained,
        "tokens": {name: one.shape[1] for name, one in sets.items()}, "spread": spreads,
    }  # fmt: skip
    return save(figure, output, "12-token-features", found)


def seconds_by_stage(output: Path, options: Options) -> Made:
    """Number 13: seconds per epoch in each stage, the median epoch of a run and the mean of three runs; beside them the
    published ones of DeiT-S, as shares of the last stage. The first epoch of each run is left out, as it warms up."""
    short = ("method=toe", "train.epochs=9", "optim.warmup_epochs=1")
    runs = runs_of(output, options, *short, seeds=3)
    per_run = [_seconds_of(run) for run in runs]
    stages = [name for name in PUBLISHED_SECONDS if all(name in one for one in per_run)]
    for run, one in zip(runs, per_run, strict=True):
        if "stage 1" not in one:  # a run of another method is all in what would be the last
            raise ValueError(f"{run} has no whole epoch in stage 1 after its first; name longer runs of method=toe")
    rows: list[dict[str, Any]] = []
    for name in stages:
        seconds = [one[name] for one in per_run]
        shares = [one[name] / one[stages[-1]] for one in per_run]
        rows.append(
            {
                "stage": name, "n": len(runs), "seconds": statistics.mean(seconds), "seconds_sd": _deviation(seconds),
                "share": statistics.mean(shares), "share_sd": _deviation(shares),
                "published_seconds": PUBLISHED_SECONDS[name],
                "published_share": PUBLISHED_SECONDS[name] / PUBLISHED_SECONDS[stages[-1]],
            }
        )  # fmt: skip
    config = Config.from_json(runs[0] / "config.json")
    figure = Figure(figsize=(7.2, 4), layout="constrained")
    axes = figure.subplots()
    places = torch.arange(len(rows)).numpy()
    ours = axes.bar(
        places - 0.2, [row["share"] for row in rows], 0.36, yerr=[row["share_sd"] for row in rows], capsize=4,
        color=COLOURS[0], label=f"here: {config.recipe}, {len(runs)} runs, mean ± standard deviation",
    )  # fmt: skip
    theirs = axes.bar(
        places + 0.2, [row["published_share"] for row in rows], 0.36, color="white", edgecolor=COLOURS[1], hatch="//",
        label="published: DeiT-S, ImageNet-1k, GPUs",
    )  # fmt: skip
    axes.bar_label(ours, [f"{row['seconds']:.3g} s" for row in rows], padding=3, fontsize=9)
    axes.bar_label(theirs, [f"{row['published_seconds']:,} s" for row in rows], padding=3, fontsize=9)
    axes.set_xticks(places, stages)
    axes.set_ylabel(f"time of an epoch over {stages[-1]}'s")
    axes.set_ylim(0, 1.45)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    axes.set_title("Seconds per training epoch by stage of Token Expansion", fontsize=11)
    names = [run.name for run in runs]
    return save(figure, output, "13-seconds-by-stage", {"recipe": config.recipe, "runs": names, "rows": rows})


FIGURES: Figures = {"10": shape_trace, "12": token_features, "13": seconds_by_stage}


def figures(output: Path, options: Options) -> list[Made]:
    """All of them, each in a folder of its own."""
    return [make(output / number, options) for number, make in FIGURES.items()]


def _as_toe(model: Any, config: Config) -> ToE:
    return ToE(model, config.with_method("toe"), 1)


def _validation_batch(data: Path, config: Config, loader: str, images: int) -> Tensor:
    """Normalised images (B, 3, S, S), spread over the validation split."""
    choice: Any = loader
    reader = pipelines.build(data, "val", config=config.data, batch_size=256, train=False, loader=choice)
    transform = DeviceTransform(config.data, seed=0, train=False)
    shown = torch.cat([transform(batch, 0) for batch in reader])
    return shown[torch.linspace(0, len(shown) - 1, min(images, len(shown))).long()]


def _token_sets(method: ToE, images: Tensor) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """Patch tokens (B, n, D) after the blocks that see all, in stage 1: all, those selected, and those merged; and how
    far each image's lie from their mean (root mean square), mean and standard deviation over the images."""
    model, prefix = method.model, method.model.num_prefix_tokens
    tokens = model.run_blocks(model.embed(images), model.positions(None), stop=method.own.after)
    everything = tokens[:, prefix:]
    counts = method.counts(1, everything.shape[1])
    seeds = uniform_seeds(everything.shape[1], counts[0], method.stride)
    chosen, nearest = select(everything, seeds, method.steps(counts), method.own.distance)
    selected = gather(tokens, chosen, prefix)[:, prefix:]
    sets = {"all": everything, "selected": selected, "merged": merge(everything, chosen, nearest)}
    spreads = {}
    for name, one in sets.items():
        far = (one - one.mean(1, keepdim=True)).square().sum(2).mean(1).sqrt()
        spreads[name] = {"mean": float(far.mean()), "sd": float(far.std()), "n": len(far)}
    return sets, spreads


def _seconds_of(run: Path) -> dict[str, float]:
    """Of the whole epochs in each stage, without the run's first, the median's seconds."""
    times: dict[str, list[float]] = defaultdict(list)
    for row in read_rows(run, "epoch"):
        names = {name.partition(" ")[2] or "stage 3" for name in row["by_rho"]}
        if row["complete"] and row["epoch"] > 1 and len(names) == 1:
            times[names.pop()].append(row["train_seconds"])
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
