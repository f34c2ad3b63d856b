"""Where an image is cut and how it is scaled, as pure functions over a batch. All back ends execute these numbers.

Boxes are int64 rows (top, left, height, width) in pixels of the stored image, EXIF orientation ignored.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pipelines import crng
from pipelines.base import DataConfig

Int64 = NDArray[np.int64]

_ATTEMPTS = 10
_DRAWS = 4  # per attempt: area, aspect ratio, top, left


def random_crops(heights: Int64, widths: Int64, index: Int64, *, seed: int, epoch: int, config: DataConfig) -> Int64:
    """torchvision's RandomResizedCrop: ten tries, then the largest central crop of an admitted ratio; (B, 4)."""
    keys = crng.key(seed, epoch, index, crng.CROP)
    (low_area, high_area), (low_ratio, high_ratio) = config.crop_scale, config.crop_ratio
    low_log, high_log = math.log(low_ratio), math.log(high_ratio)
    boxes = _largest_central_crops(heights, widths, low_ratio, high_ratio)  # (B, 4)
    open_rows = np.arange(len(index))  # images without an accepted try
    for attempt in range(_ATTEMPTS):
        k, h, w = keys[open_rows], heights[open_rows], widths[open_rows]
        first = attempt * _DRAWS
        # All at once: of a batch's microseconds, most are numpy's for each call.
        drawn_area, drawn_ratio, drawn_top, drawn_left = crng.u01(k, np.arange(first, first + _DRAWS)[:, None])
        area = h * w * (low_area + (high_area - low_area) * drawn_area)
        ratio = np.exp(low_log + (high_log - low_log) * drawn_ratio)
        crop_w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        crop_h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (crop_w > 0) & (crop_w <= w) & (crop_h > 0) & (crop_h <= h)
        top = (drawn_top * (h - crop_h + 1)).astype(np.int64)
        left = (drawn_left * (w - crop_w + 1)).astype(np.int64)
        boxes[open_rows[fits]] = np.stack([top, left, crop_h, crop_w], axis=1)[fits]
        open_rows = open_rows[~fits]
        if not len(open_rows):
            break
    return boxes


def _largest_central_crops(heights: Int64, widths: Int64, low_ratio: float, high_ratio: float) -> Int64:
    ratio = widths / heights
    crop_h = np.where(ratio < low_ratio, np.maximum(np.rint(widths / low_ratio), 1), heights).astype(np.int64)
    crop_w = np.where(ratio > high_ratio, np.maximum(np.rint(heights * high_ratio), 1), widths).astype(np.int64)
    return np.stack([(heights - crop_h) // 2, (widths - crop_w) // 2, crop_h, crop_w], axis=1)


def evaluation_resize(heights: Int64, widths: Int64, config: DataConfig) -> tuple[Int64, Int64]:
    """torchvision's Resize (shorter side, the longer one floored), then CenterCrop (round half to even).

    Returns the size (height, width) after resizing and the (top, left) of the crop in it, both (B, 2).
    """
    short = math.floor(config.img_size / config.crop_pct)
    sizes = np.stack([heights, widths], axis=1)
    resized = sizes * short // sizes.min(axis=1, keepdims=True)
    corners = np.rint((resized - config.img_size) / 2).astype(np.int64)
    return resized, corners


def crop_boxes(
    heights: Int64, widths: Int64, keys: Int64, *, seed: int, epoch: int, config: DataConfig, train: bool
) -> tuple[Int64, Int64]:
    """The box that a batch shows of each image, (B, 4), and the size (height, width) of what it is cut from, (B, 2):
    the stored image in training, that image resized in evaluation."""
    if train:
        boxes = random_crops(heights, widths, keys, seed=seed, epoch=epoch, config=config)
        return boxes, np.stack([heights, widths], axis=1)
    sizes, corners = evaluation_resize(heights, widths, config)
    return np.concatenate([corners, np.full_like(corners, config.img_size)], axis=1), sizes


def as_shares(boxes: Int64, sizes: Int64) -> NDArray[np.float32]:
    """`boxes` as shares of `sizes`, (B, 2) height, width. Far edges stay within 1: a sum that is 1 is so in float32."""
    return (boxes / np.tile(sizes, 2)).astype(np.float32)


def scale_boxes(boxes: Int64, sizes: Int64, stored: Int64) -> Int64:
    """The same regions in copies of the images with other sizes; `sizes` and `stored` are (B, 2) height, width.

    Edges are rounded outwards to whole pixels of the copy, so a crop never becomes empty.
    """
    corner, extent = boxes[:, :2], boxes[:, 2:]
    first = corner * stored // sizes
    last = -(-(corner + extent) * stored // sizes)
    return np.concatenate([first, last - first], axis=1)
