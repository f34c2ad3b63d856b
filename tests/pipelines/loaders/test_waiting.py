"""One mechanism notices that nothing happens: progress renews its patience, and preparations have a limit of their own.

Time is made up: a wait takes as long as it was allowed to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_loaders import BACKENDS

from pipelines import DataConfig, DataError, build
from pipelines.loaders import waiting
from pipelines.loaders.threads import FilledBatch, PixelMemory, Threads
from pipelines.loaders.waiting import Signs, WatchedThread, wait_for


class Clock:
    """What waits, and everything that is to happen meanwhile."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.events: list[tuple[float, Callable[[], object]]] = []

    def at(self, seconds: float, event: Callable[[], object]) -> None:
        self.events.append((1000.0 + seconds, event))
        self.events.sort(key=lambda one: one[0])

    def attempt(self, timeout: float) -> str | None:
        self.now += max(timeout, 0.01)
        while self.events and self.events[0][0] <= self.now:
            if self.events.pop(0)[1]() == "result":
                return "result"
        return None

    @property
    def passed(self) -> float:
        return self.now - 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(waiting.time, "monotonic", lambda: clock.now)
    return clock


def test_it_gives_up_in_one_sentence_with_a_remedy(clock: Clock) -> None:
    with pytest.raises(DataError, match=r"^nobody came for 30 s; see if the disk .* try again: .* --resume$"):
        wait_for(clock.attempt, "nobody came", 30)
    assert 30 <= clock.passed < 31


def test_what_comes_at_the_last_moment_is_taken(clock: Clock) -> None:
    clock.at(29.95, lambda: "result")
    assert wait_for(clock.attempt, "nobody came", 30) == "result"


@pytest.mark.parametrize("how", ["progress", "signs"])
def test_progress_renews_its_patience(how: str, clock: Clock) -> None:
    done, signs = [], Signs()
    for second in range(20, 200, 20):
        clock.at(second, lambda: done.append(1) if how == "progress" else signs.advance())
    clock.at(200, lambda: "result")
    arguments: dict[str, Any] = {"progress": lambda: len(done)} if how == "progress" else {"signs": signs}
    assert wait_for(clock.attempt, "nobody came", 30, **arguments) == "result"
    clock.at(210, lambda: done.append(1) if how == "progress" else signs.advance())
    with pytest.raises(DataError, match="nobody came for 30 s"):
        wait_for(clock.attempt, "nobody came", 30, **arguments)
    assert 239 < clock.passed < 242  # of the last sign, and not of the beginning


def test_progress_reaches_those_who_wait_for_the_waiting(clock: Clock) -> None:
    done: list[int] = []
    signs = Signs()
    for second in (5, 15, 25):
        clock.at(second, lambda: done.append(1))
    clock.at(30, lambda: "result")
    wait_for(clock.attempt, "nobody came", 20, signs=signs, progress=lambda: len(done))
    assert signs.count == 3


def test_a_preparation_is_no_stall_and_has_its_own_limit(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    signs, part = Signs(), ExitStack()
    clock.at(5, lambda: part.enter_context(signs.long_part("the compilation", 600)))
    clock.at(500, part.close)
    clock.at(525, lambda: "result")
    assert wait_for(clock.attempt, "nobody came", 30, signs=signs) == "result"  # 25 s after the preparation
    assert [record.getMessage() for record in caplog.records] == ["the compilation takes its time; it may take 600 s"]
    with (
        signs.long_part("the compilation", 600),
        pytest.raises(DataError, match=r"^the compilation has not ended"),
    ):
        wait_for(clock.attempt, "nobody came", 30, signs=signs)
    assert 1124 < clock.passed < 1127
    with pytest.raises(DataError, match="nobody came for 30 s"):
        wait_for(clock.attempt, "nobody came", 30, signs=signs)


def test_a_call_that_never_returns_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.storage.reading._JOIN_SECONDS", 0.1)
    thread, go_on = WatchedThread("the library"), threading.Event()
    assert thread.call(lambda: 5, 5) == 5
    with pytest.raises(DataError, match=r"the library delivered nothing for 0\.3 s"):
        thread.call(lambda: go_on.wait(20), 0.3)
    with pytest.raises(DataError, match="the library does not answer"):
        thread.call(lambda: 5, 5)
    go_on.set()
    thread.stop()


def test_a_batch_whose_images_come_slowly_is_waited_for(clock: Clock) -> None:
    """And one whose images stop coming is not, though some were decoded."""
    threads = Threads(1, "test")
    try:
        for arriving, ending in ((4, None), (3, "the threads wait for a disk, and no image was decoded for 30 s")):
            batch = FilledBatch(np.arange(8), 4, PixelMemory().images(8, 2))
            signs = Signs()
            begun, clock.events = clock.passed, []
            for image in range(1, arriving + 1):
                clock.at(begun + 25 * image, lambda batch=batch: batch.attempt(lambda: None))
            batch._done.wait = lambda timeout, batch=batch: clock.attempt(timeout) or batch._done.is_set()  # type: ignore
            if ending is None:
                assert batch.wait(threads, 30, "a disk", signs) is batch.images
                assert signs.count == arriving - 1  # the last one ends the wait
            else:
                with pytest.raises(DataError, match=ending):
                    batch.wait(threads, 30, "a disk", signs)
            assert clock.passed - begun == pytest.approx(25 * arriving + (0 if ending is None else 30), abs=1)
    finally:
        threads.stop()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_loader_is_given_up_by_it(backend: str, converted_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"config": DataConfig(img_size=48), "batch_size": 4, "num_workers": 1, "train": True}
    loader: Any = build(converted_root, "train", loader=backend, **settings)
    go_on = threading.Event()
    monkeypatch.setattr("pipelines.storage.reading._JOIN_SECONDS", 0.1)
    monkeypatch.setattr(waiting, "stalled", lambda what, seconds: DataError(f"{what}, {seconds}"))
    monkeypatch.setattr(loader, "stall_seconds", 0.3)
    if backend == "ffcv":
        monkeypatch.setattr("pipelines.loaders.ffcv_loader._Epoch.run_pipeline", lambda *_: go_on.wait(20))
    else:
        monkeypatch.setattr(loader.source, "read_many", lambda *_: go_on.wait(20))
    with pytest.raises(DataError, match=r", 0\.3$"):
        next(iter(loader))
    go_on.set()
