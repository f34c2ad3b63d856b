"""Soft labels of patches: maps that hold their own coordinates, a slow reference, and figures worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.augment.device import DeviceTransform
from pipelines.augment.operations import Op
from pipelines.base import Batch, DataConfig, View
from pss.methods.parts.token_labels import pooled_logits, soft_labels

ROW, COLUMN = 0, 1
"""The classes whose logits are coordinates in `coordinate_maps`."""


def packed(logits: Tensor, classes: Tensor) -> Tensor:
    """Maps as pss-convert writes them, of (B, k, h, w)."""
    bits = logits.half().view(torch.int16)
    return torch.stack([bits, torch.from_numpy(classes.numpy().astype(np.uint16).view(np.int16))], 1)


def coordinate_maps(height: int, width: int, count: int = 1) -> Tensor:
    rows = torch.arange(height).view(-1, 1).expand(height, width)
    columns = torch.arange(width).expand(height, width)
    classes = torch.tensor([ROW, COLUMN]).view(2, 1, 1).expand(2, height, width)
    return packed(torch.stack([rows, columns]).float()[None], classes[None]).repeat(count, 1, 1, 1, 1)


def random_maps(count: int, top: int, height: int, width: int, num_classes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    classes = torch.rand(count, num_classes, height, width, generator=generator).argsort(1)[:, :top]
    return packed(4 * torch.randn(count, top, height, width, generator=generator), classes)


def window(*crop: float, flipped: bool = False) -> View:
    return View(torch.tensor([crop]), torch.tensor([flipped]))


def random_view(count: int, seed: int = 0) -> View:
    generator = torch.Generator().manual_seed(seed)
    extent = 0.2 + 0.8 * torch.rand(count, 2, generator=generator)
    corner = torch.rand(count, 2, generator=generator) * (1 - extent)
    return View(torch.cat([corner, extent], 1), torch.rand(count, generator=generator) < 0.5)


def slowly(maps: Tensor, view: View, grid: tuple[int, int], num_classes: int, geometry: str, floor: float) -> Tensor:
    """RoI-align over maps of all classes, point by point."""
    count, _, _, height, width = maps.shape
    result = torch.zeros(count, grid[0] * grid[1], num_classes, dtype=torch.float64)
    for b in range(count):
        dense = torch.full((num_classes, height, width), floor, dtype=torch.float64)
        logits = maps[b, 0].numpy().view(np.float16)
        classes = maps[b, 1].numpy().view(np.uint16)
        for k, y, x in np.ndindex(*logits.shape):
            dense[int(classes[k, y, x]), y, x] = float(logits[k, y, x])
        top, left, tall, wide = view.crop[b].tolist()
        flipped = bool(view.flipped[b])
        if flipped:  # the mirrored map, in which the window lies on the other side
            dense, left = dense.flip(2), 1 - left - wide
        if geometry == "reference":
            top, left, tall, wide = left, top, wide, tall
        extents = max(tall * height, 1.0), max(wide * width, 1.0)
        counts = [math.ceil(extent / bins - 1e-4) for extent, bins in zip(extents, grid, strict=True)]
        for i, j in np.ndindex(*grid):
            for r, s in np.ndindex(*counts):
                v, u = (i + (r + 0.5) / counts[0]) / grid[0], (j + (s + 0.5) / counts[1]) / grid[1]
                shown = True
                for move in reversed([] if view.moves is None else view.moves[b].double().unbind()):
                    u, v = (float(row @ torch.tensor([u, v, 1.0], dtype=torch.float64)) for row in move)
                    shown = shown and 0 <= u <= 1 and 0 <= v <= 1
                y, x = top * height - 0.5 + extents[0] * v, left * width - 0.5 + extents[1] * u
                value = bilinear(dense, y, x) if shown else torch.full((num_classes,), floor, dtype=torch.float64)
                result[b, i * grid[1] + j] += value / (counts[0] * counts[1])
    return result


def bilinear(dense: Tensor, y: float, x: float) -> Tensor:
    y, x = min(max(y, 0), dense.shape[1] - 1), min(max(x, 0), dense.shape[2] - 1)
    top, left = int(y), int(x)
    below, right = min(top + 1, dense.shape[1] - 1), min(left + 1, dense.shape[2] - 1)
    v, u = y - top, x - left
    upper = dense[:, top, left] * (1 - u) + dense[:, top, right] * u
    lower = dense[:, below, left] * (1 - u) + dense[:, below, right] * u
    return upper * (1 - v) + lower * v


def test_a_window_is_where_it_says() -> None:
    """The upper right quarter: rows from the top, columns from the right."""
    shown = pooled_logits(coordinate_maps(18, 18), window(0, 0.5, 0.5, 0.5), grid=(2, 2), num_classes=2)
    expected = torch.tensor([[1.76, 10.75], [1.76, 15.24], [6.25, 10.75], [6.25, 15.24]])
    torch.testing.assert_close(shown[0], expected, atol=1e-3, rtol=0)


def test_the_reference_transposes_windows() -> None:
    options = {"grid": (2, 2), "num_classes": 2}
    maps, crop = coordinate_maps(18, 18), window(0, 0.5, 0.5, 0.5)
    published = pooled_logits(maps, crop, geometry="reference", **options)[0]  # type: ignore[arg-type]
    assert torch.allclose(
        published, torch.tensor([[10.75, 1.76], [10.75, 6.25], [15.24, 1.76], [15.24, 6.25]]), 0, 1e-3
    )
    both_ways = window(0.25, 0.25, 0.5, 0.5)
    ours, theirs = (pooled_logits(maps, both_ways, geometry=how, **options) for how in ("whole", "reference"))  # type: ignore[arg-type]
    assert torch.equal(ours, theirs)  # about the main diagonal, windows are right either way


@pytest.mark.parametrize("geometry", ["whole", "reference"])
@pytest.mark.parametrize("floor", [0.0, -3.0])
@pytest.mark.parametrize(
    ("size", "grid"), [((18, 18), (14, 14)), ((7, 9), (3, 4)), ((6, 6), (8, 8)), ((18, 18), (1, 1)), ((24, 24), (2, 2))]
)
def test_it_is_what_a_slow_reference_finds(
    size: tuple[int, int], grid: tuple[int, int], floor: float, geometry: str
) -> None:
    maps, view = random_maps(5, 3, *size, num_classes=11), random_view(5)
    turned = torch.tensor([[0.9011, -0.3, 0.2013], [0.3, 0.9011, -0.1017]])  # no point of a bin on the edge
    shifted = torch.tensor([[1.0, 0.2019, 0.0], [0.0, 1.0, 0.3029]])
    for moves in (None, torch.stack([turned, shifted]).repeat(5, 1, 1, 1)):
        given = replace(view, moves=moves)
        ours = pooled_logits(maps, given, grid=grid, num_classes=11, geometry=geometry, floor=floor)  # type: ignore[arg-type]
        expected = slowly(maps, given, grid, 11, geometry, floor)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), expected, atol=2e-5, rtol=0)


def test_the_window_of_a_moved_image_is_moved() -> None:
    """A negative control for the reference: leaving the moves out would be far off."""
    shifted = torch.tensor([[1.0, 0.0, 0.25], [0.0, 1.0, 0.0]]).view(1, 1, 2, 3)
    maps, whole = coordinate_maps(16, 16), window(0, 0, 1, 1)
    still = pooled_logits(maps, whole, grid=(4, 4), num_classes=2)[0]
    moved = pooled_logits(maps, replace(whole, moves=shifted), grid=(4, 4), num_classes=2)[0]
    assert torch.allclose(moved.view(4, 4, 2)[:, :3], still.view(4, 4, 2)[:, 1:])
    assert not moved.view(4, 4, 2)[:, 3].any()  # outside of the image: nothing
    uniform = soft_labels(maps, replace(whole, moves=shifted), grid=(4, 4), num_classes=2)[0].view(4, 4, 2)[:, 3]
    assert torch.allclose(uniform, torch.tensor(0.525))


def test_labels_move_with_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mirrored, then rotated and sheared: of a coordinate map, patches say what the coordinate image shows there."""
    side, grid, count = 84, (7, 7), 6
    config = DataConfig(img_size=side, rand_augment="rand-m9-inc1-n2", mean=(0, 0, 0), std=(1, 1, 1))
    transform = DeviceTransform(config, seed=1, train=True)
    operations = np.array([[Op.ROTATE, Op.SHEAR_X, Op.TRANSLATE_Y] * 2, [Op.SHEAR_Y, Op.TRANSLATE_X, Op.NONE] * 2])
    arguments = np.array([[25.0, 0.25, 15.0] * 2, [0.2, -20.0, 0.0] * 2])
    assert transform._augment is not None
    monkeypatch.setattr(transform._augment, "draw", lambda *_: (operations, arguments))
    shares = (torch.arange(side) + 0.5) / side
    image = torch.stack([torch.ones(side, side), *torch.meshgrid(shares, shares, indexing="ij")])
    images = (240 * image).round().to(torch.uint8).repeat(count, 1, 1, 1)
    whole = View(torch.tensor([[0.0, 0, 1, 1]]).repeat(count, 1), torch.zeros(count, dtype=torch.bool))
    batch = Batch(images, torch.zeros(count, dtype=torch.int64), torch.arange(count), view=whole)
    values, view = transform.with_view(batch, 0)
    assert 0 < view.flipped.sum() < count
    means = torch.nn.functional.adaptive_avg_pool2d(values * 255 / 240, grid).flatten(2).transpose(1, 2)
    full = means[..., 0] > 0.999  # patches that nothing came into from outside
    assert full.float().mean() > 0.3
    told = pooled_logits(coordinate_maps(42, 42, count), view, grid=grid, num_classes=2)
    assert ((told + 0.5) / 42 - means[..., 1:])[full].abs().max() < 0.01
    still = pooled_logits(coordinate_maps(42, 42, count), replace(view, moves=None), grid=grid, num_classes=2)
    assert ((still + 0.5) / 42 - means[..., 1:])[full].abs().max() > 0.1


def test_torchvision_agrees() -> None:
    ops = pytest.importorskip("torchvision.ops")
    maps, view = random_maps(6, 5, 18, 18, num_classes=40), random_view(6)
    dense = torch.zeros(6, 40, 18, 18)
    dense.scatter_(1, maps[:, 1].long(), maps[:, 0].view(torch.float16).float())
    dense = torch.where(view.flipped.view(-1, 1, 1, 1), dense.flip(-1), dense)
    top, left, height, width = view.crop.unbind(1)
    left = torch.where(view.flipped, 1 - left - width, left)
    boxes = 18 * torch.stack([left, top, left + width, top + height], 1) - 0.5
    for grid in ((14, 14), (1, 1), (5, 9)):
        rois = torch.cat([torch.arange(6.0)[:, None], boxes], 1)
        expected = ops.roi_align(dense, rois, grid, aligned=False, sampling_ratio=-1).flatten(2).transpose(1, 2)
        torch.testing.assert_close(pooled_logits(maps, view, grid=grid, num_classes=40), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_classes", [1000, 21841])
def test_every_class_is_exact(num_classes: int) -> None:
    """In float16 numbers above 2,048 would be others; in int16 alone those above 32,767 would be negative."""
    classes = torch.linspace(0, num_classes - 1, 4 * 5 * 5).long().view(1, 4, 5, 5)
    maps = packed(torch.ones(1, 4, 5, 5), classes)
    pooled = pooled_logits(maps, window(0, 0, 1, 1), grid=(5, 5), num_classes=num_classes)[0]
    for place in range(25):
        assert pooled[place].nonzero().flatten().tolist() == sorted(classes[0].flatten(1)[:, place].tolist())
    whole = soft_labels(maps, window(0, 0, 1, 1), grid=(1, 1), num_classes=num_classes)[1][0]
    assert len((whole > whole.min()).nonzero()) == 100


def test_the_highest_numbers_of_classes_are_not_negative() -> None:
    maps = packed(torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 65534))
    pooled = pooled_logits(maps, window(0, 0, 1, 1), grid=(2, 2), num_classes=65535)
    assert pooled.nonzero()[:, 2].tolist() == [65534] * 4


def test_the_values_of_a_label() -> None:
    """Softmax of pooled logits, absent classes at 0, then smoothing that adds a little to the sum."""
    classes = torch.arange(5).view(1, 5, 1, 1).expand(1, 5, 6, 6)
    whole = window(0, 0, 1, 1)
    flat = packed(torch.zeros(1, 5, 6, 6), classes)
    for labels in soft_labels(flat, whole, grid=(3, 3), num_classes=1000, smoothing=0.0):
        assert torch.allclose(labels, torch.tensor(1e-3))
    peak = torch.zeros(1, 5, 6, 6)
    peak[:, 0] = 10
    for smoothing, expected, total in ((0.0, 0.95661, 1.0), (0.1, 0.86115, 1.0001)):
        patches, image = soft_labels(packed(peak, classes), whole, grid=(3, 3), num_classes=1000, smoothing=smoothing)
        for labels in (patches, image):
            assert torch.allclose(labels[..., 0], torch.tensor(expected), atol=1e-5)
            assert torch.allclose(labels.sum(-1), torch.tensor(total), atol=1e-5)
    half = peak.clone()
    half[..., 3:] = 0  # a patch over both halves: the softmax of means is not the mean of softmaxes
    _, image = soft_labels(packed(half, classes), whole, grid=(3, 3), num_classes=1000, smoothing=0.0)
    assert abs(image[0, 0].item() - (0.95661 + 0.001) / 2) > 0.3
    low = soft_labels(flat, whole, grid=(3, 3), num_classes=1000, smoothing=0.0, floor=-20.0)[0]
    assert torch.allclose(low[..., :5], torch.tensor(0.2), atol=1e-4)


def test_a_mirrored_image_has_mirrored_labels() -> None:
    maps, view = random_maps(4, 5, 18, 18, num_classes=30), random_view(4)
    patches, image = soft_labels(maps, view, grid=(14, 14), num_classes=30)
    mirrored, other = soft_labels(maps, replace(view, flipped=~view.flipped), grid=(14, 14), num_classes=30)
    assert torch.allclose(mirrored.view(4, 14, 14, 30).flip(2), patches.view(4, 14, 14, 30), atol=1e-6)
    assert torch.allclose(other, image, atol=1e-6)


def test_images_do_not_depend_on_each_other() -> None:
    maps, view = random_maps(6, 5, 18, 18, num_classes=30), random_view(6)
    patches, image = soft_labels(maps, view, grid=(14, 14), num_classes=30)
    for i in range(6):
        alone = soft_labels(
            maps[i : i + 1], View(view.crop[i : i + 1], view.flipped[i : i + 1]), grid=(14, 14), num_classes=30
        )
        assert torch.equal(alone[0], patches[i : i + 1])
        assert torch.equal(alone[1], image[i : i + 1])


def test_maps_of_numbers_are_taken_as_well() -> None:
    """As the authors' files have them: float16, classes among them."""
    maps, view = random_maps(3, 5, 18, 18, num_classes=1000), random_view(3)
    numbers = torch.stack([maps[:, 0].view(torch.float16), maps[:, 1].half()], 1)
    assert numbers.dtype == torch.float16
    for ours, theirs in zip(
        soft_labels(maps, view, grid=(14, 14), num_classes=1000),
        soft_labels(numbers, view, grid=(14, 14), num_classes=1000),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_it_can_be_traced_as_one_graph() -> None:
    maps, view = random_maps(3, 5, 18, 18, num_classes=20), random_view(3)

    def labels(maps: Tensor, crop: Tensor, flipped: Tensor) -> tuple[Tensor, Tensor]:
        return soft_labels(maps, View(crop, flipped), grid=(14, 14), num_classes=20)

    traced = torch.compile(labels, fullgraph=True, backend="eager")(maps, view.crop, view.flipped)
    for one, other in zip(traced, labels(maps, view.crop, view.flipped), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_nothing_waits_and_every_run_is_the_same() -> None:
    maps, view = random_maps(6, 5, 18, 18, num_classes=1000), random_view(6)
    moves = torch.tensor([[0.9011, -0.3, 0.2013], [0.3, 0.9011, -0.1017]]).repeat(6, 1, 1, 1)
    expected = soft_labels(maps, replace(view, moves=moves), grid=(14, 14), num_classes=1000)
    there, given = maps.cuda(), View(view.crop.cuda(), view.flipped.cuda(), moves.cuda())
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = (soft_labels(there, given, grid=(14, 14), num_classes=1000) for _ in range(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other, on_host in zip(first, second, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one.cpu(), on_host, atol=1e-5, rtol=1e-4)
