"""Soft labels for every patch, made on the device from label maps (Jiang et al., *All Tokens Matter*, NeurIPS 2021).

A label map holds the k largest logits of a teacher, and their classes, at every place of a grid over the stored image:

    (B, 2, k, h, w)   plane 0 the logits, plane 1 the classes; int16 with the bits of float16 and of uint16, as
                      `pss-convert --token-labels` writes them, or numbers, as the authors' files have them

A patch's label is the mean of what its part of the window shows of the map, all other classes having the logit `floor`;
after the mean comes the softmax. The mean is that of RoI-align (He et al., *Mask R-CNN*, 2017) as the authors call it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pipelines.base import View

Geometry = Literal["whole", "reference"]

_FIXED = float(1 << 32)
"""What 1 is in sums of whole numbers, which come out the same in any order."""


@torch.no_grad()
def soft_labels(
    maps: Tensor,
    view: View,
    *,
    grid: tuple[int, int],
    num_classes: int,
    smoothing: float = 0.1,
    geometry: Geometry = "whole",
    floor: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Targets of each patch and of the image as a whole, for what the view shows of the samples.

    Args:
        maps: Of the samples, (B, 2, k, h, w), on the device of the view.
        view: Of the images that the student sees.
        grid: Rows and columns of the student's patches, which may be of any number.
        num_classes: K, above every class in the maps.
        smoothing: e, of which each class gets e / K more, and 1 - e + e / K is left of the teacher's. Rows sum to
            1 + e / K, as published.
        geometry: `whole`: maps lie over the whole stored image. `reference`: as the authors' code has it, which hands
            (top, left, ...) to what takes (x, y, ...), so that windows are mirrored about the main diagonal. Only for
            comparisons with what they published, whose maps cover the image's central square besides.
        floor: The logit of classes that are not among a place's k.

    Returns:
        float32 (B, rows * columns, K), and float32 (B, K): that of a single patch as large as the image, not the mean
        of the patches.
    """
    options = {"num_classes": num_classes, "geometry": geometry, "floor": floor}
    patches = pooled_logits(maps, view, grid=grid, **options)  # type: ignore[arg-type]
    image = pooled_logits(maps, view, grid=(1, 1), **options)[:, 0]  # type: ignore[arg-type]
    return _smoothed(patches, smoothing), _smoothed(image, smoothing)


@torch.no_grad()
def pooled_logits(
    maps: Tensor,
    view: View,
    *,
    grid: tuple[int, int],
    num_classes: int,
    geometry: Geometry = "whole",
    floor: float = 0.0,
) -> Tensor:
    """What `soft_labels` takes the softmax of, float32 (B, rows * columns, K); see there.

    Only the classes that are there are added up: no map of all classes is made. The result is the same, to the bit, on
    every run: whatever is added in no particular order is a whole number.
    """
    logits, classes = _unpacked(maps)  # (B, h * w, k)
    cells, weights = _taps(view, (maps.shape[-2], maps.shape[-1]), grid, geometry)  # (B, N, T)
    shape = (len(maps), grid[0] * grid[1], num_classes)
    logits = logits - floor
    if shape[1] == 1:  # thousands of taps of a few classes, into a small result
        found = logits.gather(1, cells.transpose(1, 2).expand(-1, -1, logits.shape[2]))  # (B, T, k)
        at = classes.gather(1, cells.transpose(1, 2).expand(-1, -1, logits.shape[2]))
        parts = (found.double() * weights.transpose(1, 2) * _FIXED).round().long().flatten(1)
        total = torch.zeros(shape[0], num_classes, dtype=torch.int64, device=maps.device)
        pooled = (total.scatter_add_(1, at.flatten(1), parts).double() / _FIXED).float()[:, None]
    else:  # few taps; those of one number have distinct classes, which are added one after the other
        pooled = torch.zeros(shape, device=maps.device)
        for number in range(cells.shape[2]):
            at = cells[:, :, number, None].expand(-1, -1, logits.shape[2])  # (B, N, k)
            pooled.scatter_add_(2, classes.gather(1, at), logits.gather(1, at) * weights[:, :, number, None])
    return pooled + floor if floor else pooled


def _unpacked(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, float32, and classes, int64, each (B, h * w, k)."""
    logits, classes = maps.flatten(3).transpose(2, 3).unbind(1)
    if maps.dtype == torch.int16:
        return logits.view(torch.float16).float(), classes.long() & 0xFFFF
    return logits.float(), classes.long()


def _taps(view: View, size: tuple[int, int], grid: tuple[int, int], geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Cells of the maps, of `size`, that each bin of the grid is a mean of, and their weights: int64 and float32
    (B, N, T). Of a bin's points, as many along each side as it is cells long, each has four."""
    crop, mirrored = view.crop, view.flipped[:, None, None, None, None]
    top, left, height, width = crop.unbind(1)
    left = torch.where(view.flipped, 1 - left - width, left)  # in the image as it is shown, mirrored or not
    if geometry == "reference":
        top, left, height, width = left, top, width, height
    # Of at least one cell, as RoI-align's windows are.
    rows, columns = (height * size[0]).clamp(min=1), (width * size[1]).clamp(min=1)
    y, share_y = _points(rows, grid[0], -(-size[0] // grid[0]))  # (B, rows, R) and (B, 1, R)
    x, share_x = _points(columns, grid[1], -(-size[1] // grid[1]))
    shape = (*y.shape[:2], x.shape[1], y.shape[2], x.shape[2])  # (B, rows, columns, R, R)
    weight = (share_y[:, :, None, :, None] * share_x[:, None, :, None, :]).expand(shape)
    y, x = y[:, :, None, :, None].expand(shape), x[:, None, :, None, :].expand(shape)  # shares of what is shown
    if view.moves is not None:
        for move in reversed(view.moves.unbind(1)):
            (a, b, c), (d, e, f) = ([one[:, None, None, None, None] for one in row.unbind(1)] for row in move.unbind(1))
            x, y = a * x + b * y + c, d * x + e * y + f
            weight = weight * ((x >= 0) & (x <= 1) & (y >= 0) & (y <= 1))
    y, x = (
        start[:, None, None, None, None] * cells - 0.5 + extent[:, None, None, None, None] * at
        for start, cells, extent, at in ((top, size[0], rows, y), (left, size[1], columns, x))
    )
    x = torch.where(mirrored, size[1] - 1 - x, x)
    weight = weight * ((y >= -1) & (y <= size[0]) & (x >= -1) & (x <= size[1]))
    y, x = y.clamp(0, size[0] - 1).flatten(3).flatten(1, 2), x.clamp(0, size[1] - 1).flatten(3).flatten(1, 2)
    first_y, first_x = y.floor(), x.floor()
    part_y, part_x = y - first_y, x - first_x
    cells, weights = [], []
    for row, share_row in ((first_y, 1 - part_y), (first_y + 1, part_y)):
        for column, share_column in ((first_x, 1 - part_x), (first_x + 1, part_x)):
            # One beyond the last has no weight.
            cells.append(row.clamp(max=size[0] - 1).long() * size[1] + column.clamp(max=size[1] - 1).long())
            weights.append(weight.flatten(3).flatten(1, 2) * share_row * share_column)
    return torch.cat(cells, 2), torch.cat(weights, 2)


def _points(extent: Tensor, bins: int, most: int) -> tuple[Tensor, Tensor]:
    """Where to look along a side, in shares of it, (B, bins, most), and the weight of each point, (B, 1, most): as many
    in a bin as it is cells long, rounded up, evenly spread.

    Args:
        extent: Of the window, in cells, (B,).
        bins: That it is divided into.
        most: Points in a bin, at most.
    """
    count = (extent / bins - 1e-4).ceil().clamp(1, most)[:, None, None]  # rounding must not add one
    number = torch.arange(most, device=extent.device)
    first = torch.arange(bins, device=extent.device)[:, None]
    return (first + (number + 0.5) / count) / bins, (number < count) / count


def _smoothed(logits: Tensor, smoothing: float) -> Tensor:
    share = smoothing / logits.shape[-1]
    return logits.softmax(-1).mul_(1 - smoothing + share).add_(share)
