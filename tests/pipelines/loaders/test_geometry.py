"""Crop and evaluation geometry against torchvision's own functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from pipelines import crng
from pipelines.base import DataConfig
from pipelines.loaders.geometry import as_shares, crop_boxes, evaluation_resize, random_crops, scale_boxes

side = st.integers(1, 3000)
sizes = st.lists(st.tuples(side, side), min_size=1, max_size=16)


def _columns(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    array = np.array(pairs, dtype=np.int64)
    return array[:, 0], array[:, 1]


@given(pairs=sizes, epoch=st.integers(0, 500))
def test_crops_lie_inside(pairs: list[tuple[int, int]], epoch: int) -> None:
    heights, widths = _columns(pairs)
    top, left, height, width = random_crops(
        heights, widths, np.arange(len(pairs)), seed=0, epoch=epoch, config=DataConfig()
    ).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top + height <= heights).all()
    assert (left + width <= widths).all()


def test_a_crop_depends_on_its_sample_alone() -> None:
    """Neither on its batch nor on its place in it."""
    heights, widths = np.arange(100, 164), np.arange(300, 364)
    index = np.arange(64)[::-1].copy()
    together = random_crops(heights, widths, index, seed=4, epoch=5, config=DataConfig())
    for i in (0, 13, 63):
        one = slice(i, i + 1)
        alone = random_crops(heights[one], widths[one], index[one], seed=4, epoch=5, config=DataConfig())
        assert np.array_equal(alone[0], together[i])
    other = random_crops(heights, widths, index, seed=4, epoch=6, config=DataConfig())
    assert (other != together).any(axis=1).mean() > 0.9


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.7, 1.0)])
def test_the_first_try_that_fits_is_taken(scale: tuple[float, float]) -> None:
    """To the bit what trying one after the other gives, as torchvision does; 4 draws a try."""
    rng, config = np.random.default_rng(0), DataConfig(crop_scale=scale)
    heights, widths, index = rng.integers(20, 400, 400), rng.integers(20, 400, 400), rng.integers(0, 1 << 50, 400)
    logs = np.log(config.crop_ratio)
    found = random_crops(heights, widths, index, seed=2, epoch=3, config=config)
    taken = np.zeros(400, np.int64)
    for i, (h, w, k) in enumerate(zip(heights, widths, crng.key(2, 3, index, crng.CROP), strict=True)):
        for attempt in range(10):
            u = [float(crng.u01(k, 4 * attempt + draw)) for draw in range(4)]
            area = h * w * (scale[0] + (scale[1] - scale[0]) * u[0])
            ratio = np.exp(logs[0] + (logs[1] - logs[0]) * u[1])
            crop_h, crop_w = round(np.sqrt(area / ratio)), round(np.sqrt(area * ratio))
            if 0 < crop_h <= h and 0 < crop_w <= w:
                box = [int(u[2] * (h - crop_h + 1)), int(u[3] * (w - crop_w + 1)), crop_h, crop_w]
                assert found[i].tolist() == box
                taken[i] = attempt + 1
                break
    for i in range(400):  # all that was found depends on no other image
        one = slice(i, i + 1)
        alone = random_crops(heights[one], widths[one], index[one], seed=2, epoch=3, config=config)
        assert np.array_equal(alone[0], found[i])
    assert {0, 1, 2, 5} <= set(taken.tolist())


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (100, 1000), (60, 40)], ids=lambda n: str(n))
def test_crops_are_distributed_as_torchvisions(height: int, width: int) -> None:
    """Means of position, size and area over 4,000 draws of each, within five standard errors."""
    n = 4000
    config = DataConfig(crop_scale=(0.2, 0.9))
    ours = random_crops(np.full(n, height), np.full(n, width), np.arange(n), seed=1, epoch=0, config=config).astype(
        float
    )
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    transform = v2.RandomResizedCrop(8, scale=config.crop_scale, ratio=config.crop_ratio)
    drawn = [transform.make_params([image]) for _ in range(n)]
    theirs = np.array([[d["top"], d["left"], d["height"], d["width"]] for d in drawn], dtype=float)
    for a, b in zip(
        (*ours.T, ours[:, 2] * ours[:, 3], ours[:, 3] / ours[:, 2]),
        (*theirs.T, theirs[:, 2] * theirs[:, 3], theirs[:, 3] / theirs[:, 2]),
        strict=True,
    ):
        error = np.sqrt((a.var() + b.var()) / n)
        assert abs(a.mean() - b.mean()) <= 5 * error
        assert abs(a.std() - b.std()) <= 5 * error


def test_the_central_fallback_is_torchvisions() -> None:
    """Strips too long for any admitted ratio: no try succeeds, and both crop the centre."""
    for height, width in ((10, 2000), (2000, 10), (7, 1501)):
        config = DataConfig(crop_scale=(0.9, 1.0))
        box = random_crops(np.array([height]), np.array([width]), np.array([0]), seed=0, epoch=0, config=config)[0]
        transform = v2.RandomResizedCrop(8, scale=config.crop_scale, ratio=config.crop_ratio)
        theirs = transform.make_params([torch.empty(3, height, width)])
        assert box.tolist() == [theirs[name] for name in ("top", "left", "height", "width")]


@settings(max_examples=40)
@given(
    height=st.integers(2, 600),
    width=st.integers(2, 600),
    img_size=st.integers(1, 64),
    crop_pct=st.sampled_from([0.875, 0.9, 0.95, 1.0]),
)
def test_evaluation_is_resize_then_centre_crop(height: int, width: int, img_size: int, crop_pct: float) -> None:
    config = DataConfig(img_size=img_size, crop_pct=crop_pct)
    resized, corner = evaluation_resize(np.array([height]), np.array([width]), config)
    image = torch.arange(height * width, dtype=torch.float32).view(1, height, width)
    scaled = v2.Resize(int(img_size / crop_pct), interpolation=v2.InterpolationMode.NEAREST)(image)
    assert resized[0].tolist() == list(scaled.shape[1:])
    top, left = corner[0]
    ours = scaled[:, top : top + img_size, left : left + img_size]
    assert torch.equal(ours, v2.CenterCrop(img_size)(scaled))


@given(pairs=sizes, stored=sizes)
def test_scaled_boxes_cover_the_same_region(pairs: list[tuple[int, int]], stored: list[tuple[int, int]]) -> None:
    n = min(len(pairs), len(stored))
    heights, widths = _columns(pairs[:n])
    boxes = random_crops(heights, widths, np.arange(n), seed=0, epoch=0, config=DataConfig())
    before, after = np.array(pairs[:n]), np.array(stored[:n])
    scaled = scale_boxes(boxes, before, after)
    first, last = scaled[:, :2], scaled[:, :2] + scaled[:, 2:]
    ratio = after / before
    assert (first >= 0).all()
    assert (last > first).all()
    assert (last <= after).all()
    assert (np.abs(first - boxes[:, :2] * ratio) < 1).all()
    assert (np.abs(last - (boxes[:, :2] + boxes[:, 2:]) * ratio) < 1).all()
    assert np.array_equal(scale_boxes(boxes, before, before), boxes)


@given(
    pairs=sizes,
    epoch=st.integers(0, 500),
    train=st.booleans(),
    img_size=st.integers(1, 512),
    crop_pct=st.floats(0.1, 1.0),
    ratio=st.sampled_from([(3 / 4, 4 / 3), (0.01, 100.0)]),
)
def test_windows_lie_inside(
    pairs: list[tuple[int, int]],
    epoch: int,
    train: bool,
    img_size: int,
    crop_pct: float,
    ratio: tuple[float, float],
) -> None:
    """In float32, far edges included: whoever adds them up never reads beyond an image."""
    heights, widths = _columns(pairs)
    config = DataConfig(img_size=img_size, crop_pct=crop_pct, crop_ratio=ratio)
    boxes, cut_from = crop_boxes(
        heights, widths, np.arange(len(pairs)), seed=0, epoch=epoch, config=config, train=train
    )
    windows = as_shares(boxes, cut_from)
    assert windows.dtype == np.float32
    assert windows.shape == (len(pairs), 4)
    assert (windows[:, :2] >= 0).all()
    assert (windows[:, 2:] > 0).all()
    assert (windows[:, :2] + windows[:, 2:] <= 1).all()
    assert np.allclose(windows * np.tile(cut_from, 2), boxes, rtol=1e-6, atol=1e-3)


@given(parts=st.lists(st.integers(1, 1 << 20), min_size=2, max_size=2))
def test_an_edge_at_the_end_is_at_one(parts: list[int]) -> None:
    first, rest = parts
    box = np.array([[first, 0, rest, first + rest]])
    top, left, height, width = as_shares(box, np.full((1, 2), first + rest))[0]
    assert top + height == 1
    assert left + width == 1
