"""Which samples each rank sees at each step: pure functions, the same for every back end.

Resuming needs no more than the epoch and the step. A run may also go on with another number of ranks, as long as the
global batch (ranks x images per rank) stays the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.base import DataError

ORDER_VERSION = 1
"""Raised whenever the functions below would return another order for the same arguments."""


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
    num_samples: int, seed: int, epoch: int, *, batch_size: int, rank: int, world_size: int
) -> NDArray[np.int64]:
    """The samples of `rank` in one epoch, (steps, batch_size); the remainder that fills no global batch is dropped."""
    steps = train_steps(num_samples, batch_size, world_size)
    order = epoch_order(num_samples, seed, epoch)[: steps * world_size * batch_size]
    return order.reshape(steps, world_size, batch_size)[:, rank]


def evaluation_samples(num_samples: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """The samples of `rank` in evaluation: every one exactly once over all ranks, nothing padded."""
    return np.arange(rank, num_samples, world_size, dtype=np.int64)
