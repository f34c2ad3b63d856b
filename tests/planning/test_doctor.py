"""The doctor: rates are measured, and the verdict follows from them."""

from __future__ import annotations

import pytest
import torch

import cli.doctor
from pss import recipes
from pss.planning.doctor import diagnose, measure_training
from pss.planning.plan import plan

TINY = ["model.embed_dim=24", "model.depth=2", "train.epochs=4", "schedule.name=cyclic", "train.batch_size=16"]


def config(*settings):
    return recipes.get("digits").with_settings([*TINY, *settings, "optim.warmup_epochs=0"])


def test_every_level_is_measured():
    planned = plan(config(), num_images=400, num_classes=4)
    rates = measure_training(config(), planned, 4, torch.device("cpu"))
    assert list(rates) == list(planned.levels)
    assert all(rate > 0 for rate in rates.values())


@pytest.mark.parametrize(
    ("loader_rate", "bounds", "words"),
    [
        (1e6, ["model"] * 5, ["nothing to change"]),
        (
            1700.0,
            ["loader", "loader", "model", "model", "model"],
            ["is fast enough", "cure: --set schedule.shuffle=true"],
        ),
        (100.0, ["loader"] * 5, ["is too slow", "cure: a loader of", "--format ffcv", "train.num_workers"]),
    ],
)
def test_the_verdict_follows_from_the_rates(capsys, loader_rate, bounds, words):
    """A model of 1,000 images/s at rho = 1, where time goes with arithmetic."""
    chosen = config("data.prefetch_gb=0.0002", "train.epochs=4")
    planned = plan(chosen, num_images=1600, num_classes=4)
    rates = {level: 1000 * planned.dense.training / level.cost.training for level in planned.levels}
    found = diagnose(chosen, planned, rates, loader_rate)
    assert found.machine.images_per_second == pytest.approx(1000)
    assert [found.bound(level) for level in rates] == bounds
    cli.doctor.show(chosen, planned, found, backend="torch", device="cpu")
    told = capsys.readouterr().out
    assert all(word in told for word in words), told
