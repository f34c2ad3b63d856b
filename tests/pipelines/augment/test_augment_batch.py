"""Random erasing, mixup and CutMix: timm's distributions and formulas, and nothing but the stated numbers decides."""

from __future__ import annotations

import math
import random
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data import mixup as timm_mixup
from timm.data.random_erasing import RandomErasing as TimmErasing
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines import crng
from pipelines.augment import Mixing, MixingConfig, RandAugment, RandAugmentSpec, RandomErasing, ThreeAugment, erasing
from pipelines.augment.erasing import draw_rectangles
from pipelines.augment.mixing import MixingMode, draw_mixing


def noise(num: int, side: int = 32) -> torch.Tensor:
    return torch.randn((num, 3, side, side), generator=torch.Generator().manual_seed(0))


def rectangles(num: int, probability: float = 1.0, side: int = 64, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return draw_rectangles(np.arange(num), probability=probability, img_size=side, seed=seed, epoch=epoch)


# Erasing


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_share_of_erased_images(probability: float) -> None:
    share = (rectangles(20_000, probability)[:, 2] > 0).mean()
    assert share == pytest.approx(probability, abs=0.0 if probability in (0, 1) else 0.015)


@given(side=st.integers(1, 300), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
@settings(max_examples=50)
def test_rectangles_lie_inside(side: int, seed: int, epoch: int) -> None:
    top, left, height, width = rectangles(50, side=side, seed=seed, epoch=epoch).T
    assert ((top >= 0) & (top + height <= side) & (left >= 0) & (left + width <= side)).all()


@pytest.mark.parametrize(("side", "areas"), [(3, (0.02, 1 / 3)), (64, (0.02, 1 / 3)), (64, (0.6, 2.0))])
def test_rectangles_are_the_first_that_fit(
    side: int, areas: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ten attempts, each with four draws of its own, as plain numbers say; larger areas need more of them."""
    monkeypatch.setattr(erasing, "_AREA", areas)
    attempts = []
    for number, rectangle in enumerate(rectangles(400, 0.7, side, 3, 2)):
        key = crng.key(3, 2, number, crng.ERASING)
        expected, attempt = [0] * 4, 0
        while float(crng.u01(key, 0)) < 0.7 and attempt < 10 and not expected[2]:
            area, log_aspect, top, left = (float(crng.u01(key, 1 + 4 * attempt + draw)) for draw in range(4))
            area = (areas[0] + (areas[1] - areas[0]) * area) * side**2
            aspect = np.exp(math.log(0.3) * (1 - 2 * log_aspect))
            height, width = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if height < side and width < side:
                expected = [int(top * (side - height + 1)), int(left * (side - width + 1)), height, width]
                if not height:
                    break
            attempt += 1
        attempts.append(attempt)
        assert rectangle.tolist() == expected
    assert max(attempts) >= (10 if areas[1] > 1 else 1)


def test_rectangles_are_distributed_like_timms() -> None:
    """Area, aspect and place, quantile by quantile, against rectangles that timm erased."""
    random.seed(0)
    theirs = []
    erase = TimmErasing(probability=1.0, min_area=0.02, max_area=1 / 3, min_aspect=0.3, device="cpu")
    for image in erase(torch.ones(3000, 1, 64, 64))[:, 0]:
        rows, columns = np.flatnonzero((image == 0).any(1)), np.flatnonzero((image == 0).any(0))
        theirs.append((rows[0], columns[0], len(rows), len(columns)))
    reference, ours = np.array(theirs), rectangles(3000)
    measures = (
        lambda r: r[:, 2] * r[:, 3],
        lambda r: r[:, 2] / r[:, 3],
        lambda r: r[:, 0] / (65 - r[:, 2]),
        lambda r: r[:, 1] / (65 - r[:, 3]),
    )
    for measure in measures:
        a, b = np.sort(measure(ours)), np.sort(measure(reference))
        both = np.concatenate((a, b))
        apart = np.abs(np.searchsorted(a, both, "right") - np.searchsorted(b, both, "right")).max() / 3000
        assert apart < 2 * np.sqrt(2 / 3000)  # Kolmogorov and Smirnov's distance: exceeded once in 3000 times


def test_const_erases_to_zero_and_nothing_else() -> None:
    images = noise(40)
    result = RandomErasing(0.7, seed=2, mode="const")(images.clone(), np.arange(40), 3)
    inside = torch.zeros(40, 1, 32, 32, dtype=torch.bool)
    for mask, (top, left, height, width) in zip(inside, rectangles(40, 0.7, 32, 2, 3), strict=True):
        mask[:, top : top + height, left : left + width] = True
    assert torch.equal(result, images.masked_fill(inside, 0))


def test_noise_is_normal_and_uncorrelated() -> None:
    side = 64
    result = RandomErasing(1.0, seed=2)(torch.full((300, 3, side, side), 1e3), np.arange(300), 0)
    values = result[result < 1e3].double()
    assert values.mean().abs() < 4 / len(values) ** 0.5
    assert (values**2).mean() == pytest.approx(1, abs=0.01)
    assert (values**4).mean() == pytest.approx(3, abs=0.05)
    for dim in range(4):  # with the next image, channel, row, column
        other = result.roll(1, dim)
        both = (result < 1e3) & (other < 1e3)
        pairs = torch.stack((result[both], other[both])).double()
        assert torch.corrcoef(pairs)[0, 1].abs() < 5 / pairs.shape[1] ** 0.5


def test_noise_differs_between_epochs() -> None:
    erase = RandomErasing(1.0, seed=2)
    a, b = (erase(torch.zeros(4, 3, 32, 32), np.arange(4), epoch) for epoch in (0, 1))
    assert not ((a == b) & (a != 0)).any()


@pytest.mark.parametrize("mode", ["pixel", "const"])
@given(numbers=st.lists(st.integers(0, 19), min_size=1, max_size=8), seed=st.integers(0, 2**63))
@settings(max_examples=30)
def test_a_sample_is_erased_the_same_in_any_batch(mode: Any, numbers: list[int], seed: int) -> None:
    images, index = noise(20), np.arange(20) * 999_983
    erase = RandomErasing(0.6, seed=seed, mode=mode)
    everything = erase(images.clone(), index, 4)
    assert torch.equal(erase(images[numbers], torch.from_numpy(index[numbers]), 4), everything[numbers])


def test_erasing_keeps_the_data_type() -> None:
    images = noise(4)
    erased = RandomErasing(1.0, seed=0)(images.to(torch.bfloat16), np.arange(4), 0)
    assert erased.dtype == torch.bfloat16
    assert torch.equal(erased, RandomErasing(1.0, seed=0)(images, np.arange(4), 0).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probability": 1.2}, "probability of random erasing is 1.2"),
        ({"mode": "rand"}, "mode of random erasing is 'rand'"),
    ],
)
def test_erasing_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomErasing(**({"probability": 0.5, "seed": 0} | settings))


# Mixing

BOTH = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
KINDS = [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}, BOTH]


def timm_with(config: MixingConfig, share: np.ndarray, boxes: np.ndarray, smoothing: float) -> timm_mixup.Mixup:
    """timm's Mixup that makes these draws. `share` is from before the correction for cut-off rectangles."""
    mixup = timm_mixup.Mixup(
        config.mixup_alpha,
        config.cutmix_alpha,
        mode=config.mode,
        correct_lam=config.correct_share,
        label_smoothing=smoothing,
        num_classes=7,
    )
    cut = (boxes[:, 1] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 2])
    mixup._params_per_batch = lambda: (float(share[0]), bool(cut[0]))
    mixup._params_per_elem = lambda _: (share.astype(np.float32), cut)
    return mixup


@pytest.mark.parametrize("correct_share", [True, False])
@pytest.mark.parametrize("mode", ["batch", "elem"])
@pytest.mark.parametrize("alphas", KINDS, ids=["mixup", "cutmix", "both"])
def test_images_and_targets_are_timms(
    alphas: dict[str, float], mode: Any, correct_share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MixingConfig(**alphas, mode=mode, correct_share=correct_share, probability=0.8)
    images, labels = noise(10), torch.arange(10) % 7
    num_draws = 10 if mode == "elem" else 1
    for step in range(12):
        share, boxes = draw_mixing(config, num_draws, img_size=32, seed=5, step=step, rank=2)
        remaining = iter(boxes[(boxes[:, 1] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 2])])
        monkeypatch.setattr(timm_mixup, "rand_bbox", lambda *_, boxes=remaining, **__: tuple(next(boxes)))
        expected = timm_with(config, share, boxes, 0.1)(images.clone(), labels)
        actual = Mixing(config, 7, seed=5, rank=2, label_smoothing=0.1)(images.clone(), labels, step)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)


def draw(num: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    return draw_mixing(MixingConfig(**options), num, img_size=224, seed=1, step=0, rank=0)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_mixup_shares_follow_the_beta_distribution(alpha: float) -> None:
    share, boxes = draw(40_000, mixup_alpha=alpha)
    assert (boxes[:, 1] == boxes[:, 0]).all()
    assert share.mean() == pytest.approx(0.5, abs=0.01)
    assert share.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)


def test_cutmix_rectangles_have_the_area_drawn() -> None:
    uncorrected, boxes = draw(20_000, cutmix_alpha=1.0, correct_share=False)
    top, bottom, left, right = boxes.T
    assert ((top >= 0) & (top <= bottom) & (bottom <= 224) & (left >= 0) & (left <= right) & (right <= 224)).all()
    whole = (top > 0) & (bottom < 224) & (left > 0) & (right < 224)
    side = np.floor(224 * np.sqrt(1 - uncorrected[whole]))
    np.testing.assert_array_equal((bottom - top)[whole], side)
    np.testing.assert_array_equal((right - left)[whole], side)
    corrected, same_boxes = draw(20_000, cutmix_alpha=1.0)
    np.testing.assert_array_equal(same_boxes, boxes)
    np.testing.assert_allclose(corrected, 1 - (bottom - top) * (right - left) / 224**2)
    assert uncorrected.mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("switch", "probability"), [(0.0, 1.0), (0.5, 1.0), (0.3, 0.6), (1.0, 1.0), (0.5, 0.0)])
def test_how_often_each_kind_is_chosen(switch: float, probability: float) -> None:
    share, boxes = draw(20_000, **BOTH, switch_probability=switch, probability=probability)
    cut = (boxes[:, 1] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 2])
    assert cut.mean() == pytest.approx(switch * probability, abs=0.02)
    assert ((share < 1) & ~cut).mean() == pytest.approx((1 - switch) * probability, abs=0.02)


@pytest.mark.parametrize("mode", ["batch", "elem"])
@pytest.mark.parametrize("options", [{}, BOTH | {"probability": 0.0}])
def test_without_mixing_targets_are_smoothed_labels(mode: Any, options: dict[str, float]) -> None:
    images, labels = noise(5), torch.tensor([0, 3, 1, 1, 2])
    mixed, targets = Mixing(MixingConfig(mode=mode, **options), 4, seed=0, rank=0, label_smoothing=0.2)(
        images.clone(), labels, 0
    )
    assert torch.equal(mixed, images)
    torch.testing.assert_close(targets, 0.8 * torch.eye(4)[labels] + 0.05)


@given(
    num=st.integers(1, 6),
    mode=st.sampled_from(["batch", "elem"]),
    step=st.integers(0, 10**7),
    rank=st.integers(0, 10**4),
    smoothing=st.floats(0, 1),
)
@settings(max_examples=60)
def test_mixing_repeats_and_targets_sum_to_one(num: int, mode: Any, step: int, rank: int, smoothing: float) -> None:
    images, labels = noise(num, 8), torch.arange(num)
    results = []
    for _ in range(2):
        mixing = Mixing(MixingConfig(**BOTH, mode=mode), 6, seed=9, rank=rank, label_smoothing=smoothing)
        results.append(mixing(images.clone(), labels, step))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][1].sum(1), torch.ones(num))


@pytest.mark.parametrize("mode", ["batch", "elem"])
@pytest.mark.parametrize("parts", [2, 3])
def test_parts_are_mixed_as_the_batches_of_as_many_ranks(parts: int, mode: Any) -> None:
    config, images, labels = MixingConfig(**BOTH, mode=mode), noise(12, 8), torch.arange(12) % 5
    together = Mixing(config, 5, seed=9, rank=2, label_smoothing=0.1, parts=parts)(images.clone(), labels, 7)
    apart = [
        Mixing(config, 5, seed=9, rank=2 * parts + number, label_smoothing=0.1)(some.clone(), their_labels, 7)
        for number, (some, their_labels) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True))
    ]
    for whole, some in zip(together, zip(*apart, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(some))


def test_steps_ranks_and_seeds_differ() -> None:
    config = MixingConfig(mixup_alpha=1.0)
    shares = {
        float(draw_mixing(config, 1, img_size=32, seed=seed, step=step, rank=rank)[0][0])
        for seed in range(5)
        for step in range(5)
        for rank in range(5)
    }
    assert len(shares) == 125


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixup_alpha": -0.1}, "mixup_alpha is -0.1"),
        ({"cutmix_alpha": -1}, "cutmix_alpha is -1"),
        ({"probability": 2}, "probability is 2"),
        ({"switch_probability": -1}, "switch_probability is -1"),
        ({"mode": "pair"}, "mode is 'pair'"),
    ],
)
def test_mixing_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixingConfig(**settings)


def test_smoothing_is_a_share() -> None:
    with pytest.raises(ValueError, match="label_smoothing is 2"):
        Mixing(MixingConfig(), 3, seed=0, rank=0, label_smoothing=2)


# All transforms


class HostReads(TorchDispatchMode):
    """Collects the operators that make a GPU's caller wait: a value, or the size of a result, is read on the host."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal.default")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in self.waiting):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back_from_the_device() -> None:
    images, values = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8), noise(40, 16)
    index, labels = np.arange(40), torch.arange(40)
    rand_augment = RandAugment(RandAugmentSpec(num_ops=4), seed=0, fill=(1, 2, 3), interpolation="bicubic")
    with HostReads() as reads:
        values[0, 0, 0, 0].item()
    assert len(reads.seen) == 1
    with HostReads() as reads:
        rand_augment(images, index, 0)
        ThreeAugment(seed=0)(images, index, 0)
        RandomErasing(0.5, seed=0)(values, index, 0)
        for mode in get_args(MixingMode):
            for step in range(4):
                Mixing(MixingConfig(**BOTH, mode=mode), 40, seed=0, rank=0)(values, labels, step)
    assert not reads.seen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_gpu_agrees_and_is_never_waited_for(mode: Any) -> None:
    images, labels, index = noise(16), torch.arange(16), np.arange(16)
    erase = RandomErasing(0.7, seed=0)
    mixing = Mixing(MixingConfig(**BOTH, mode=mode), 16, seed=0, rank=0)
    on_device, device_labels = images.cuda(), labels.cuda()
    erase(on_device.clone(), index, 0)
    for step in range(6):
        expected = mixing(erase(images.clone(), index, step), labels, step)
        torch.cuda.set_sync_debug_mode("error")
        try:
            actual = mixing(erase(on_device.clone(), index, step), device_labels, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b)
