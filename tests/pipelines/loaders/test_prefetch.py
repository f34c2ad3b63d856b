"""The queue between a loader and its reader: the same batches, bounded, and no way to hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import missing
from memory_loader import MemoryLoader
from test_loaders import same

from pipelines import Batch, DataConfig, DataError, Loader, build
from pipelines.loaders.prefetch import Prefetcher, bytes_of

BATCH_BYTES = bytes_of(next(iter(MemoryLoader())))


class Hashed(MemoryLoader):
    """A loader in memory that counts what it delivers instead of hashing it."""

    delivered_hash = 0

    def planned_hash(self, epoch: int) -> int:
        return self.steps_per_epoch

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        super().set_epoch(epoch, start_step)
        self.delivered_hash = start_step

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            self.delivered_hash += 1
            yield batch


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def no_threads() -> bool:
    return not any(thread.name == "pss-prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("backend", ["torch", "dali", "ffcv"])
def test_it_delivers_what_the_loader_does(backend: str, converted_root: Path) -> None:
    if reason := missing(backend):
        pytest.skip(reason)
    settings = {"config": DataConfig(img_size=32), "batch_size": 4, "train": True, "loader": backend}
    plain = build(converted_root, "train", **settings)
    ahead = Prefetcher(build(converted_root, "train", **settings), 1 << 16)
    assert isinstance(ahead, Loader)
    ahead.load_state_dict(plain.state_dict())
    for epoch, step in ((0, 0), (1, 5)):
        plain.set_epoch(epoch, step)
        ahead.set_epoch(epoch, step)
        assert ahead.delivered_hash == plain.delivered_hash
        for ours, theirs in zip(ahead, plain, strict=True):
            assert same([ours], [theirs])
            assert ahead.delivered_hash == plain.delivered_hash  # of what the reader has, not of what waits
        assert ahead.delivered_hash == ahead.planned_hash(epoch)
    plain.close()
    ahead.close()
    assert no_threads()


@pytest.mark.parametrize(("capacity", "batches"), [(1, 1), (BATCH_BYTES, 1), (3 * BATCH_BYTES + 1, 3)])
def test_what_waits_is_bounded_in_bytes(capacity: int, batches: int) -> None:
    made: list[int] = []
    ahead = Prefetcher(Hashed(80, on_batch=made.append), capacity)
    reader = iter(ahead)
    for taken in range(1, 4):
        next(reader)
        wait_until(lambda taken=taken: len(made) == taken + batches + 1)  # one more is in the thread's hands
        assert (ahead.buffered_batches, ahead.buffered_bytes) == (batches, batches * BATCH_BYTES)
    ahead.close()
    assert ahead.buffered_bytes == 0
    assert no_threads()


def test_label_maps_count_as_well() -> None:
    made: list[int] = []
    maps = np.arange(80)[:, None].repeat(100, 1)
    each = BATCH_BYTES + 8 * 100 * maps.itemsize
    ahead = Prefetcher(Hashed(80, on_batch=made.append, maps=maps), 3 * each - 1)
    reader = iter(ahead)
    first = next(reader)
    wait_until(lambda: len(made) == 1 + 2 + 1)
    assert (ahead.buffered_batches, ahead.buffered_bytes) == (2, 2 * each)
    for batch in (first, *reader):
        assert batch.maps is not None
        assert torch.equal(batch.maps[:, 0], batch.index)
    ahead.close()


@pytest.mark.parametrize(("capacity", "late"), [(8, 0), (1, 1)])
def test_alternating_steps_run_at_the_average_rate(capacity: int, late: int) -> None:
    """On a virtual clock: a batch takes 2 ticks to make, steps take 3 ticks six times and then 1 tick six times."""
    permits, made = threading.Semaphore(0), [0]

    def make_one(step: int) -> None:
        permits.acquire()
        made[0] += 1

    ahead = Prefetcher(Hashed(8 * 60, on_batch=make_one), capacity * BATCH_BYTES)
    reader = iter(ahead)
    taken = clock = waited = 0

    def held_back() -> bool:
        """Whether the thread has a batch that finds no room."""
        return made[0] - taken == ahead.buffered_batches + 1 and ahead.buffered_batches == capacity

    def settle() -> None:
        wait_until(lambda: made[0] - taken == ahead.buffered_batches or held_back())

    def tick() -> None:
        nonlocal clock
        clock += 1
        if clock % 2 == 0 and not held_back():
            before = made[0]
            permits.release()
            wait_until(lambda: made[0] == before + 1)
            settle()

    tick()
    tick()
    for step in range(48):
        while not ahead.buffered_batches:
            tick()
            waited += 1
        next(reader)
        taken += 1
        settle()
        for _ in range(3 if step % 12 < 6 else 1):
            tick()
    permits.release(100)
    ahead.close()
    assert (waited > 0) == bool(late)


def test_a_failure_comes_at_its_batch() -> None:
    def fail(step: int) -> None:
        if step == 3:
            raise DataError("sample 24 is damaged")

    ahead = Prefetcher(Hashed(80, on_batch=fail), 1 << 30)
    reader = iter(ahead)
    assert len([next(reader) for _ in range(3)]) == 3
    with pytest.raises(DataError, match="sample 24"):
        next(reader)
    with pytest.raises(DataError, match="closed"):
        iter(ahead)
    assert no_threads()


def test_a_loader_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.storage.reading._JOIN_SECONDS", 0.1)
    go_on = threading.Event()

    def hang(step: int) -> None:
        if step == 2:
            go_on.wait(20)

    ahead = Prefetcher(Hashed(80, on_batch=hang), 1 << 30, timeout=0.2)
    with pytest.raises(DataError, match=r"delivered nothing for 0\.2 s"):
        list(ahead)
    assert ahead.seconds_waited >= 0.2
    go_on.set()
    wait_until(no_threads)


def test_an_iteration_left_early_leaves_nothing_behind() -> None:
    ahead = Prefetcher(Hashed(80), 2 * BATCH_BYTES)
    ahead.set_epoch(1)
    expected = list(ahead)
    ahead.set_epoch(1)
    for _ in ahead:
        break
    left = iter(ahead)
    next(left)
    ahead.set_epoch(1)
    assert same(list(ahead), expected)
    with pytest.raises(RuntimeError, match="iterated anew"):
        next(left)
    ahead.close()
    ahead.close()
    assert no_threads()


def test_a_capacity_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity is 0"):
        Prefetcher(Hashed(), 0)
