"""At which steps of an epoch the tars of a split are read: what a cache that is smaller than the split goes by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Uses:
    """From which step on each tar is read, and until which, both (tars,); -1 where it is not."""

    first: Int64
    last: Int64

    @classmethod
    def none(cls, num_tars: int) -> Self:
        """No tar is read; to be filled in."""
        return cls(np.full(num_tars, -1, dtype=np.int64), np.full(num_tars, -1, dtype=np.int64))

    @classmethod
    def throughout(cls, num_tars: int, steps: int) -> Self:
        """Every tar is read in all of the epoch, as a permutation of all samples has it."""
        return cls(np.zeros(num_tars, dtype=np.int64), np.full(num_tars, steps - 1, dtype=np.int64))

    @classmethod
    def in_turn(cls, counts: Int64, rank: int, world_size: int, batch_size: int) -> Self:
        """Rank r reads samples r, r + world_size, ... in batches, as in evaluation; `counts` are the samples of each
        tar."""
        end = np.cumsum(counts)
        own_before = -(-np.maximum(np.stack([end - counts, end]) - rank, 0) // world_size)  # rank's samples before each
        read = own_before[1] > own_before[0]
        return cls(
            np.where(read, own_before[0] // batch_size, -1),
            np.where(read, (own_before[1] - 1) // batch_size, -1),
        )
