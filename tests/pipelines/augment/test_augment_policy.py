"""Which operations an image receives: timm's distribution, and nothing but seed, epoch and sample number decides."""

from __future__ import annotations

import random
from collections import defaultdict
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from timm.data import auto_augment as timm_ops

from pipelines.augment import RandAugment, RandAugmentSpec, ThreeAugment
from pipelines.augment.operations import Op
from pipelines.augment.policy import RAND_AUGMENT_OPS, _argument, draw_rand_augment, draw_three_augment

SPEC = "rand-m9-mstd0.5-inc1-n2"
FILL = (124, 116, 104)
TIMM_NAMES = dict(zip(RAND_AUGMENT_OPS, timm_ops.rand_augment_choices("", increasing=True), strict=True))
SIGNED = (Op.ROTATE, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y)


def timm_hparams(interpolation: Image.Resampling = Image.Resampling.BICUBIC) -> dict[str, Any]:
    return {"img_mean": FILL, "interpolation": interpolation}


def draws(spec: str, num: int, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    options = {"seed": 3, "epoch": 5, "img_size": 224} | settings
    return draw_rand_augment(RandAugmentSpec.parse(spec), np.arange(num), **options)


def chi_square(observed: np.ndarray, expected: np.ndarray, degrees: int) -> float:
    """In standard deviations above what chance gives."""
    return float((((observed - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees))


# Specification


def test_timms_notation_is_understood() -> None:
    assert RandAugmentSpec.parse(SPEC) == RandAugmentSpec(magnitude=9, magnitude_std=0.5, num_ops=2, probability=0.5)
    assert RandAugmentSpec.parse("rand-inc1") == RandAugmentSpec()
    assert RandAugmentSpec.parse("rand-n3-p1-inc1-m0") == RandAugmentSpec(magnitude=0, num_ops=3, probability=1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must begin with 'rand-'"),
        ("augmix-m3", "must begin with 'rand-'"),
        ("rand-m9", "only -inc1"),
        ("rand-m9-inc0", "only -inc1"),
        ("rand-m9-inc1-mmax20", "'mmax20'"),
        ("rand-m9-inc1-tweights", "'tweights'"),
        ("rand-m9-inc1-w0", "'w0'"),
        ("rand-m9.5-inc1", "'m9.5'"),
        ("rand-m-inc1", "'m'"),
        ("rand-m9--inc1", "''"),
        ("rand-m9-inc1-x", "'x'"),
        ("rand-m9-m8-inc1", "magnitude twice"),
        ("rand-m11-inc1", "magnitude is 11"),
        ("rand-mstd101-inc1", "magnitude_std is 101"),
        ("rand-n0-inc1", "num_ops is 0"),
        ("rand-p1.5-inc1", "probability is 1.5"),
    ],
)
def test_what_is_not_understood_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandAugmentSpec.parse(text)


# Distribution


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(("operation", "name"), list(TIMM_NAMES.items()))
def test_arguments_are_timms(operation: Op, name: str, sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "random", lambda: 0.75 if sign < 0 else 0.25)
    levels = np.linspace(0, 10, 101)
    to_arguments = timm_ops.LEVEL_TO_ARG[name]
    expected = np.array([sum(to_arguments(level, {})) if to_arguments else 0.0 for level in levels])
    if name == "PosterizeIncreasing":
        assert expected[-1] == 0  # bits: an error in recent versions of Pillow
        expected = np.maximum(expected, 1)
    if name.startswith("Translate"):
        expected *= 224
    repeated = np.full(len(levels), operation, dtype=np.int64)
    np.testing.assert_allclose(_argument(repeated, levels / 10, np.full(len(levels), sign), 224), expected, rtol=1e-12)


def test_operations_are_equally_likely_and_independent() -> None:
    operations, _ = draws("rand-m9-mstd0.5-inc1-n2-p1", 30_000)
    kinds = len(RAND_AUGMENT_OPS)
    number = {operation: i for i, operation in enumerate(RAND_AUGMENT_OPS)}
    first, second = (np.array([number[Op(op)] for op in layer]) for layer in operations)
    pairs = np.bincount(first * kinds + second, minlength=kinds**2)
    assert abs(chi_square(pairs, np.full(kinds**2, 30_000 / kinds**2), kinds**2 - 1)) < 4


@pytest.mark.parametrize("probability", ["0", "0.5", "1"])
def test_share_carried_out(probability: str) -> None:
    operations, _ = draws(f"rand-m9-inc1-n2-p{probability}", 20_000)
    assert (operations != Op.NONE).mean() == pytest.approx(float(probability), abs=0.01)
    both = (operations != Op.NONE).all(axis=0).mean()
    assert both == pytest.approx(float(probability) ** 2, abs=0.015)


def test_strength_is_a_clipped_normal_distribution() -> None:
    operations, arguments = draws("rand-m9-mstd0.5-inc1-n1-p1", 60_000)
    angles = arguments[operations == Op.ROTATE]
    assert (angles > 0).mean() == pytest.approx(0.5, abs=0.03)
    levels = np.sort(np.abs(angles) / 3)
    distribution = NormalDist(9, 0.5)
    assert levels[-1] == 10
    assert (levels == 10).mean() == pytest.approx(1 - distribution.cdf(10), abs=0.008)
    expected = np.array([distribution.cdf(level) for level in levels[levels < 10]])
    assert np.abs(expected - np.arange(len(expected)) / len(levels)).max() < 1.9 / np.sqrt(len(levels))


def test_sampled_like_timms() -> None:
    """The same counts and the same strengths as timm's own sampling gives, within chance."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - timm draws from the global generators
    transform = timm_ops.rand_augment_transform(SPEC, timm_hparams())
    theirs: dict[str, list[float]] = defaultdict(list)

    def record(name: str, image: None, *arguments: float, **_: Any) -> None:
        theirs[name].append(abs(sum(arguments)))

    for operation in transform.ops:
        operation.aug_fn = partial(record, operation.name)
    num = 6000
    for _ in range(num):
        transform(None)

    operations, arguments = draws(SPEC, num, img_size=1)
    counts = np.array([[(operations == op).sum(), len(theirs[name])] for op, name in TIMM_NAMES.items()])
    expected = counts.sum(axis=1, keepdims=True) / 2
    assert chi_square(counts, np.broadcast_to(expected, counts.shape), len(counts)) < 4
    for operation, name in TIMM_NAMES.items():
        ours, reference = np.abs(arguments[operations == operation]), np.array(theirs[name])
        if name == "PosterizeIncreasing":
            reference = np.maximum(reference, 1)
        spread = np.sqrt(ours.var() / len(ours) + reference.var() / len(reference))
        assert abs(ours.mean() - reference.mean()) <= 4 * spread
        if len(np.unique(reference)) > 5:
            assert ours.std() == pytest.approx(reference.std(), rel=0.25)


# Pixels


def images_of(num: int, side: int = 32) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture(side, side, seed)) for seed in range(num)])).permute(
        0, 3, 1, 2
    )


def rand_augment(spec: str = SPEC, seed: int = 3) -> RandAugment:
    return RandAugment(RandAugmentSpec.parse(spec), seed=seed, fill=FILL, interpolation="bicubic")


def test_pixels_are_what_timms_operations_make_of_the_same_draws() -> None:
    images = images_of(64, 64)
    actual = rand_augment(SPEC + "-p1")(images, np.arange(64), 5)
    operations, arguments = draws(SPEC + "-p1", 64, img_size=64)
    functions = {op: timm_ops.NAME_TO_OP[name] for op, name in TIMM_NAMES.items()}
    functions[Op.TRANSLATE_X], functions[Op.TRANSLATE_Y] = timm_ops.translate_x_abs, timm_ops.translate_y_abs
    off = []
    for b in range(64):
        image = Image.fromarray(images[b].permute(1, 2, 0).numpy())
        for op, argument in zip(operations[:, b], arguments[:, b], strict=True):
            needs = [] if op in (Op.AUTO_CONTRAST, Op.EQUALIZE, Op.INVERT) else [argument]
            needs = [int(value) for value in needs] if op in (Op.POSTERIZE, Op.SOLARIZE, Op.SOLARIZE_ADD) else needs
            image = functions[op](image, *needs, fillcolor=FILL, resample=Image.Resampling.BICUBIC)
        off.append(np.abs(actual[b].permute(1, 2, 0).numpy().astype(int) - np.asarray(image)).mean())
    assert np.median(off) < 0.01
    assert max(off) < 0.5  # a level that is off by one may cross a threshold of the second operation


def test_three_augment_is_pillows() -> None:
    images = images_of(48, 48)
    actual = ThreeAugment(seed=1)(images, np.arange(48), 0)
    operations, arguments = draw_three_augment(np.arange(48), jitter=0.3, seed=1, epoch=0)
    enhance = {Op.BRIGHTNESS: ImageEnhance.Brightness, Op.CONTRAST: ImageEnhance.Contrast, Op.COLOR: ImageEnhance.Color}
    primary = {
        Op.COLOR: lambda image, _: image.convert("L").convert("RGB"),
        Op.SOLARIZE: lambda image, _: ImageOps.solarize(image),
        Op.BLUR: lambda image, sigma: image.filter(ImageFilter.GaussianBlur(sigma)),
    }
    for b in range(48):
        image = Image.fromarray(images[b].permute(1, 2, 0).numpy())
        image = primary[operations[0, b]](image, float(arguments[0, b]))
        for op, factor in zip(operations[1:, b], arguments[1:, b], strict=True):
            image = enhance[op](image).enhance(factor)
        off = np.abs(actual[b].permute(1, 2, 0).numpy().astype(int) - np.asarray(image))
        assert off.max() <= (2 if operations[0, b] == Op.BLUR else 0)  # a level off by one, and then more contrast
        assert off.mean() < 0.001


def test_three_augment_draws_evenly() -> None:
    operations, arguments = draw_three_augment(np.arange(12_000), jitter=0.3, seed=1, epoch=0)
    assert abs(chi_square(np.unique(operations[0], return_counts=True)[1], np.full(3, 4000), 2)) < 4
    orders = np.unique(operations[1:], axis=1, return_counts=True)[1]
    assert len(orders) == 6
    assert abs(chi_square(orders, np.full(6, 2000), 5)) < 4
    sigma = arguments[0, operations[0] == Op.BLUR]
    assert (sigma.min(), sigma.mean(), sigma.max()) == pytest.approx((0.1, 1.05, 2.0), abs=0.03)
    assert (arguments[1:].min(), arguments[1:].mean(), arguments[1:].max()) == pytest.approx((0.7, 1, 1.3), abs=0.005)


def test_jitter_must_not_be_negative() -> None:
    with pytest.raises(ValueError, match="jitter is -1"):
        ThreeAugment(seed=0, jitter=-1)


@given(
    numbers=st.lists(st.integers(0, 11), min_size=1, max_size=6),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 2**63),
    images_per_pass=st.integers(1, 6),
)
@settings(max_examples=40)
def test_a_sample_comes_out_the_same_in_any_batch(
    numbers: list[int], epoch: int, seed: int, images_per_pass: int
) -> None:
    """Whatever the batch size, the order and the neighbours: other ranks and resumed runs see the same pixels."""
    images, index = images_of(12), np.arange(12) * 1_000_003
    for transform in (rand_augment("rand-m9-mstd0.5-inc1-n3-p0.9", seed), ThreeAugment(seed=seed)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pipelines.augment.operations._CPU_IMAGES", images_per_pass)
            everything = transform(images, index, epoch)
        assert torch.equal(transform(images[numbers], torch.from_numpy(index[numbers]), epoch), everything[numbers])


def test_epochs_and_seeds_differ() -> None:
    images, index = images_of(12), np.arange(12)
    for make in (lambda seed: rand_augment(SPEC + "-p1", seed), lambda seed: ThreeAugment(seed=seed)):
        results = [make(seed)(images, index, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert (results[a] != results[b]).flatten(1).any(1).float().mean() > 0.5


def test_nothing_happens_at_probability_0() -> None:
    images = images_of(6)
    result = rand_augment("rand-m9-inc1-p0")(images, np.arange(6), 0)
    assert torch.equal(result, images)
    assert result.data_ptr() != images.data_ptr()


def test_index_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="meta"):
        rand_augment()(images_of(2), torch.arange(2, device="meta"), 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_agrees_and_is_never_waited_for() -> None:
    images, index = images_of(64), np.arange(64)
    on_device = images.cuda()
    for transform in (rand_augment("rand-m9-mstd0.5-inc1-n3-p0.9"), ThreeAugment(seed=1)):
        transform(on_device, index, 0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = transform(on_device, index, 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        off = (result.cpu().int() - transform(images, index, 1).int()).abs()
        assert (off > 1).float().mean() < 1e-4
