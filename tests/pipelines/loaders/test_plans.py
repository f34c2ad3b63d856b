"""Each epoch is planned once, before it is needed, and not by whoever trains."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import missing

from pipelines import DataConfig, DataError, build
from pipelines.loaders import planned
from pipelines.loaders.order import EpochPlan, train_plan
from pipelines.loaders.plans import Plans


def small(epoch: int) -> EpochPlan:
    return EpochPlan(np.arange(6, dtype=np.int32) + epoch, 2)


def test_a_plan_is_made_once_and_in_another_thread() -> None:
    made: list[tuple[int, bool]] = []

    def make(epoch: int) -> EpochPlan:
        made.append((epoch, threading.current_thread() is threading.main_thread()))
        return small(epoch)

    plans = Plans(make)
    for epoch in range(4):
        first = plans.of(epoch)
        plans.prepare(epoch + 1)
        assert plans.of(epoch) is first
        assert [step.tolist() for step in first] == [step.tolist() for step in small(epoch)]
    plans.close()
    assert made == [(epoch, False) for epoch in range(5)]


def test_a_plan_is_ready_before_it_is_asked_for_and_two_are_kept() -> None:
    done = threading.Event()

    def make(epoch: int) -> EpochPlan:
        if epoch == 1:
            done.set()
        return small(epoch)

    plans = Plans(make)
    plans.of(0)
    plans.prepare(1)
    assert done.wait(10), "nobody has asked for epoch 1, which comes next"
    plans.of(1)
    plans.prepare(2)
    plans.of(2)
    assert list(plans._plans) == [1, 2]
    plans.close()
    assert not plans._plans
    assert plans._thread is not None
    assert not plans._thread.is_alive()


def test_what_goes_wrong_is_heard_by_whoever_asks() -> None:
    def make(epoch: int) -> EpochPlan:
        raise DataError("no plan of this epoch")

    plans = Plans(make)
    with pytest.raises(DataError, match="no plan of this epoch"):
        plans.of(3)
    plans.close()


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.skipif(missing(name) is not None, reason=str(missing(name))))
        for name in ("torch", "dali", "ffcv")
    ],
)
def test_a_loader_plans_each_epoch_once(backend: str, converted_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs: list[int] = []

    def noted(num_samples: int, seed: int, epoch: int, **settings: int) -> EpochPlan:
        assert threading.current_thread() is not threading.main_thread()
        epochs.append(epoch)
        return train_plan(num_samples, seed, epoch, **settings)

    monkeypatch.setattr(planned, "train_plan", noted)
    config = DataConfig(img_size=48)
    loader = build(converted_root, "train", config=config, batch_size=8, train=True, loader=backend, num_workers=1)
    for epoch in range(2):
        loader.set_epoch(epoch)
        for _ in loader:
            pass
        assert loader.delivered_hash == loader.planned_hash(epoch)
    loader.set_epoch(1, 2)
    whole = loader.planned_hash(1)
    for _ in loader:
        pass
    assert loader.delivered_hash == whole
    loader.close()
    assert epochs == [0, 1, 2]


def test_a_plan_takes_four_bytes_an_image_and_five_with_copies() -> None:
    plan = train_plan(100_000, 1, 2, batch_size=100, rank=3, world_size=8)
    assert plan._samples.nbytes == 4 * 12_500
    assert plan._copies is None
    copies = train_plan(100_000, 1, 2, batch_size=100, rank=3, world_size=8, repeats=3)
    assert copies._samples.nbytes + copies._copies.nbytes == 5 * 12_500  # type: ignore[union-attr]


def test_the_number_of_a_step_that_is_not_there_is_refused() -> None:
    with pytest.raises(IndexError, match="no step 3 among 3"):
        small(0)[3]
