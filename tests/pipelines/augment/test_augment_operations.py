"""Every augmentation on the batch against Pillow's on one image, with the same parameters."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest
import torch
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from timm.data import auto_augment as timm_ops

from pipelines.augment.operations import Op, apply
from pipelines.base import Interpolation

FILL = (124, 116, 104)
SIDE = 96


def generated(side: int) -> list[Image.Image]:
    """Smooth pictures, pictures with grain, and the images that table makers find difficult."""
    rng = np.random.default_rng(0)
    images = [picture(side, side, seed) for seed in range(8)]
    for seed in range(8, 16):
        smooth = np.asarray(picture(side, side, seed), dtype=np.float64)
        contrast, grain = rng.uniform(0.2, 1), rng.normal(0, 8, smooth.shape)
        images.append(Image.fromarray(np.clip(smooth * contrast + grain, 0, 255).astype(np.uint8)))
    images.append(Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)))
    images += [Image.new("RGB", (side, side), colour) for colour in ((0, 0, 0), (255, 255, 255), (1, 128, 254))]
    two_levels = np.full((side, side, 3), 77, dtype=np.uint8)
    two_levels[0, 0] = (78, 0, 255)
    images.append(Image.fromarray(two_levels))
    return images


@cache
def photographs() -> list[Image.Image]:
    if "PSS_IMAGENET_SAMPLE" not in os.environ:
        pytest.skip("PSS_IMAGENET_SAMPLE names no tar of ImageNet images")
    images = []
    with tarfile.open(os.environ["PSS_IMAGENET_SAMPLE"]) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None and len(images) < 48:
                photograph = Image.open(io.BytesIO(file.read())).convert("RGB")
                images.append(ImageOps.fit(photograph, (224, 224), Image.Resampling.BICUBIC))
    return images


def batch_of(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def affine(resample: Image.Resampling, image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=FILL)


Reference = Callable[[Image.Image, float], Image.Image]

POINTWISE: dict[Op, tuple[Reference, tuple[float, float]]] = {
    Op.AUTO_CONTRAST: (lambda image, _: ImageOps.autocontrast(image), (0, 0)),
    Op.EQUALIZE: (lambda image, _: ImageOps.equalize(image), (0, 0)),
    Op.INVERT: (lambda image, _: ImageOps.invert(image), (0, 0)),
    Op.POSTERIZE: (lambda image, bits: ImageOps.posterize(image, int(bits)), (1, 9)),
    Op.SOLARIZE: (lambda image, level: ImageOps.solarize(image, int(level)), (0, 257)),
    Op.SOLARIZE_ADD: (lambda image, addend: timm_ops.solarize_add(image, int(addend)), (0, 111)),
    Op.BRIGHTNESS: (lambda image, factor: ImageEnhance.Brightness(image).enhance(factor), (0, 2)),
    Op.CONTRAST: (lambda image, factor: ImageEnhance.Contrast(image).enhance(factor), (0, 2)),
    Op.COLOR: (lambda image, factor: ImageEnhance.Color(image).enhance(factor), (0, 2)),
    Op.SHARPNESS: (lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor), (0, 2)),
    Op.BLUR: (lambda image, sigma: image.filter(ImageFilter.GaussianBlur(sigma)), (0.1, 2)),
}
WHOLE_NUMBERS = (Op.POSTERIZE, Op.SOLARIZE, Op.SOLARIZE_ADD)

GEOMETRIC: dict[Op, tuple[Callable[[Image.Resampling, Image.Image, float], Image.Image], tuple[float, float]]] = {
    Op.SHEAR_X: (lambda resample, image, slope: affine(resample, image, (1, slope, 0, 0, 1, 0)), (-0.3, 0.3)),
    Op.SHEAR_Y: (lambda resample, image, slope: affine(resample, image, (1, 0, 0, slope, 1, 0)), (-0.3, 0.3)),
    Op.TRANSLATE_X: (lambda resample, image, pixels: affine(resample, image, (1, 0, pixels, 0, 1, 0)), (-101, 101)),
    Op.TRANSLATE_Y: (lambda resample, image, pixels: affine(resample, image, (1, 0, 0, 0, 1, pixels)), (-101, 101)),
    Op.ROTATE: (lambda resample, image, angle: image.rotate(angle, resample, fillcolor=FILL), (-30, 30)),
}


def difference(
    operation: Op,
    reference: Reference,
    bounds: tuple[float, float],
    images: list[Image.Image],
    interpolation: Interpolation = "bicubic",
) -> torch.Tensor:
    """How far the batch is from Pillow, in grey levels; each image with its own argument, the first with no effect."""
    arguments = np.random.default_rng(operation).uniform(*bounds, len(images))
    if operation in WHOLE_NUMBERS:
        arguments = np.floor(arguments)
    if operation in GEOMETRIC:
        arguments[:3] = 0, round(bounds[1] / 2), -2.5  # whole and half pixels have borders of their own
    expected = batch_of([reference(image, float(value)) for image, value in zip(images, arguments, strict=True)])
    operations = np.full((1, len(images)), operation, dtype=np.int64)
    actual = apply(batch_of(images), operations, arguments[None], fill=FILL, interpolation=interpolation)
    assert (actual.dtype, actual.is_contiguous()) == (torch.uint8, True)
    return (actual.int() - expected.int()).abs()


@pytest.mark.parametrize("operation", POINTWISE, ids=lambda operation: operation.name)
@pytest.mark.parametrize("source", [partial(generated, SIDE), partial(generated, 37), photographs])
def test_pointwise_operations_are_pillows(operation: Op, source: Callable[[], list[Image.Image]]) -> None:
    off = difference(operation, *POINTWISE[operation], source())
    if operation == Op.BLUR:  # Pillow's box weights are whole numbers, these are float32
        assert off.max() <= 1
        assert off.float().mean() < 0.001
    else:
        assert off.max() == 0


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("operation", GEOMETRIC, ids=lambda operation: operation.name)
@pytest.mark.parametrize("source", [partial(generated, SIDE), partial(generated, 37), photographs])
def test_geometric_operations_are_pillows(
    operation: Op, interpolation: Interpolation, source: Callable[[], list[Image.Image]]
) -> None:
    transform, bounds = GEOMETRIC[operation]
    reference = partial(transform, Image.Resampling[interpolation.upper()])
    off = difference(operation, reference, bounds, source(), interpolation)
    assert off.max() <= 1
    assert off.float().mean() < 0.01


ANY_ARGUMENT = {operation: bounds for operation, (_, bounds) in (POINTWISE | GEOMETRIC).items()}


@given(data=st.data(), num_images=st.integers(1, 5), num_layers=st.integers(1, 3))
@settings(max_examples=30)
def test_a_list_is_its_operations_one_after_the_other(data: st.DataObject, num_images: int, num_layers: int) -> None:
    """Which images share an operation, and where a list pauses, changes nothing; neither does memory layout."""
    images = batch_of(generated(20)[:num_images])
    choice = st.sampled_from([Op.NONE, *ANY_ARGUMENT])
    operations = np.array([[data.draw(choice) for _ in range(num_images)] for _ in range(num_layers)], dtype=np.int64)
    arguments = np.array([[sum(ANY_ARGUMENT.get(Op(op), (0, 0))) / 3 for op in layer] for layer in operations])
    arguments[np.isin(operations, WHOLE_NUMBERS)] //= 1

    expected = images.clone()
    for b in range(num_images):
        for layer in range(num_layers):
            one = slice(b, b + 1)
            expected[one] = apply(expected[one], operations[layer : layer + 1, one], arguments[layer : layer + 1, one])
    before = images.clone()
    assert torch.equal(apply(images, operations, arguments), expected)
    assert torch.equal(apply(images.contiguous(memory_format=torch.channels_last), operations, arguments), expected)
    assert torch.equal(images, before)
