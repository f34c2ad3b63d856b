"""Figures of which patches a model keeps: of images, of places on the grid, and of several models side by side.

They are in the patch sampling paper (McDanel & Huynh 2022, figures 2, 5, 10, 12 and 13) and in DynamicViT's supplement
(Rao et al. 2021, figure 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from torch import Tensor

from pipelines.augment.device import DeviceTransform
from pipelines.base import Batch
from pss import recipes
from pss.inference.accuracy import evaluation_inputs
from pss.inference.exhibit import Exhibit, View, views_of
from pss.inference.opening import Run, load_run
from pss.inference.sweep import observed, operating_points
from pss.planning.plan import plan
from pss.runtime.precision import autocast
from pss.runtime.processes import World
from tools.comparing.picture import as_png
from tools.figures.figure import Figure, Source

_IMAGES = 4
_HERE = World(rank=0, size=1, device=torch.device("cpu"))
_LEVELS = (1.0, 0.8, 0.6, 0.4, 0.2)
_GREYS = (175, 225)
_MODELS = ("dense", "pss", "dynamicvit")


@lru_cache(maxsize=2)  # several figures show the same
def seen(source: Source, arm: str, points: tuple[float, ...] | None = None) -> tuple[Exhibit, list[str]]:
    """What the first seed's run keeps over the validation split, at its own points by default; and the classes."""
    run = load_run(source.folders(arm)[0], _HERE.device)
    own = operating_points(run, points)
    with source.validation_split(run.config) as loader:
        inputs = evaluation_inputs(loader, run.config.data, _HERE.device)
        _, exhibit = observed(run, own, inputs, _HERE, size=_IMAGES)
    return exhibit, _classes(run)


def _classes(run: Run) -> list[str]:
    return run.classes or [str(number) for number in range(run.num_classes)]


def predictions(source: Source) -> bytes:
    """Images without the patches that are not kept, and the likeliest class, at every ρ."""
    exhibit, classes = seen(source, "pss", _LEVELS)
    canvas, grid = _canvas(len(exhibit.pictures), len(exhibit.points))
    for row, picture in zip(grid, exhibit.pictures, strict=True):
        for axes, point, view in zip(row, exhibit.points, picture.views, strict=True):
            _show(axes, blanked(picture.pixels, kept_of(view, exhibit.grid)))
            _told(axes, view, picture.label, classes)
            if row is grid[0]:
                axes.set_title(f"ρ = {point:g}", fontsize=9)
    canvas.suptitle("pss: kept patches and the likeliest class (green: right)", fontsize=10)
    return as_png(canvas)


def places(source: Source) -> bytes:
    """How often each place of the grid is kept, at every ρ."""
    exhibit, _ = seen(source, "pss", _LEVELS)
    canvas, grid = _canvas(1, len(exhibit.points), size=1.9)
    for axes, point, shares in zip(grid[0], exhibit.points, exhibit.frequencies, strict=True):
        shown = axes.imshow(torch.tensor(shares).view(exhibit.grid).numpy(), vmin=0, vmax=1, cmap="viridis")
        axes.set_title(f"ρ = {point:g}", fontsize=9)
    canvas.colorbar(shown, ax=list(grid[0]), label="share of the images")
    canvas.suptitle("pss: how often the patch of each place is kept, over the validation split", fontsize=10)
    return as_png(canvas)


def side_by_side(source: Source) -> bytes:
    """What three models keep of the same two images, at every ρ that all can be run at."""
    levels = _LEVELS[:-1]
    canvas, grid = _canvas(2 * len(_MODELS), len(levels))
    for number, arm in enumerate(_MODELS):
        run, batch = _some_images(source, arm)
        transform = DeviceTransform(run.config.data, seed=0, train=False)
        images = transform(batch, 0)
        classes = _classes(run)
        for column, point in enumerate(levels):
            with autocast(run.config, _HERE.device):
                views = views_of(run.method, images, point, batch.index)
            for image, view in enumerate(views):
                axes = grid[image * len(_MODELS) + number][column]
                _show(axes, blanked(batch.images[image], kept_of(view, run.method.model.grid_size)))
                _told(axes, view, int(batch.labels[image]), classes)
                if column == 0:
                    axes.set_ylabel(arm, fontsize=9)
    for axes, point in zip(grid[0], levels, strict=True):
        axes.set_title(f"ρ = {point:g}", fontsize=9)
    canvas.suptitle("kept patches and the likeliest class (green: right)", fontsize=10)
    return as_png(canvas)


def _some_images(source: Source, arm: str) -> tuple[Run, Batch]:
    """The first seed's run, and the split's first and last image, the same for every run."""
    run = load_run(source.folders(arm)[0], _HERE.device)
    with source.validation_split(run.config) as loader:
        batches = iter(loader)
        first = last = next(batches)
        for batch in batches:
            last = batch
    ends = [(first, slice(0, 1)), (last, slice(-1, None))]
    shown = [torch.cat([getattr(batch, part)[one] for batch, one in ends]) for part in ("images", "labels", "index")]
    return run, Batch(*shown)


def stages(source: Source) -> bytes:
    """Images without the patches that DynamicViT has dropped so far, stage by stage."""
    exhibit, classes = seen(source, "dynamicvit")
    lengths = sorted({depth for one in exhibit.pictures for depth in one.views[0].depths or [exhibit.num_blocks]})
    canvas, grid = _canvas(len(exhibit.pictures), 1 + len(lengths))
    for row, picture in zip(grid, exhibit.pictures, strict=True):
        view = picture.views[0]
        _show(row[0], picture.pixels)
        _told(row[0], view, picture.label, classes)
        depths = torch.tensor(view.depths or [exhibit.num_blocks] * exhibit.grid[0] * exhibit.grid[1])
        for axes, length in zip(row[1:], lengths, strict=True):
            _show(axes, blanked(picture.pixels, (depths >= length).view(exhibit.grid)))
            if row is grid[0]:
                axes.set_title("all blocks" if length == exhibit.num_blocks else f"block {length}", fontsize=9)
    grid[0][0].set_title("image", fontsize=9)
    canvas.suptitle(f"dynamicvit: patches that blocks still see, at ρ = {exhibit.points[0]:g}", fontsize=10)
    return as_png(canvas)


def overview(source: Source) -> bytes:
    """The idea: as ρ follows its schedule from step to step, a step sees more or fewer patches of its images."""
    exhibit, _ = seen(source, "pss", _LEVELS)
    told = source.result["plan"]
    config = recipes.get(told["recipe"]).with_settings([*told["settings"], "schedule.name=cyclic", "train.epochs=4"])
    planned = plan(config, num_images=told["num_images"], num_classes=source.result["num_classes"])
    rhos = planned.rhos[: 2 * planned.steps_per_epoch]
    canvas = Canvas(figsize=(10, 4.6), layout="constrained")
    upper, lower = canvas.subfigures(2, 1, height_ratios=(1.15, 1))
    row = upper.subplots(1, len(_LEVELS))
    picture = max(exhibit.pictures, key=lambda one: float(one.pixels.float().std()))  # not one of the sky
    for axes, point, view in zip(row, reversed(exhibit.points), reversed(picture.views), strict=True):
        _bare(axes)
        _show(axes, blanked(picture.pixels, kept_of(view, exhibit.grid)))
        axes.set_title(f"ρ = {point:g}: {len(view.kept)} patches", fontsize=9)
    axes = lower.subplots()
    axes.step(range(len(rhos)), rhos, where="post", color="#0072B2")
    axes.set_xlabel(f"step; an epoch has {planned.steps_per_epoch}")
    axes.set_ylabel("ρ")
    axes.set_ylim(0, 1.05)
    axes.grid(alpha=0.25, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    canvas.suptitle("a patch sampling schedule: what one step sees of an image, and ρ from step to step", fontsize=10)
    return as_png(canvas)


def kept_of(view: View, grid: tuple[int, int]) -> Tensor:
    """Which patches go through all blocks, bool (rows, columns)."""
    kept = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    kept[torch.tensor(view.kept, dtype=torch.long)] = True
    return kept.view(grid)


def blanked(pixels: Tensor, kept: Tensor) -> Tensor:
    """An image, uint8 (3, S, S), chequered in place of patches that are not `kept`, bool (rows, columns)."""
    size = [length // count for length, count in zip(pixels.shape[1:], kept.shape, strict=True)]
    mask = kept.repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)
    rows, columns = torch.meshgrid(*(torch.arange(length) for length in mask.shape), indexing="ij")
    chequered = torch.where((rows + columns) % 2 == 0, _GREYS[0], _GREYS[1]).to(torch.uint8)
    return torch.where(mask, pixels, chequered)


def _canvas(rows: int, columns: int, size: float = 1.35) -> tuple[Canvas, list[list[Axes]]]:
    canvas = Canvas(figsize=(0.4 + size * columns, 0.6 + (size + 0.25) * rows), layout="constrained")
    grid = canvas.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        _bare(axes)
    return canvas, [list(row) for row in grid]


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])


def _show(axes: Axes, pixels: Tensor) -> None:
    axes.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")


def _told(axes: Axes, view: View, label: int, classes: Sequence[str]) -> None:
    (best, chance), *_ = view.top
    axes.set_xlabel(
        f"{classes[best]}, {chance:.0%}", fontsize=8, color="#007A33" if best == label else "#B00020", labelpad=2
    )


_FIRST = "the first seed"
FIGURES = (
    Figure((5,), "dynamicvit_stages.png", "DynamicViT, supplement, figure 1", "images with dropped patches blanked, "
           "stage by stage", _FIRST, stages, ("dynamicvit",)),
    Figure((22,), "overview.png", "PSS figure 2", "the idea: ρ from step to step, and what a step sees", _FIRST,
           overview, ("pss",)),
    Figure((26,), "kept_patches.png", "PSS figure 5", "kept patches of images, with predictions, by ρ", _FIRST,
           predictions, ("pss",)),
    Figure((33,), "kept_places.png", "PSS figure 10", "how often each place of the grid is kept",
           f"{_FIRST}; shares of the whole validation split", places, ("pss",)),
    Figure((35,), "kept_by_model.png", "PSS figures 12 and 13", "kept patches of three models side by side, by ρ",
           _FIRST, side_by_side, _MODELS),
)  # fmt: skip
