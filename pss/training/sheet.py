"""A sheet of a run's first images, as its model gets them, with what it drops of them greyed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipelines.base import DataConfig
from pss.inference.accuracy import draws_of
from pss.methods import Method, Point
from pss.models.sampling import spread
from pss.training.setup import positions_of

IMAGES = 8
_MOST_ROWS, _MOST_STEPS = 6, 4000
_SIDE, _GAP, _MARGIN = 128, 6, 76  # in pixels
_VEIL = np.array([127.0, 141.0, 163.0])  # the report's
_PAPER, _INK = "#ffffff", "#1c2430"

Row = tuple[Point, Tensor]
"""An operating point, and which share of the blocks each patch goes through: (B, rows, columns) on the host."""


def levels(method: Method, total_steps: int) -> list[Point]:
    """The operating points that a run trains at, the largest first; the method's own where its steps are all alike."""
    if type(method).stage is Method.stage or method.points() == (None,):
        return [method.points()[0]]
    steps = {*range(min(total_steps, _MOST_STEPS)), total_steps - 1}
    steps |= {number * total_steps // _MOST_STEPS for number in range(_MOST_STEPS)}
    found = sorted({method.stage(at).rho for at in positions_of(method, steps)}, reverse=True)
    if len(found) > _MOST_ROWS:
        found = [found[number * (len(found) - 1) // (_MOST_ROWS - 1)] for number in range(_MOST_ROWS)]
    return [*found]


@torch.no_grad()  # in inference mode, what a model keeps for the next call could not be trained with
def seen(method: Method, images: Tensor, points: Sequence[Point], autocast: AbstractContextManager[Any]) -> list[Row]:
    """What the method keeps of images (B, 3, S, S) at each point. It, and all random numbers, are left as they were."""
    model = method.model
    modes = [(part, part.training) for part in method.modules()]
    graphs, model.graphs = model.graphs, None  # a batch of this size would be compiled for
    method.eval()
    rows = []
    try:
        for point in points:
            with autocast, draws_of(torch.arange(len(images)), images.device):
                shares = _shares(method, images, point)
            if shares is not None:
                rows.append((point, shares.cpu()))
    finally:
        model.graphs = graphs
        for part, training in modes:
            part.training = training
    return rows


def _shares(method: Method, images: Tensor, point: Point) -> Tensor | None:
    """Of one point; None for smaller images than the model's where only the method knows what it keeps."""
    model = method.model
    grid = model.grid_of((images.shape[-2], images.shape[-1]))
    if grid == model.grid_size:
        depths = method.depths(images, point)
    elif type(method).depths is not Method.depths or point is None:
        return None
    else:
        kept = model.see(images, point, low_resolution=True)[1]
        assert kept is not None
        depths = method.depths_of(images, kept.expand(len(images), -1))[:, spread(grid, model.grid_size, images.device)]
    return (depths / len(model.blocks)).reshape(-1, *grid)


def draw(images: Tensor, rows: Sequence[Row], data: DataConfig, knob: str = "ρ") -> bytes:
    """The sheet as a PNG: images (B, 3, S, S) as they are, then what is kept of them at each point, the rest greyed.

    A point at which nothing is dropped has no row of its own.
    """
    pixels = _pixels(images, data)
    count, side = len(pixels), pixels.shape[1]
    sheet = [("images", pixels)]
    for point, shares in rows:
        if bool((shares < 1).any()):
            sheet.append(("as trained" if point is None else f"{knob} {point:.3g}", _veiled(pixels, shares.numpy())))
    scale = max(1, _SIDE // side)
    cell = side * scale + _GAP
    size = _MARGIN + count * cell, len(sheet) * cell + _GAP
    paper, font = Image.new("RGB", size, _PAPER), _font()
    pen = ImageDraw.Draw(paper)
    for number, (label, line) in enumerate(sheet):
        top = _GAP + number * cell
        pen.text((_MARGIN - _GAP, top + side * scale // 2), label, fill=_INK, font=font, anchor="rm")
        for place, image in enumerate(line):
            shown = Image.fromarray(image.round().astype(np.uint8))
            paper.paste(shown.resize((side * scale,) * 2, Image.Resampling.NEAREST), (_MARGIN + place * cell, top))
    content = io.BytesIO()
    paper.save(content, format="png")
    return content.getvalue()


def _pixels(images: Tensor, data: DataConfig) -> NDArray[np.floating[Any]]:
    """Denormalised, 0 to 255, (B, S, S, 3)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    pixels = (images.float().cpu() * std + mean).clamp(0, 1) * 255
    found: NDArray[np.floating[Any]] = pixels.permute(0, 2, 3, 1).numpy()
    return found


def _veiled(pixels: NDArray[np.floating[Any]], shares: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Patches greyed by the share of blocks that do not see them."""
    side, (rows, columns) = pixels.shape[1], shares.shape[1:]
    veil = (1 - shares).repeat(side // rows, axis=1).repeat(side // columns, axis=2)[..., None]
    return np.asarray(pixels * (1 - veil) + _VEIL * veil)


def _font() -> Any:
    """matplotlib's, which has the letter ρ; it comes with every installation."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 14)
