"""A converted split whose tars lie elsewhere: each is mapped into memory when the cache has it, and let go of when no
batch needs it any more."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.base import DataError
from pipelines.remote.fetching import Fetcher, UsesOf
from pipelines.remote.place import RemoteSet
from pipelines.remote.uses import Uses
from pipelines.storage.manifest import take_rows
from pipelines.storage.source import Bytes, TarSource

_KEPT_STEPS = 8
"""For how many more batches a tar stays mapped that no batch needs: a GPU may still be at what was read from it."""


class RemoteTars(TarSource):
    """As `TarSource`, of a data set that is fetched as it is read.

    A loader that says by `follow` and `advance` what it reads has tars fetched ahead of it. Without that, each is
    fetched when it is read.
    """

    def __init__(self, remote: RemoteSet, split: str, check_bytes: bool = True) -> None:
        self.remote = remote
        super().__init__(remote.folder, split, check_bytes)
        names = self.entry.shards
        entries = [self.manifest.files[name] for name in names]
        self._fetcher = Fetcher(remote.cache, remote.store, remote.folder, names, entries)
        self._alive: Callable[[], object] = lambda: None
        self._last = np.full(len(names), -1, dtype=np.int64)  # step of the epoch until which each tar is needed
        self._mapped: set[int] = set()
        self._retired: deque[tuple[int, Bytes]] = deque()
        self._step = self._delivered = 0
        weakref.finalize(self, self._fetcher.stop)

    def follow(self, uses_of: UsesOf, step: int, steps: int, alive: Callable[[], object]) -> None:
        """An iteration begins.

        Args:
            uses_of: when tars are read in this epoch and in the next one; see `Fetcher.follow`.
            step: the first one that is read.
            steps: of an epoch.
            alive: called while a batch waits for a tar that is on its way.
        """
        self._alive, self._step = alive, step
        unknown = self._last = np.full(len(self._last), steps, dtype=np.int64)  # until it is planned, all stay

        def planned() -> tuple[Uses, Uses | None]:
            found = uses_of()
            if self._last is unknown:  # else another iteration has begun
                self._last = found[0].last
            return found

        self._fetcher.follow(planned, steps, step)

    def advance(self) -> None:
        """Another batch has been delivered."""
        self._step, self._delivered = self._step + 1, self._delivered + 1
        self._fetcher.advance(self._step)
        for tar in [tar for tar in list(self._mapped) if self._last[tar] < self._step]:
            self._mapped.discard(tar)
            self._retired.append((self._delivered, self._tars[tar]))
            self._tar_bytes[tar] = self._tar_address[tar] = 0
            self._tars[tar] = np.zeros(0, np.uint8)
        while self._retired and self._retired[0][0] + _KEPT_STEPS < self._delivered:
            self._retired.popleft()

    def leave(self) -> None:
        """Need no tar any more, and stop the threads that fetch them; reading starts them again."""
        self._fetcher.stop()

    def check_size(self, name: str) -> None:
        """Of a table; tars come and go, and are checked as they come."""
        if name not in self.entry.shards:
            super().check_size(name)

    def name(self, i: int) -> str:
        return f"{self.remote.url}/{self._tar_of(i)}, member {i:08d}.jpg"

    def _located(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        tars = take_rows(self._rows, index)["shard"]
        if not self._tar_bytes[tars].all():
            needed = np.unique(tars[self._tar_bytes[tars] == 0]).tolist()
            while absent := [tar for tar in needed if not self._tried(tar)]:
                self._fetcher.wait_for(absent, self._alive)
        return super()._located(index)

    def _tried(self, tar: int) -> bool:
        """Map a tar; False where the cache has not got it."""
        try:
            self._map(tar)
        except DataError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return False
            raise
        self._mapped.add(tar)
        return True

    def _damaged(self, i: int) -> DataError:
        path = self.root / self._tar_of(i)
        return DataError(f"{path} is no longer as it was fetched; remove it, and it is fetched again")

    def _tar_of(self, i: int) -> str:
        return self.entry.shards[int(self._rows["shard"][i])]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.remote, self.split, self.check_bytes)
