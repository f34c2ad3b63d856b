"""The windowed order: a second order of training samples, which needs few tars at a time, and each once an epoch.

The tars of a split are dealt once into K groups. In each epoch every group has its tars permuted and takes them W at a
time; the samples of such a window are permuted. A global batch takes an equal part of every group. So all of it is a
function of (tars, seed, epoch, K, W): any number of processes that divides K takes whole groups, in the same batches.

Each permutation has a generator of its own, so that a process plans its own groups alone.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from pipelines.base import DataConfig, DataError
from pipelines.remote.uses import Uses
from pipelines.storage.source import ConvertedTable, Table

Int64 = NDArray[np.int64]


def deal(counts: Int64, groups: int) -> list[Int64]:
    """The tars of each group, ascending; `counts` are the samples of the tars, (tars,).

    The largest tar that is left goes to the group that has the fewest samples, so that equal tars are dealt in turn.
    """
    hands: list[list[int]] = [[] for _ in range(groups)]
    smallest = [(0, group) for group in range(groups)]
    for tar in np.argsort(-counts, kind="stable").tolist():
        samples, group = smallest[0]
        hands[group].append(tar)
        heapq.heapreplace(smallest, (samples + int(counts[tar]), group))
    return [np.array(sorted(hand), dtype=np.int64) for hand in hands]


class Windows:
    """The windowed order of one split for one global batch.

    Args:
        counts: samples of each tar, which follow each other in the split, (tars,).
        seed: of the order.
        groups: K.
        window: W, in tars.
        batch_size: of the global batch.
        decode_once: crops of each image, which are in the same batch.

    Raises:
        DataError: there are too few tars, or samples, for so many groups.
        ValueError: the groups cannot have equal parts of a batch.
    """

    def __init__(
        self, counts: Int64, *, seed: int, groups: int, window: int, batch_size: int, decode_once: int = 1
    ) -> None:
        if batch_size % groups:
            raise ValueError(
                f"data.groups is {groups}, which does not divide the global batch of {batch_size} images "
                f"(train.batch_size); set data.groups={largest_divisor(batch_size, groups)}"
            )
        if batch_size // groups % decode_once:
            raise ValueError(
                f"data.decode_once is {decode_once} and each of {groups} groups (data.groups) gives "
                f"{batch_size // groups} images of a batch; make that a multiple of it: lower data.groups"
            )
        if len(counts) < groups:
            raise DataError(
                f"the training split has {len(counts)} tars for {groups} groups; set data.groups to "
                f"{largest_divisor(batch_size, len(counts))}, or convert again with a smaller --shard-size"
            )
        self.counts, self.seed, self.num_groups, self.window = counts, seed, groups, window
        self.batch_size, self.decode_once = batch_size, decode_once
        self.group_tars = deal(counts, groups)
        self._begin = np.cumsum(counts) - counts  # of each tar, in the split
        smallest = min(int(counts[tars].sum()) for tars in self.group_tars)
        self.per_step = batch_size // groups // decode_once
        """Samples of a group in a step."""
        self.steps_per_epoch = smallest // (batch_size // groups)
        """As many as the smallest group has samples for; an epoch leaves out what the others have more."""
        if not self.steps_per_epoch:
            raise DataError(
                f"the smallest of {groups} groups (data.groups) has {smallest} samples, fewer than the "
                f"{batch_size // groups} that a batch of {batch_size} takes of each; lower train.batch_size"
            )

    @property
    def left_out(self) -> int:
        """Samples that an epoch leaves out: others in each epoch."""
        return int(self.counts.sum()) - self.steps_per_epoch * self.batch_size

    def check_ranks(self, ranks: int, name: str) -> None:
        """Raise `ValueError` unless so many ranks can share the groups; `name` says what they are."""
        if self.num_groups % ranks:
            near = max(1, self.num_groups // ranks) * ranks
            raise ValueError(
                f"data.groups is {self.num_groups}, which {ranks} {name} cannot share evenly; set it to a multiple, "
                f"such as data.groups={near}, which begins another order"
            )

    def groups_of(self, rank: int, world_size: int) -> range:
        """The groups that a rank reads."""
        each = self.num_groups // world_size
        return range(rank * each, (rank + 1) * each)

    def windows(self, epoch: int, group: int) -> list[Int64]:
        """The tars of each window of an epoch, in the order in which the group takes them."""
        tars = self._generator(epoch, group, 0).permutation(self.group_tars[group])
        return [tars[begin : begin + self.window] for begin in range(0, len(tars), self.window)]

    def samples(self, epoch: int, groups: range) -> tuple[NDArray[np.signedinteger], NDArray[np.uint8] | None]:
        """Numbers of the samples of `groups` in all batches, one after the other, (steps x images,), int32 where that
        can count them, and which of its crops each is; None for the latter where all are the only ones."""
        kind = np.int32 if self.counts.sum() <= 1 << 31 else np.int64
        wanted = self.steps_per_epoch * self.per_step
        found = np.empty((self.steps_per_epoch, len(groups), self.per_step, 1), dtype=kind)
        for place, group in enumerate(groups):
            stream, filled = np.empty(wanted, dtype=kind), 0
            for number, tars in enumerate(self.windows(epoch, group), 1):
                together = np.concatenate([np.arange(self.counts[tar]) + self._begin[tar] for tar in tars])
                taken = self._generator(epoch, group, number).permutation(together)[: wanted - filled]
                stream[filled : filled + len(taken)] = taken
                filled += len(taken)
                if filled == wanted:
                    break
            found[:, place, :, 0] = stream.reshape(self.steps_per_epoch, self.per_step)
        if self.decode_once == 1:
            return found.ravel(), None
        crops = np.arange(self.decode_once, dtype=np.uint8)
        return np.repeat(found, self.decode_once, axis=3).ravel(), np.tile(crops, found.size)

    def uses(self, epoch: int, groups: range) -> Uses:
        """When `groups` need each tar in an epoch: all of a window as long as the window is."""
        uses = Uses.none(len(self.counts))
        for group in groups:
            end = 0
            for tars in self.windows(epoch, group):
                begin, end = end, end + int(self.counts[tars].sum())
                if begin // self.per_step >= self.steps_per_epoch:
                    break
                uses.first[tars] = begin // self.per_step
                uses.last[tars] = min((end - 1) // self.per_step, self.steps_per_epoch - 1)
        return uses

    def _generator(self, epoch: int, group: int, window: int) -> np.random.Generator:
        """Of the tars of a group (window 0), or of the samples of one of its windows, counted from 1."""
        # The words of the counter that a generator never reaches by counting tell the generators of an epoch apart,
        # also from that of the full permutation, whose words are 0.
        counter = np.array([0, 0, window, group + 1], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(counter=counter, key=np.array([self.seed, epoch], np.uint64)))


def windows_of(table: Table, config: DataConfig, *, seed: int, batch_size: int, ranks: int) -> Windows | None:
    """The windowed order of a split, where the settings ask for it; `batch_size` is the global one.

    Raises:
        DataError: it has no tars, or too few.
        ValueError: `ranks` processes cannot share the groups, or these a batch.
    """
    if config.window is None:
        return None
    if not isinstance(table, ConvertedTable):
        raise DataError("data.window deals out the tars of a converted set; convert yours first, or leave it out")
    made = Windows(
        table.tar_counts(),
        seed=seed,
        groups=config.groups,
        window=config.window,
        batch_size=batch_size,
        decode_once=config.decode_once,
    )
    made.check_ranks(ranks, "processes")
    return made


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return next(one for one in range(min(number, most), 0, -1) if number % one == 0)
