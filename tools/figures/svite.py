"""Figures and tables of SViTE (Chen et al. 2021), from runs of a comparison; those of its tables are in svite.toml."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from torch import Tensor

from pss import methods
from pss.config import Config
from pss.inference.opening import load_run
from pss.methods import Method
from pss.runs import checkpoint
from tools.benchmarks.measure import table
from tools.comparing.picture import as_png
from tools.comparing.statistics import Mean
from tools.figures.figure import Figure, Source

FAINT = 1e-4
"""Attention below it counts as none (table A8)."""

_PUBLISHED_FAINT = {
    "dense": (28.44, 44.70, 37.04, 13.87, 13.62, 13.67, 12.98, 5.99, 5.08, 3.46, 2.74, 15.05),
    "svite-plus": (24.37, 33.24, 28.05, 19.51, 9.03, 13.79, 13.24, 8.88, 6.78, 5.65, 2.88, 35.22),
}
"""Per cent of the attention entries in each layer of DeiT-S on ImageNet-1k, by arm."""
_PUBLISHED_LENGTHS = {"dense": (79.90, 81.80), "dense-double": (80.02, 82.01)}
_PUBLISHED_TOP1 = {"dense": 79.90, "selector": 78.67, "svite-plus": 79.91}


def weight_masks(source: Source) -> bytes:
    """Which weights of the first and of the last block are there, at first and at last: of the first seed's run."""
    first, last = masks_of(_runs(source, "svite")[0])
    blocks = sorted({int(name.split(".")[2]) for name in last if ".blocks." in name})
    names = [name for name in last if name.split(".")[2] in (str(blocks[0]), str(blocks[-1]))]
    canvas = Canvas(figsize=(2.1 * len(names), 5.4), layout="constrained")
    rows = canvas.subplots(2, len(names), squeeze=False)
    for axes, (masks, name) in zip(rows.flat, [(one, name) for one in (first, last) for name in names], strict=True):
        _binary(axes, masks[name])
        moved = (first[name] & ~last[name]).sum() / first[name].sum()
        share = f"{masks[name].float().mean():.0%} there"
        matrix = ".".join(name.split(".")[3:-1])
        axes.set_title(
            f"block {int(name.split('.')[2]) + 1}, {matrix}\nat first: {share}"
            if masks is first
            else f"at last: {share},\n{moved:.0%} of the first ones gone",
            fontsize=8,
        )
    return as_png(canvas)


def unit_masks(source: Source) -> bytes:
    """Heads that are left, by block, and neurons of the MLPs, at first and at last: of the first seed's run."""
    canvas = Canvas(figsize=(9, 5), layout="constrained")
    rows = canvas.subplots(2, 2, gridspec_kw={"width_ratios": (1, 2.5)})
    for pair, masks, when in zip(rows, masks_of(_runs(source, "s2vite")[0]), ("at first", "at last"), strict=True):
        for axes, unit in zip(pair, ("heads", "neurons"), strict=True):
            by_block = torch.stack([mask for name, mask in sorted(masks.items()) if name.endswith(unit)])
            _binary(axes, by_block)
            axes.set_yticks(range(len(by_block)), [f"{number + 1}" for number in range(len(by_block))], fontsize=8)
            axes.set_title(f"{unit} {when}: {int(by_block[0].sum())} of {by_block.shape[1]} a block", fontsize=9)
            axes.set_ylabel("block", fontsize=8)
    return as_png(canvas)


def masks_of(run: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The masks that a run began with, which its seed decides, and those of its newest checkpoint, by name."""
    found = checkpoint.load_latest(run / "checkpoints")
    if found is None:
        raise ValueError(f"{run} holds no checkpoint; compare the arms anew")
    state: dict[str, Any] = found[0]
    method = methods.build(Config.from_json(run / "config.json"), len(state["classes"]), steps_per_epoch=1)
    last = {name: mask for name, mask in state["method"].items() if name.startswith("masks.")}
    return {name: mask for name, mask in method.named_buffers() if name in last}, last


def faint_attention(source: Source) -> str:
    """Per cent of the attention entries of each block below 1e-4, on images of the validation split."""
    rows, depth = [], 0
    for arm in _PUBLISHED_FAINT:
        shares = []
        for run in _runs(source, arm):
            opened = load_run(run, torch.device("cpu"))
            batch = source.validation_images(opened.config, 64)
            shares.append(faint_shares(opened.method, batch))
        depth = len(shares[0])
        told = [Mean.of([100 * share for share in of_block]).told(".2f") for of_block in zip(*shares, strict=True)]
        rows.append(" | ".join([arm, *told]))
    published = [" | ".join([arm, *(f"{one:.2f}" for one in shares)]) for arm, shares in _PUBLISHED_FAINT.items()]
    parts = [f"Attention below {FAINT:g}, % of the entries, by block.", ""]
    parts += table(f"arm | {_numbers(depth)}", rows)
    parts += ["", "Published, DeiT-S on ImageNet-1k:", "", *table(f"arm | {_numbers(12)}", published)]
    return "\n".join(parts) + "\n"


@torch.inference_mode()
def faint_shares(method: Method, images: Tensor) -> list[float]:
    """Of each block, which share of the entries that the attention maps have is below `FAINT`."""
    maps = method.attention_maps(images, method.points()[0])
    return [float((weights < FAINT).float().mean()) for weights in maps]


def ablation(source: Source) -> str:
    """Dense, with the selector alone, and with the selector and half of the weights: accuracy and arithmetic."""
    rows = []
    for arm, published in _PUBLISHED_TOP1.items():
        points = [run["points"][0] for run in source.runs if run["arm"] == arm]
        gflops, theoretical = points[0]["gflops_total"], points[0].get("gflops_theoretical")
        told = [arm, Mean.of([point["top1"] for point in points]).told(".2f"), f"{gflops:.3g}"]
        rows.append(" | ".join([*told, f"{gflops if theoretical is None else theoretical:.3g}", f"{published:.2f}"]))
    return "\n".join(table("arm | top-1 % | GFLOPs | without zeros | published: top-1 %, DeiT-S", rows)) + "\n"


def lengths(source: Source) -> str:
    """Dense training, and dense training for twice as many epochs."""
    rows = []
    for arm, published in _PUBLISHED_LENGTHS.items():
        runs = [run for run in source.runs if run["arm"] == arm]
        top1 = Mean.of([run["points"][0]["top1"] for run in runs]).told(".2f")
        rows.append(" | ".join([arm, f"{runs[0]['epochs']}", top1, *(f"{one:.2f}" for one in published)]))
    head = "arm | epochs | top-1 % | published, 300 and 600 epochs: top-1 %, DeiT-S | DeiT-B"
    return "\n".join(table(head, rows)) + "\n"


def _numbers(depth: int) -> str:
    return " | ".join(str(number + 1) for number in range(depth))


def _runs(source: Source, arm: str) -> Sequence[Path]:
    """Folders of an arm's runs, one for each seed."""
    return [source.folder / "runs" / run["run"] for run in source.runs if run["arm"] == arm]


def _binary(axes: Axes, mask: Tensor) -> None:
    axes.imshow(mask.numpy(), cmap="Blues", vmin=0, vmax=1.3, aspect="auto", interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


_SEED = "none: the first seed's masks"
_TABLE = "mean ± standard deviation over seeds; published numbers apart"
FIGURES = (
    Figure((16,), "svite_masks.png", "SViTE figure A6", "masks of weights, initial and explored", _SEED, weight_masks,
           ("svite",)),
    Figure((17,), "s2vite_masks.png", "SViTE figure A7", "heads and neurons that are left, by block", _SEED, unit_masks,
           ("s2vite",)),
    Figure((18,), "svite_attention.md", "SViTE table A8", "share of the attention that is next to none, by block",
           _TABLE, faint_attention, tuple(_PUBLISHED_FAINT)),
    Figure((19,), "svite_selector.md", "SViTE table A2", "the token selector with and without sparse weights", _TABLE,
           ablation, tuple(_PUBLISHED_TOP1)),
    Figure((15,), "svite_lengths.md", "SViTE table A7", "dense training, and for twice as many epochs", _TABLE, lengths,
           tuple(_PUBLISHED_LENGTHS)),
)  # fmt: skip
