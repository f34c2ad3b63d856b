"""The doctor: rates are measured, and the verdict follows from them."""

from __future__ import annotations

import pytest
import torch

import cli.doctor
from pipelines.base import DataError
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
    cli.doctor.show(
        chosen, planned, found, {"torch": loader_rate, "dali": 2 * loader_rate}, backend="torch", device="cpu"
    )
    told = capsys.readouterr().out
    assert all(word in told for word in words), told
    lines = told.splitlines()
    assert max(map(len, lines)) <= 100
    (marked,) = [line for line in lines if line.startswith("> torch")]
    assert f"{loader_rate:,.0f}" in marked
    assert any(line.startswith("  dali ") and f"{2 * loader_rate:,.0f}" in line for line in lines)
    assert any(line.startswith("  ffcv raw256") and "~" in line for line in lines)


def test_every_loader_that_can_read_the_data_is_measured(image_root, monkeypatch):
    monkeypatch.setattr(cli.doctor, "_SECONDS", 0.05)
    small = config("train.batch_size=4")
    rates, failures = cli.doctor.measure_loaders(small, image_root, "auto", "cpu")
    assert "torch" in rates
    assert rates.keys() | failures.keys() == {"torch", "dali", "ffcv"}
    assert "ffcv" in failures  # the images lie in folders
    with pytest.raises(DataError, match=r"dataset\.json|FFCV"):
        cli.doctor.measure_loaders(small, image_root, "ffcv", "cpu")
