"""The choice of a back end: measured where there is something to choose, and explained."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import missing

from pipelines import DataConfig
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
