"""The transform on the device: normalisation as torchvision's, flips decided by seed, epoch and sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from pipelines import Batch, DataConfig, View, crng
from pipelines.augment.device import DeviceTransform

CONFIG = DataConfig(img_size=8)


def _batch(size: int, first: int = 0) -> Batch:
    images = torch.randint(0, 256, (size, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.zeros(size, dtype=torch.int64), torch.arange(first, first + size))


def _reference(images: torch.Tensor) -> torch.Tensor:
    return v2.Normalize(CONFIG.mean, CONFIG.std)(images.float() / 255)


def test_evaluation_normalises_as_torchvision() -> None:
    batch = _batch(5)
    values = DeviceTransform(CONFIG, seed=0, train=False)(batch, 0)
    assert (values.dtype, values.is_contiguous()) == (torch.float32, True)
    torch.testing.assert_close(values, _reference(batch.images))


def test_memory_layout_makes_no_difference() -> None:
    batch = _batch(4)
    other = Batch(batch.images.contiguous(memory_format=torch.channels_last), batch.labels, batch.index)
    transform = DeviceTransform(CONFIG, seed=0, train=True)
    a, b = transform(batch, 1), transform(other, 1)
    assert torch.equal(a, b)
    assert a.stride() == b.stride()


def test_flips_follow_the_sample() -> None:
    """Exactly the samples that the numpy twin draws, wherever they are in a batch; half of them; others next epoch."""
    transform = DeviceTransform(CONFIG, seed=3, train=True)
    batch = _batch(512)
    plain, mirrored = _reference(batch.images), _reference(batch.images.flip(-1))
    flipped = {}
    for epoch in (0, 1):
        draws = crng.u01(crng.key(3, epoch, np.arange(512), crng.FLIP), 0) < 0.5
        expected = torch.where(torch.from_numpy(draws).view(-1, 1, 1, 1), mirrored, plain)
        torch.testing.assert_close(transform(batch, epoch), expected)
        flipped[epoch] = draws
    assert 200 < flipped[0].sum() < 312
    assert 200 < (flipped[0] != flipped[1]).sum() < 312
    part = Batch(batch.images[100:], batch.labels[100:], batch.index[100:])
    assert torch.equal(transform(part, 0), transform(batch, 0)[100:])


@pytest.mark.parametrize(("share", "train"), [(0.5, True), (0.0, True), (1.0, True), (0.5, False)])
@pytest.mark.parametrize("mirrored", [False, True])
def test_the_view_is_of_the_prepared_images(share: float, train: bool, mirrored: bool) -> None:
    """Mirrored are those that come out so, whatever they were when they came; the window stays."""
    config = DataConfig(img_size=8, flip=share, rand_augment="rand-m9-mstd0.5-inc1-n2", erasing=0.5)
    batch, crop = _batch(64), torch.rand(64, 4)
    batch = replace(batch, view=View(crop, torch.full((64,), mirrored)))
    augmented, view = DeviceTransform(config, seed=3, train=train).with_view(batch, 2)
    assert torch.equal(augmented, DeviceTransform(config, seed=3, train=train)(batch, 2))
    assert torch.equal(view.crop, crop)
    draws = crng.u01(crng.key(3, 2, np.arange(64), crng.FLIP), 0) < (share if train else 0)
    assert view.flipped.tolist() == (draws ^ mirrored).tolist()
    assert batch.view is not None
    assert (batch.view.flipped == mirrored).all()  # the loader's is left alone


def test_a_batch_without_a_view_has_none_to_complete() -> None:
    transform = DeviceTransform(CONFIG, seed=0, train=True)
    with pytest.raises(ValueError, match=r"batch\.view is None"):
        transform.with_view(_batch(2), 0)
    assert len(transform(_batch(2), 0)) == 2


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_share_of_flips_is_a_setting(share: float) -> None:
    batch = _batch(16)
    values = DeviceTransform(DataConfig(img_size=8, flip=share), seed=0, train=True)(batch, 0)
    torch.testing.assert_close(values, _reference(batch.images.flip(-1) if share else batch.images))


def test_the_batch_is_left_alone() -> None:
    batch = _batch(16)
    before = batch.images.clone()
    DeviceTransform(CONFIG, seed=0, train=True)(batch, 0)
    assert torch.equal(batch.images, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_does_the_same() -> None:
    batch = _batch(64)
    there = Batch(batch.images.cuda(), batch.labels.cuda(), batch.index)
    on_cpu, on_gpu = (DeviceTransform(CONFIG, seed=0, train=True) for _ in range(2))
    torch.testing.assert_close(on_gpu(there, 2).cpu(), on_cpu(batch, 2))


def test_copies_of_a_sample_are_flipped_by_their_own_draws() -> None:
    images = _batch(1).images.expand(512, 3, 8, 8)
    labels, index = torch.zeros(512, dtype=torch.int64), torch.full((512,), 7)
    transform = DeviceTransform(CONFIG, seed=3, train=True)
    copies = transform(Batch(images, labels, index, torch.arange(512)), 0)
    alike = (copies == copies[:1]).flatten(1).all(1)
    assert 200 < alike.sum() < 312
    assert torch.equal(copies[:1], transform(Batch(images[:1], labels[:1], index[:1]), 0))


def test_the_deit_chain_is_the_same_for_a_sample_in_any_batch() -> None:
    config = DataConfig(img_size=32, rand_augment="rand-m9-mstd0.5-inc1-n2", erasing=0.5)
    transform = DeviceTransform(config, seed=3, train=True)
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    index = torch.arange(100, 112)
    whole = transform(Batch(images, index, index), epoch=5)
    for rows in ([3], [7, 2, 11]):
        part = transform(Batch(images[rows].clone(), index[rows], index[rows]), epoch=5)
        assert torch.equal(part, whole[rows])
    plain = DeviceTransform(DataConfig(img_size=32), seed=3, train=True)(Batch(images, index, index), epoch=5)
    assert sum(not torch.equal(a, b) for a, b in zip(whole, plain, strict=True)) > 6
    other_copy = transform(Batch(images, index, index, torch.ones(12, dtype=torch.int64)), epoch=5)
    assert not torch.equal(other_copy, whole)


def test_evaluation_is_not_augmented() -> None:
    config = DataConfig(img_size=32, rand_augment="rand-m9-mstd0.5-inc1-n2", erasing=1.0, three_augment=False)
    images, index = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.arange(4)
    augmented, plain = (
        DeviceTransform(c, seed=0, train=False)(Batch(images, index, index), 0)
        for c in (config, DataConfig(img_size=32))
    )
    assert torch.equal(augmented, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rand_augment": "rand-m9-inc1", "three_augment": True}, "choose one"),
        ({"erasing": 1.5}, "data.erasing is 1.5"),
    ],
)
def test_augmentation_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)
