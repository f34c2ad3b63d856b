"""The benchmark of loaders counts no image that was decoded before the clock started."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from conftest import missing

from pipelines import DataConfig, build
from tools.benchmarks import loader as bench_loader
from tools.benchmarks.loader import Case, timed

BATCH, SECONDS, WANTED = 8, 0.5, 40


class Simulated:
    """A loader that decodes a batch in SECONDS, on a clock of its own.

    It hands out the first batch of an epoch when its queue of `ahead` batches is full, and begins another one whenever
    there is room.
    """

    def __init__(self, steps: int, ahead: int) -> None:
        self.steps, self.ahead, self.now, self.asked = steps, ahead, 0.0, 0

    def epoch(self):
        ready, handed = [self.now], []  # when each batch was decoded, after when it all began; when each was taken
        for step in range(self.steps):
            begun = min(self.steps, step + max(self.ahead, 1))
            for number in range(len(ready) - 1, begun):
                room = handed[number - self.ahead] if 0 <= number - self.ahead < step else 0.0
                ready.append(max(ready[-1], room) + SECONDS)
            self.now = max(self.now, ready[begun if step == 0 else step + 1])
            handed.append(self.now)
            self.asked += 1
            yield SimpleNamespace(labels=range(BATCH))


@pytest.mark.parametrize("ahead", [0, 1, 3, 4, 10])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 17, 39, 40, 41, 47, 60, 70, 1000])
def test_the_rate_is_that_of_decoding_whatever_lies_ready(steps, ahead):
    loader = Simulated(steps, ahead)
    case = Case(loader.epoch, steps, ahead)
    rate, cpu = timed(case, WANTED, torch.device("cpu"), lambda: loader.now, lambda: 2 * loader.now)
    assert rate == pytest.approx(BATCH / SECONDS)
    assert cpu == pytest.approx(2e3 * SECONDS / BATCH)
    assert loader.asked == sum(case.window(WANTED)) >= WANTED + ahead


def test_what_would_not_be_steady_is_refused(image_root):
    words = ["--data", str(image_root), "--threads", "1", "--batch", "4"]
    with pytest.raises(SystemExit, match="--batches is 7, but timm decodes up to 2 batches ahead; time at least 8"):
        bench_loader.main([*words, "--batches", "7"])
    with pytest.raises(SystemExit, match="timm has fewer images than one batch of 54; lower --batch"):
        bench_loader.main([*words, "--batch", "54"])


@pytest.mark.parametrize("backend", ["torch", "dali"])  # FFCV would be compiling for most of the test
def test_loaders_work_as_far_ahead_as_they_say(converted_root, backend, monkeypatch):
    if reason := missing(backend):
        pytest.skip(reason)
    settings = {"config": DataConfig(img_size=32), "batch_size": 4, "train": True, "num_workers": 2}
    loader = build(converted_root, "train", loader=backend, **settings)
    read, begun = loader.source.read_many, []
    monkeypatch.setattr(loader.source, "read_many", lambda samples: begun.append(samples) or read(samples))
    try:
        batches = iter(loader)
        for handed in range(1, 4):
            next(batches)
            for _ in range(500):  # nobody asks for more, so that the queue fills
                if len(begun) >= handed + loader.batches_ahead:
                    break
                time.sleep(0.01)
            time.sleep(0.05)
            assert len(begun) == handed + loader.batches_ahead
    finally:
        loader.close()
