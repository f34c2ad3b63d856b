"""The choice of a back end: measured where there is something to choose, and explained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import missing
from memory_loader import MemoryLoader

from pipelines import Batch, DataConfig
from pipelines import probe as module
from pipelines.probe import images_per_second, probe

CONFIG = DataConfig(img_size=32)


def test_the_faster_back_end_is_chosen(converted_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := missing("dali"):
        pytest.skip(reason)
    monkeypatch.setattr(module, "_FEWEST", 10)
    monkeypatch.setattr(module, "_BATCH", 4)
    for torch_rate, expected in ((5.0, "dali"), (50.0, "torch")):
        rates = {"torch": torch_rate, "dali": 10.0}
        monkeypatch.setattr(module, "images_per_second", lambda loader, _, rates=rates: rates[loader.backend])
        result = probe(converted_root, "train", config=CONFIG, num_workers=1)
        assert (result.backend, result.rates) == (expected, rates)
        assert f"torch {torch_rate:.0f} images/s" in result.reason
    monkeypatch.setattr(module, "images_per_second", images_per_second)
    measured = probe(converted_root, "train", config=CONFIG, num_workers=1, seconds=0.01)
    assert all(rate > 0 for rate in measured.rates.values())
    assert measured.rates[measured.backend] == max(measured.rates.values())


class Clocked(MemoryLoader):
    """A loader that has `ahead` batches ready when it is first asked, and again when nothing is left to decode."""

    def __init__(self, steps: int, ahead: int, seconds: float, restart: float) -> None:
        super().__init__(8 * steps)
        self.batches_ahead, self.seconds, self.restart, self.now = ahead, seconds, restart, 0.0

    def __iter__(self) -> Iterator[Batch]:
        self.now += self.restart
        for step, batch in enumerate(super().__iter__()):
            if self.batches_ahead <= step < self.steps_per_epoch - self.batches_ahead:
                self.now += self.seconds
            yield batch


@pytest.mark.parametrize("ahead", [0, 2, 4])
@pytest.mark.parametrize("seconds", [0.5, 20.0, 1000.0])
def test_what_was_decoded_ahead_is_not_counted(ahead: int, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Clocked(60, ahead, 1 / 4, 7.0)
    monkeypatch.setattr("pipelines.probe.time.perf_counter", lambda: loader.now)
    assert images_per_second(loader, seconds) == pytest.approx(8 * 4)
    short = Clocked(6, ahead + 1, 1 / 4, 0.5)
    monkeypatch.setattr("pipelines.probe.time.perf_counter", lambda: short.now)
    per_epoch = 0.5 + max(0, 6 - 2 * (ahead + 1)) / 4
    assert images_per_second(short, seconds) == pytest.approx(6 * 8 / per_epoch)


def test_where_there_is_nothing_to_choose_nothing_is_measured(
    converted_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not missing("dali"):
        result = probe(converted_root, "train", config=CONFIG)
        assert (result.backend, result.rates, result.reason) == ("dali", {}, "53 images are too few to measure")
    for usual, reason in (("torch", "DALI is not installed"), ("ffcv", "the train split holds FFCV data only")):
        monkeypatch.setattr("pipelines.choose_backend", lambda *_, usual=usual: usual)
        result = probe(converted_root, "train", config=CONFIG)
        assert (result.backend, result.rates, result.reason) == (usual, {}, reason)
