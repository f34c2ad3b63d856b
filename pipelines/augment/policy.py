"""Which operations an image receives: RandAugment and 3-Augment.

The draws are pure functions of (seed, epoch, sample number), made on the host in float64; the pixels are computed on
the device of the images, from the draws and the image alone.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipelines import crng
from pipelines.augment.operations import Op, apply
from pipelines.augment.point import Arguments
from pipelines.augment.streams import RAND_AUGMENT, THREE_AUGMENT
from pipelines.augment.transfer import host_index
from pipelines.base import Interpolation
from pipelines.rand_augment import MAX_LEVEL, RandAugmentSpec

Operations = NDArray[np.int64]

RAND_AUGMENT_OPS = (
    Op.AUTO_CONTRAST,
    Op.EQUALIZE,
    Op.INVERT,
    Op.ROTATE,
    Op.POSTERIZE,
    Op.SOLARIZE,
    Op.SOLARIZE_ADD,
    Op.COLOR,
    Op.CONTRAST,
    Op.BRIGHTNESS,
    Op.SHARPNESS,
    Op.SHEAR_X,
    Op.SHEAR_Y,
    Op.TRANSLATE_X,
    Op.TRANSLATE_Y,
)

_DRAWS_PER_OPERATION = 5


def draw_rand_augment(
    spec: RandAugmentSpec, index: NDArray[np.int64], *, seed: int, epoch: int, img_size: int
) -> tuple[Operations, Arguments]:
    """Operations and their arguments, each (num_ops, B); `Op.NONE` where one is not carried out."""
    keys = crng.key(seed, epoch, index, RAND_AUGMENT)
    operations = np.empty((spec.num_ops, len(index)), dtype=np.int64)
    arguments = np.empty((spec.num_ops, len(index)))
    for number in range(spec.num_ops):
        which, carried_out, radius, angle, sign = (
            crng.u01(keys, _DRAWS_PER_OPERATION * number + draw) for draw in range(_DRAWS_PER_OPERATION)
        )
        drawn = np.array(RAND_AUGMENT_OPS)[(which * len(RAND_AUGMENT_OPS)).astype(np.int64)]
        normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)  # Box and Muller
        level = np.clip(spec.magnitude + spec.magnitude_std * normal, 0, MAX_LEVEL) / MAX_LEVEL
        arguments[number] = _argument(drawn, level, np.where(sign < 0.5, -1, 1), img_size)
        operations[number] = np.where(carried_out < spec.probability, drawn, Op.NONE)
    return operations, arguments


def _argument(operations: Operations, level: Arguments, sign: NDArray[np.int64], img_size: int) -> Arguments:
    """What timm's tables make of a strength `level` between 0 and 1; `sign` is -1 or 1."""
    arguments = np.zeros(len(operations))

    def put(values: Arguments, *chosen: Op) -> None:
        np.copyto(arguments, values, where=np.isin(operations, chosen))

    put(sign * level * 30, Op.ROTATE)
    put(sign * level * 0.3, Op.SHEAR_X, Op.SHEAR_Y)
    put(sign * level * 0.45 * img_size, Op.TRANSLATE_X, Op.TRANSLATE_Y)
    put(np.maximum(0.1, 1 + sign * level * 0.9), Op.COLOR, Op.CONTRAST, Op.BRIGHTNESS, Op.SHARPNESS)
    # timm goes down to 0 bits, which is a black image in old versions of Pillow and an error in new ones
    put(np.maximum(1, 4 - np.floor(level * 4)), Op.POSTERIZE)
    put(256 - np.floor(level * 256), Op.SOLARIZE)
    put(np.floor(level * 110), Op.SOLARIZE_ADD)
    return arguments


class RandAugment:
    """RandAugment of a uint8 batch; `fill` (grey levels of R, G, B) is what moved images leave behind."""

    def __init__(
        self, spec: RandAugmentSpec, *, seed: int, fill: tuple[int, int, int], interpolation: Interpolation
    ) -> None:
        self.spec, self.seed, self.fill, self.interpolation = spec, seed, fill, interpolation

    def __call__(self, images: Tensor, index: Tensor | NDArray[np.int64], epoch: int) -> Tensor:
        """A new uint8 (B, 3, S, S), contiguous, on the device of `images`; `index` (B,) lies on the host."""
        draws = draw_rand_augment(self.spec, host_index(index), seed=self.seed, epoch=epoch, img_size=images.shape[-1])
        return apply(images, *draws, fill=self.fill, interpolation=self.interpolation)


_JITTER_ORDERS = np.array(list(itertools.permutations((Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR))))  # (6, 3)


def draw_three_augment(
    index: NDArray[np.int64], *, jitter: float, seed: int, epoch: int
) -> tuple[Operations, Arguments]:
    """Operations and their arguments, each (4, B): one of grey, solarise and blur, then the colour jitter."""
    keys = crng.key(seed, epoch, index, THREE_AUGMENT)
    primary = np.array((Op.COLOR, Op.SOLARIZE, Op.BLUR))[(crng.u01(keys, 0) * 3).astype(np.int64)]
    sigma = 0.1 + 1.9 * crng.u01(keys, 1)
    strength = np.where(primary == Op.BLUR, sigma, np.where(primary == Op.SOLARIZE, 128.0, 0.0))  # colour 0 is grey
    order = (crng.u01(keys, 2) * len(_JITTER_ORDERS)).astype(np.int64)
    low, high = max(0.0, 1 - jitter), 1 + jitter
    factors = [low + (high - low) * crng.u01(keys, 3 + number) for number in range(3)]
    return np.stack((primary, *_JITTER_ORDERS[order].T)), np.stack((strength, *factors))


class ThreeAugment:
    """3-Augment (Touvron et al., DeiT III, 2022) of a uint8 batch.

    One of greyscale, solarisation (threshold 128) and Gaussian blur (standard deviation 0.1 to 2 pixels), equally
    likely; then brightness, contrast and saturation, each by a factor within 1 - `jitter` to 1 + `jitter`, in an order
    drawn for each image (as torchvision's ColorJitter draws it).
    """

    def __init__(self, *, seed: int, jitter: float = 0.3) -> None:
        if jitter < 0:
            raise ValueError(f"3-Augment's jitter is {jitter}; it must be at least 0")
        self.seed, self.jitter = seed, jitter

    def __call__(self, images: Tensor, index: Tensor | NDArray[np.int64], epoch: int) -> Tensor:
        """A new uint8 (B, 3, S, S), contiguous, on the device of `images`; `index` (B,) lies on the host."""
        return apply(images, *draw_three_augment(host_index(index), jitter=self.jitter, seed=self.seed, epoch=epoch))
