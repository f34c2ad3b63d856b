"""Figures and the table of Sparsifiner's supplement (Wei et al. 2023), from runs of a comparison; its own arms are in
sparsifiner.toml."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle
from torch import Tensor

from pss.inference.opening import load_run
from pss.methods.sparsifiner import Sparsifiner
from tools.benchmarks.measure import table
from tools.comparing.picture import as_png
from tools.comparing.statistics import Mean
from tools.figures.figure import Figure, Source

ARM = "sparsifiner"
REGULARIZERS = {"basis-l2": (90.8, 79.79), "basis-l1": (91.3, 78.81)}
"""By arm the published sparsity of the basis and top-1 of DeiT-S on ImageNet-1k, both in percent (table 1)."""

_BLOCKS, _HEADS, _BASES = 3, 4, 6  # at most, as in the originals


def _opened(folder: Path) -> Sparsifiner:
    method = load_run(folder, torch.device("cpu")).method
    assert isinstance(method, Sparsifiner)
    return method


def connectivity(source: Source, keep: float) -> bytes:
    """What the patch in the middle of an image looks at in the last blocks, head by head: the mask, attention under it,
    and attention without it. Of the first seed's weights."""
    method = _opened(source.folders(ARM)[0])
    image = source.validation_images(method.config, 1)  # type: ignore[arg-type]
    blocks = range(len(method.model.blocks))[-_BLOCKS:]
    with torch.inference_mode():
        shown = looks(method, image, keep, list(blocks))
    heads, (height, width) = shown.shape[1], method.model.grid_size
    canvas = Canvas(figsize=(1.2 + 1.15 * 3 * heads, 1.0 + 1.25 * len(blocks)), layout="constrained")
    panels = canvas.subplots(len(blocks), 3 * heads + 1, squeeze=False)
    size = method.model.image_size[0] / height, method.model.image_size[1] / width
    picture = image[0].mean(0).numpy()
    for row, block in enumerate(blocks):
        panels[row, 0].imshow(picture, cmap="gray")
        corner = (width // 2 * size[1], height // 2 * size[0])
        panels[row, 0].add_patch(_outline(corner, size))
        panels[row, 0].set_ylabel(f"block {block + 1}", fontsize=8)
        for head in range(heads):
            for kind, name in enumerate(("mask", "sparse", "full")):
                panel = panels[row, 1 + 3 * head + kind]
                panel.imshow(shown[row, head, kind].view(height, width).numpy(), cmap="gray" if not kind else "viridis")
                if not row:
                    panel.set_title(f"head {head + 1}\n{name}" if not kind else f"\n{name}", fontsize=8)
    for panel in panels.flat:
        panel.set_xticks([])
        panel.set_yticks([])
    canvas.suptitle(
        f"{method.config.recipe}: the outlined patch looks at {max(method.budgets(keep))} of {method.model.num_tokens} "
        f"tokens, the class token not shown (keep rate {keep:g}; trained at {method.keep:g})",
        fontsize=9,
    )
    return as_png(canvas)


def looks(method: Sparsifiner, image: Tensor, keep: float, blocks: list[int]) -> Tensor:
    """Mask, sparse and full attention of the patch in the middle of an image (1, 3, S, S), to the patches, in some
    blocks, (blocks, heads, 3, patches)."""
    prefix, (height, width) = method.model.num_prefix_tokens, method.model.grid_size
    query = prefix + height // 2 * width + width // 2
    found = [
        torch.stack([one[0, :_HEADS, query, prefix:].float() for one in (seen.mask, seen.sparse, seen.full)], dim=1)
        for seen in method.connected(image, keep, blocks)
    ]
    return torch.stack(found)


def _outline(corner: tuple[float, float], size: tuple[float, float]) -> Rectangle:
    return Rectangle(
        (corner[0] - 0.5, corner[1] - 0.5), size[1], size[0], fill=False, edgecolor="#D55E00", linewidth=1.5
    )


def bases(source: Source) -> bytes:
    """The basis of the first blocks as images, one for each of its rows, before and after the threshold."""
    methods = {arm: _opened(source.folders(arm)[0]) for arm in REGULARIZERS}
    count = min(_BASES, *(len(method.model.blocks) for method in methods.values()))
    canvas = Canvas(figsize=(9, 0.8 + 1.9 * count), layout="constrained")
    panels = canvas.subplots(count, 2 * len(methods), squeeze=False)
    for column, (arm, method) in enumerate(methods.items()):
        for block in range(count):
            for after in (0, 1):
                panel, tiles = panels[block, 2 * column + after], basis_images(method, block)[after]
                limit = float(tiles.abs().max())
                panel.imshow(_mosaic(tiles).numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
                panel.set_xticks([])
                panel.set_yticks([])
                zeros = float((tiles == 0).float().mean())
                told = f"after: {zeros:.0%} zero" if after else "before the threshold"
                panel.set_title(f"{arm}, block {block + 1}\n{told}", fontsize=8)
    return as_png(canvas)


def basis_images(method: Sparsifiner, block: int) -> tuple[Tensor, Tensor]:
    """The rows of a block's basis over the patches, (K, height, width), before the threshold and after it."""
    predictor, prefix = method.predictors.each()[block], method.model.num_prefix_tokens
    both = predictor.up.detach().T, predictor.basis().detach()
    before, after = (one[:, prefix:].unflatten(1, method.model.grid_size) for one in both)
    return before, after


def _mosaic(tiles: Tensor) -> Tensor:
    """Tiles (K, h, w) in about a square, NaN between them."""
    side = -(-(len(tiles) ** 0.5) // 1)
    columns, (height, width) = int(side), tiles.shape[1:]
    rows = -(-len(tiles) // columns)
    made = torch.full((rows * (height + 1) - 1, columns * (width + 1) - 1), torch.nan)
    for number, tile in enumerate(tiles):
        y, x = number // columns * (height + 1), number % columns * (width + 1)
        made[y : y + height, x : x + width] = tile
    return made


def regularizers(source: Source) -> str:
    """Both ways to make the basis sparse: its sparsity and top-1, beside the published ones."""
    rows = []
    for arm, (sparsity, top1) in REGULARIZERS.items():
        points = [run["points"][0] for run in source.runs if run["arm"] == arm]
        told = [
            Mean.of([100 * point[key] for point in points]).told(".1f")
            for key in ("basis_sparsity", "negative_basis", "coefficient_sparsity")
        ]
        accuracy = Mean.of([point["top1"] for point in points]).told(".2f")
        rows.append(" | ".join([arm, *told, accuracy, f"{sparsity:g}", f"{top1:g}"]))
    head = (
        "arm | zeros of the basis, % | lost signs, % | zeros of coefficients, % | top-1 % | published: zeros of the "
        "basis, %, DeiT-S | top-1 %"
    )
    return "\n".join(table(head, rows)) + "\n"


def _looks_at(number: int, figure: int, name: str, share: str, keep: float) -> Figure:
    original, shows = f"Sparsifiner, supplement, figure {figure}", f"what a patch looks at, {share} of the keys"
    make = partial(connectivity, keep=keep)
    return Figure((number,), name, original, shows, "the first seed; one image", make, (ARM,))


FIGURES = (
    _looks_at(6, 1, "sparsifiner_keys.png", "a quarter", 0.25),
    _looks_at(7, 2, "sparsifiner_few_keys.png", "a tenth", 0.1),
    Figure((8,), "sparsifiner_table1.md", "Sparsifiner, supplement, table 1", "regularisers of the basis",
           "mean ± standard deviation over seeds; published numbers in columns of their own", regularizers,
           tuple(REGULARIZERS)),
    Figure((9,), "sparsifiner_bases.png", "Sparsifiner, supplement, figure 3", "bases under both regularisers",
           "the first seed", bases, tuple(REGULARIZERS)),
)  # fmt: skip
