"""Which samples each rank sees at each step: pure functions, the same for every back end.

A step is an array of keys. A key names a showing of a sample: its number in the split and, in the bits above, which
of its copies it is. Random numbers are drawn by key, so that copies differ; copy 0 is keyed by the bare number.

Resuming needs no more than the epoch and the step. A run may also go on with another number of ranks, as long as the
global batch (ranks x images per rank) stays the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines import crng
from pipelines.base import COPY_SHIFT, DataError

ORDER_VERSION = 1
"""Raised whenever the functions below would return another order for the same arguments."""


def draw_keys(index: NDArray[np.int64], copy: NDArray[np.int64]) -> NDArray[np.int64]:
    """The keys of copies `copy` of samples `index`."""
    return index | copy << COPY_SHIFT


def sample_numbers(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which samples `keys` are about."""
    return keys & ((1 << COPY_SHIFT) - 1)


def copy_numbers(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which of their copies, counted from 0."""
    return keys >> COPY_SHIFT


def keys_hash(keys: NDArray[np.int64]) -> int:
    """A 32-bit hash of `keys` in any order: hashes of parts add up, modulo 2^32, to that of the whole."""
    return int(crng.mix(keys).sum(dtype=np.uint64)) & 0xFFFFFFFF


def epoch_order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of all samples that epoch `epoch` follows; int64 (num_samples,)."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))
    return generator.permutation(num_samples)


def train_steps(num_samples: int, batch_size: int, world_size: int) -> int:
    """Full global batches in an epoch; `DataError` if there is not even one."""
    global_batch = batch_size * world_size
    if num_samples < global_batch:
        raise DataError(
            f"the training split has {num_samples} samples, fewer than one global batch of {global_batch} "
            f"({batch_size} per rank on {world_size} rank(s)); lower the batch size to at most "
            f"{num_samples // world_size}"
        )
    return num_samples // global_batch


def train_batches(
    num_samples: int,
    seed: int,
    epoch: int,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    repeats: int = 1,
    decode_once: int = 1,
    parts: int = 1,
) -> NDArray[np.int64]:
    """The keys of `rank` in one epoch, (steps, batch_size); the remainder that fills no global batch is dropped.

    With `repeats` = R every sample of the epoch's order comes R times in a row and place p of that list goes to rank
    p % world_size: repeated augmentation (Hoffer et al., 2020) as DeiT's sampler does it. The epoch keeps its length,
    so it reaches the first 1/R of the order. With `decode_once` = R the R copies stay together on one rank.

    With `parts` = P each batch is those of P ranks one after the other: of ranks rank * P and following among
    world_size * P.
    """
    copies = repeats * decode_once
    assert repeats == 1 or decode_once == 1
    steps = train_steps(num_samples, batch_size, world_size)
    places = np.arange(steps * world_size * batch_size)
    order = epoch_order(num_samples, seed, epoch)
    keys = draw_keys(order[places // copies], places % copies)
    if repeats > 1:
        # (steps, images of a part, world_size, parts)
        dealt = keys.reshape(steps, batch_size // parts, world_size, parts)[:, :, rank]
        return dealt.swapaxes(1, 2).reshape(steps, batch_size)
    return keys.reshape(steps, world_size, batch_size)[:, rank]


def evaluation_samples(num_samples: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """The samples of `rank` in evaluation: every one exactly once over all ranks, nothing padded."""
    return np.arange(rank, num_samples, world_size, dtype=np.int64)
