"""Random numbers without a generator: each is a pure function of (seed, epoch, sample index, stream, counter).

There is no state to save, to fork into workers or to advance in order, so what a sample receives does not depend on
which process handles it, or when. The hash is splitmix64 (Steele, Lea and Flood, 2014). The numpy and the torch
functions return the same bits; torch has no unsigned 64-bit arithmetic, so its twin works on wrapping int64.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

UInt64 = NDArray[np.uint64]

CROP, FLIP, RAND_AUGMENT, THREE_AUGMENT, ERASING, ERASING_NOISE, PATCHES = range(7)
"""Streams: unrelated draws for the same sample and epoch. Numbers once used keep their meaning."""

_GOLDEN, _MULTIPLY_1, _MULTIPLY_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_GOLDEN_64, _LAST_SHIFT = np.uint64(_GOLDEN), np.uint64(31)
_ROUNDS = ((np.uint64(30), np.uint64(_MULTIPLY_1)), (np.uint64(27), np.uint64(_MULTIPLY_2)))
_TO_UNIT = 1.0 / (1 << 53)
_FEW_NUMBERS = 64  # to be remembered; where each sample draws numbers of its own there are more, and always others


def mix(value: ArrayLike) -> UInt64:
    """The splitmix64 hash of each uint64."""
    z: UInt64 = np.array(value, dtype=np.uint64, ndmin=1)  # wrapping is meant; numpy warns about it for scalars only
    return _mix_in_place(z).reshape(np.shape(value))


def _mix_in_place(z: UInt64) -> UInt64:
    """In place and with few calls: it is what most draws cost."""
    np.add(z, _GOLDEN_64, out=z)
    shifted = np.empty_like(z)
    for shift, multiplier in _ROUNDS:
        np.multiply(np.bitwise_xor(z, np.right_shift(z, shift, out=shifted), out=z), multiplier, out=z)
    return np.bitwise_xor(z, np.right_shift(z, _LAST_SHIFT, out=shifted), out=z)


def key(seed: int, epoch: int, index: ArrayLike, stream: int) -> UInt64:
    """One key per sample, in the shape of `index`; all arguments are at least 0."""
    samples = np.asarray(index, dtype=np.uint64)
    # The stream is hashed in like the rest: merely combined by xor, stream s draw n would be stream n draw s.
    return mix(mix(_of_epoch(seed, epoch) ^ samples) ^ np.uint64(stream))


@lru_cache(maxsize=16)
def _of_epoch(seed: int, epoch: int) -> UInt64:
    """Remembered, for numpy takes as long for one number as for a thousand."""
    return mix(mix(seed) ^ np.uint64(epoch))


def u01(k: UInt64, n: ArrayLike) -> NDArray[np.float64]:
    """Draw number `n` of each key, uniform on [0, 1) in steps of 2^-53.

    `n` may be an array that is broadcast with `k`: numbers (D, 1) and keys (B,) make draws (D, B).
    """
    numbers = np.asarray(n, dtype=np.uint64)
    few = numbers.size <= _FEW_NUMBERS
    draws = mix(k ^ (_of_numbers(numbers.tobytes(), numbers.shape) if few else mix(numbers)))
    return np.multiply(np.right_shift(draws, np.uint64(11), out=draws), _TO_UNIT, dtype=np.float64)


@lru_cache(maxsize=64)
def _of_numbers(numbers: bytes, shape: tuple[int, ...]) -> UInt64:
    """Remembered like `_of_epoch`: there are but a few, the same at every step."""
    return mix(np.frombuffer(numbers, dtype=np.uint64).reshape(shape))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own copies the sign bit in."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def mix_torch(z: Tensor) -> Tensor:
    """The same hash as `mix`, of int64 read as uint64."""
    z = z + _signed(_GOLDEN)
    z = (z ^ _shift_right(z, 30)) * _signed(_MULTIPLY_1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MULTIPLY_2)
    return z ^ _shift_right(z, 31)


def _constant(value: Any) -> int:
    return _signed(int(mix(value)))


def key_torch(seed: int, epoch: int, index: Tensor, stream: int) -> Tensor:
    """The same keys as `key`, on the device of `index` (int64)."""
    return mix_torch(mix_torch(index ^ _constant(mix(seed) ^ np.uint64(epoch))) ^ stream)


def u01_torch(k: Tensor, n: int | Tensor) -> Tensor:
    """The same draws as `u01`, float64 on the device of `k`; `n` may be int64 that is broadcast with it."""
    number = mix_torch(n) if isinstance(n, Tensor) else _constant(n)
    return _shift_right(mix_torch(k ^ number), 11).to(torch.float64) * _TO_UNIT
