"""Which operations an image receives: RandAugment and 3-Augment.

The draws are pure functions of (seed, epoch, sample number), made on the host in float64; the pixels are computed on
the device of the images, from the draws and the image alone.
"""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipelines import crng
from pipelines.augment.operations import Op, apply
from pipelines.augment.point import Arguments
from pipelines.augment.transfer import host_index
from pipelines.base import Interpolation
from pipelines.rand_augment import MAX_LEVEL, RandAugmentSpec

Operations = NDArray[np.int64]
Draws = tuple[Operations, Arguments]

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

_RAND_AUGMENT_OPS = np.array(RAND_AUGMENT_OPS)
_DRAWS_PER_OPERATION = 5


def draw_rand_augment(
    spec: RandAugmentSpec, index: NDArray[np.int64], *, seed: int, epoch: int, img_size: int
) -> Draws:
    """Operations and their arguments, each (num_ops, B); `Op.NONE` where one is not carried out."""
    keys = crng.key(seed, epoch, index, crng.RAND_AUGMENT)
    numbers = np.arange(_DRAWS_PER_OPERATION * spec.num_ops).reshape(spec.num_ops, _DRAWS_PER_OPERATION).T
    which, carried_out, radius, angle, sign = crng.u01(keys, numbers[:, :, None])  # (num_ops, B) each
    operations = _RAND_AUGMENT_OPS[(which * len(RAND_AUGMENT_OPS)).astype(np.int64)]
    normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)  # Box and Muller
    level = np.clip(spec.magnitude + spec.magnitude_std * normal, 0, MAX_LEVEL) / MAX_LEVEL
    arguments = _argument(operations, level, np.where(sign < 0.5, -1, 1), img_size)
    return np.where(carried_out < spec.probability, operations, Op.NONE), arguments


def _argument(operations: Operations, level: Arguments, sign: NDArray[np.int64], img_size: int) -> Arguments:
    """What timm's tables make of a strength `level` between 0 and 1; `sign` is -1 or 1."""
    signed = sign * level
    arguments = np.zeros(operations.shape)

    def put(values: Arguments, *chosen: Op) -> None:
        np.copyto(arguments, values, where=_one_of(chosen)[operations])

    put(signed * 30, Op.ROTATE)
    put(signed * 0.3, Op.SHEAR_X, Op.SHEAR_Y)
    put(signed * 0.45 * img_size, Op.TRANSLATE_X, Op.TRANSLATE_Y)
    put(np.maximum(0.1, 1 + signed * 0.9), Op.COLOR, Op.CONTRAST, Op.BRIGHTNESS, Op.SHARPNESS)
    # timm goes down to 0 bits, which is a black image in old versions of Pillow and an error in new ones
    put(np.maximum(1, 4 - np.floor(level * 4)), Op.POSTERIZE)
    put(256 - np.floor(level * 256), Op.SOLARIZE)
    put(np.floor(level * 110), Op.SOLARIZE_ADD)
    return arguments


@cache
def _one_of(chosen: tuple[Op, ...]) -> NDArray[np.bool_]:
    """For each operation whether it is `chosen`: looking it up costs a tenth of `np.isin`."""
    return np.isin(np.arange(len(Op)), chosen)


class RandAugment:
    """RandAugment of a uint8 batch; `fill` (grey levels of R, G, B) is what moved images leave behind."""

    def __init__(
        self, spec: RandAugmentSpec, *, seed: int, fill: tuple[int, int, int], interpolation: Interpolation
    ) -> None:
        self.spec, self.seed, self.fill, self.interpolation = spec, seed, fill, interpolation

    def draw(self, index: NDArray[np.int64], epoch: int, img_size: int) -> Draws:
        """What happens to each sample of `index` (B,): operations and their arguments, each (num_ops, B)."""
        return draw_rand_augment(self.spec, index, seed=self.seed, epoch=epoch, img_size=img_size)

    def __call__(self, images: Tensor, index: Tensor | NDArray[np.int64], epoch: int) -> Tensor:
        """A new uint8 (B, 3, S, S), contiguous, on the device of `images`; `index` (B,) lies on the host."""
        draws = self.draw(host_index(index), epoch, images.shape[-1])
        return apply(images, *draws, fill=self.fill, interpolation=self.interpolation)


_PRIMARY = np.array((Op.COLOR, Op.SOLARIZE, Op.BLUR))
_JITTER_ORDERS = np.array(list(itertools.permutations((Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR))))  # (6, 3)


def draw_three_augment(index: NDArray[np.int64], *, jitter: float, seed: int, epoch: int) -> Draws:
    """Operations and their arguments, each (4, B): one of grey, solarise and blur, then the colour jitter."""
    draws = crng.u01(crng.key(seed, epoch, index, crng.THREE_AUGMENT), np.arange(6)[:, None])  # (6, B)
    primary = _PRIMARY[(draws[0] * len(_PRIMARY)).astype(np.int64)]
    sigma = 0.1 + 1.9 * draws[1]
    strength = np.where(primary == Op.BLUR, sigma, np.where(primary == Op.SOLARIZE, 128.0, 0.0))  # colour 0 is grey
    order = (draws[2] * len(_JITTER_ORDERS)).astype(np.int64)
    low, high = max(0.0, 1 - jitter), 1 + jitter
    factors = low + (high - low) * draws[3:]
    return np.vstack((primary, _JITTER_ORDERS[order].T)), np.vstack((strength, factors))


class ThreeAugment:
    """3-Augment (Touvron et al., DeiT III, 2022) of a uint8 batch.

    One of greyscale, solarisation (threshold 128) and Gaussian blur (standard deviation 0.1 to 2 pixels), equally
    likely; then brightness, contrast and saturation, each by a factor within 1 - `jitter` to 1 + `jitter`, in an order
    drawn for each image (as torchvision's ColorJitter draws it).
    """

    fill: tuple[int, int, int] = (0, 0, 0)
    interpolation: Interpolation = "bicubic"
    """Nothing moves here, so that neither is ever used."""

    def __init__(self, *, seed: int, jitter: float = 0.3) -> None:
        if jitter < 0:
            raise ValueError(f"3-Augment's jitter is {jitter}; it must be at least 0")
        self.seed, self.jitter = seed, jitter

    def draw(self, index: NDArray[np.int64], epoch: int, img_size: int) -> Draws:
        """What happens to each sample of `index` (B,), whatever the size: operations and arguments, each (4, B)."""
        del img_size
        return draw_three_augment(index, jitter=self.jitter, seed=self.seed, epoch=epoch)

    def __call__(self, images: Tensor, index: Tensor | NDArray[np.int64], epoch: int) -> Tensor:
        """A new uint8 (B, 3, S, S), contiguous, on the device of `images`; `index` (B,) lies on the host."""
        draws = self.draw(host_index(index), epoch, images.shape[-1])
        return apply(images, *draws, fill=self.fill, interpolation=self.interpolation)
