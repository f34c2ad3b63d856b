"""Figures of Token Expansion (Huang et al. 2024), from runs of a comparison."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor

from pss import methods
from pss.config import Config
from pss.inference.opening import load_run
from pss.inference.plots import COLOURS
from pss.methods import Method
from pss.methods.toe import ToE, merge, select, uniform_seeds
from pss.models.sampling import gather
from pss.runs.log import read_rows
from pss.training.setup import stages_of
from tools.comparing.picture import as_png
from tools.figures.figure import Figure, Source

ARM = "toe"
PUBLISHED_SECONDS = {"stage 1": 948, "stage 2": 1244, "stage 3": 1488}
"""An epoch of DeiT-S at r_1 = 0.5 on ImageNet-1k (Huang et al., 2024, appendix, table 1; a mean of three)."""

_STEPS_PER_EPOCH = 50  # a drawing of tokens knows no data; cycles within an epoch have all their levels in as many
_IMAGES = 64


def shape_trace(source: Source) -> bytes:
    """How many tokens each block sees, stage by stage, and in evaluation."""
    config = _config(source.folders(ARM)[0])
    with torch.device("meta"):
        method = methods.build(config, num_classes=1000, steps_per_epoch=_STEPS_PER_EPOCH)
    rows = token_rows(method, config.train.epochs)
    blocks = len(method.model.blocks)
    canvas = Canvas(figsize=(max(6.0, 2.6 + 0.62 * blocks), 1.5 + 0.36 * len(rows)), layout="constrained")
    axes = canvas.subplots()
    axes.imshow([tokens for _, tokens in rows], cmap="Blues", aspect="auto", vmin=0, vmax=1.6 * method.model.num_tokens)
    for y, (_, tokens) in enumerate(rows):
        for x, count in enumerate(tokens):
            axes.text(x, y, f"{count}", ha="center", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axes.set_xticks(range(blocks), [f"{number + 1}" for number in range(blocks)], fontsize=8)
    axes.set_xlabel("block")
    axes.set_title(f"{config.recipe}, method {config.method}: tokens that each block sees", fontsize=10)
    return as_png(canvas)


def token_rows(method: Method, epochs: int) -> list[tuple[str, tuple[int, ...]]]:
    """Tokens of each block, by stage of a run of so many epochs, with its share of the steps; last those of evaluation,
    at the first operating point."""
    steps = epochs * _STEPS_PER_EPOCH
    stages = stages_of(method, steps).items()
    rows = [
        (f"ρ {stage}, {size} px: {count / steps:.0%} of the steps", method.training_tokens(stage, size))
        for (stage, size), count in stages
    ]
    return [*rows, ("evaluation", method.tokens(method.points()[0]))]


def token_features(source: Source) -> bytes:
    """Patch tokens after the first block: all, those that are selected, and those after merging, in one plane, the two
    principal components of all three together. Of the first seed's weights."""
    run = load_run(source.folders(ARM)[0], torch.device("cpu"))
    assert isinstance(run.method, ToE)
    batch = source.validation_images(run.config, _IMAGES)
    with torch.inference_mode():
        sets = token_sets(run.method, batch)
    joint = torch.cat([one.flatten(0, 1) for one in sets.values()])
    centre = joint.mean(0)
    components = torch.linalg.svd(joint - centre, full_matrices=False)
    explained = (components.S[:2].square() / components.S.square().sum()).tolist()
    planes = {name: (one.flatten(0, 1) - centre) @ components.Vh[:2].T for name, one in sets.items()}
    canvas = Canvas(figsize=(11, 4.1), layout="constrained")
    panels = canvas.subplots(1, 3, sharex=True, sharey=True)
    for panel, (name, points), colour in zip(panels, planes.items(), COLOURS[:3], strict=True):
        panel.scatter(*planes["all"].T.numpy(), s=4, color="#cccccc", linewidths=0)
        panel.scatter(*points.T.numpy(), s=5, color=colour, alpha=0.6, linewidths=0)
        panel.set_title(f"{name}: {sets[name].shape[1]} an image", fontsize=10)
        panel.set_xlabel(f"component 1 ({explained[0]:.0%} of the variance)")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"component 2 ({explained[1]:.0%})")
    canvas.suptitle(
        f"{run.config.recipe}, step {run.step:,}: patch tokens of {len(batch)} images after block "
        f"{run.method.own.after}, stage 1 (grey: all)",
        fontsize=11,
    )
    return as_png(canvas)


def accuracy_over_training(source: Source) -> bytes:
    """Top-1 on the validation split after every epoch, of the weights and, where one is kept, of their average."""
    canvas = Canvas(figsize=(7.2, 4.2), layout="constrained")
    axes = canvas.subplots()
    for arm, colour in zip((ARM, "dense"), COLOURS, strict=False):
        runs = [run for run in source.runs if run["arm"] == arm]
        for key, style, of in (("top1", "-", "weights"), ("ema_top1", "--", "their average")):
            if not all(key in row for run in runs for row in run["log"]):
                continue
            courses = list(zip(*([row[key] for row in run["log"]] for run in runs), strict=True))
            epochs = [row["epoch"] for row in runs[0]["log"]]
            axes.plot(epochs, [statistics.mean(one) for one in courses], style, color=colour, label=f"{arm}, {of}")
            axes.fill_between(
                epochs, *zip(*((min(one), max(one)) for one in courses), strict=True), color=colour, alpha=0.15
            )
    axes.set_xlabel("epoch")
    axes.set_ylabel("top-1 accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.7)
    axes.legend(frameon=False, fontsize=9)
    return as_png(canvas)


def seconds_by_stage(source: Source) -> bytes:
    """Seconds per epoch in each stage: the median epoch of a run, and the mean of the runs; beside them the published
    ones of DeiT-S, both as shares of the last stage."""
    folders = source.folders(ARM)
    rows = stage_rows(folders)
    last = rows[-1]["stage"]
    canvas = Canvas(figsize=(7.2, 4), layout="constrained")
    axes = canvas.subplots()
    places = torch.arange(len(rows)).numpy()
    ours = axes.bar(
        places - 0.2, [row["share"] for row in rows], 0.36, yerr=[row["share_sd"] for row in rows], capsize=4,
        color=COLOURS[0], label=f"here: {_config(folders[0]).recipe}, {len(folders)} runs, mean ± standard deviation",
    )  # fmt: skip
    theirs = axes.bar(
        places + 0.2, [row["published_share"] for row in rows], 0.36, color="white", edgecolor=COLOURS[1], hatch="//",
        label="published: DeiT-S, ImageNet-1k, GPUs",
    )  # fmt: skip
    axes.bar_label(ours, [f"{row['seconds']:.3g} s" for row in rows], padding=3, fontsize=9)
    axes.bar_label(theirs, [f"{PUBLISHED_SECONDS[row['stage']]:,} s" for row in rows], padding=3, fontsize=9)
    axes.set_xticks(places, [row["stage"] for row in rows])
    axes.set_ylabel(f"time of an epoch over {last}'s")
    axes.set_ylim(0, 1.45)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    axes.set_title("Seconds per training epoch by stage of Token Expansion", fontsize=11)
    return as_png(canvas)


def stage_rows(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """By stage, over runs: seconds of the median epoch, and their share of the last stage's. The first epoch of each
    run is left out, as it warms up.

    Raises:
        ValueError: a run has no such epoch in stage 1.
    """
    per_run = [_seconds_of(run) for run in folders]
    for run, one in zip(folders, per_run, strict=True):
        if "stage 1" not in one:
            raise ValueError(f"{run} has no whole epoch in stage 1 after its first; compare more epochs of method=toe")
    stages = [name for name in PUBLISHED_SECONDS if all(name in one for one in per_run)]
    rows = []
    for name in stages:
        seconds, shares = [one[name] for one in per_run], [one[name] / one[stages[-1]] for one in per_run]
        rows.append(
            {
                "stage": name, "seconds": statistics.mean(seconds), "share": statistics.mean(shares),
                "share_sd": statistics.stdev(shares) if len(shares) > 1 else 0.0,
                "published_share": PUBLISHED_SECONDS[name] / PUBLISHED_SECONDS[stages[-1]],
            }
        )  # fmt: skip
    return rows


def token_sets(method: ToE, images: Tensor) -> dict[str, Tensor]:
    """Patch tokens (B, n, D) after the blocks that see all, in stage 1: all, those selected, and those merged."""
    model, prefix = method.model, method.model.num_prefix_tokens
    tokens = model.run_blocks(model.embed(images), model.positions(None), stop=method.own.after)
    everything = tokens[:, prefix:]
    counts = method.counts(1, everything.shape[1])
    seeds = uniform_seeds(everything.shape[1], counts[0], method.stride)
    chosen, nearest = select(everything, seeds, method.steps(counts), method.own.distance)
    selected = gather(tokens, chosen, prefix)[:, prefix:]
    return {"all": everything, "selected": selected, "merged": merge(everything, chosen, nearest)}


def _seconds_of(run: Path) -> dict[str, float]:
    """Of the whole epochs in each stage, without the run's first, the median's seconds."""
    times: dict[str, list[float]] = defaultdict(list)
    for row in read_rows(run, "epoch"):
        names = {name.partition(" ")[2] or "stage 3" for name in row["by_rho"]}
        if row["complete"] and row["epoch"] > 1 and len(names) == 1:
            times[names.pop()].append(row["train_seconds"])
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _config(run: Path) -> Config:
    return Config.from_json(run / "config.json")


FIGURES = (
    Figure((10,), "toe_shapes.png", "ToE figure 1", "tokens that each block sees, by stage",
           "none: counts are functions of the stage", shape_trace, (ARM,)),
    Figure((11,), "toe_accuracy.png", "ToE figure 2", "top-1 over training, of weights and of their average",
           "mean of the seeds; the band is from the lowest to the highest", accuracy_over_training, (ARM, "dense")),
    Figure((12,), "toe_features.png", "ToE figure 3", "features of all, selected and merged tokens in one plane",
           "every token of 64 images, the first seed", token_features, (ARM,)),
    Figure((13,), "toe_seconds.png", "ToE table 1", "seconds per epoch in each stage",
           "the median epoch of each seed; mean ± standard deviation over seeds", seconds_by_stage, (ARM,)),
)  # fmt: skip
