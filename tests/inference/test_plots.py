"""Spread in the picture of a sweep: over seeds, and over the rounds of a measurement."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pss.inference import plots
from pss.inference.plots import over_seeds, plot_sweep


def row(run, rho, top1, **more):
    usual = {"images_per_second": 100 / rho, "images_per_second_low": 90 / rho, "images_per_second_high": 120 / rho}
    return {
        "run": run,
        "rho": rho,
        "top1": top1,
        "gflops": rho,
        "gflops_low": None,
        "gflops_high": None,
        **usual,
        **more,
    }


SEEDS = [row(f"runs/dense-seed{seed}", rho, 60 + seed + 10 * rho) for seed in range(3) for rho in (1.0, 0.5)]


@pytest.mark.parametrize("names", ["a-seed{}", "a/seed{}", "a_seed_{}", "seed{}-a", "a-SEED={}"])
def test_runs_that_differ_in_their_seed_are_one(names):
    merged = over_seeds([row(names.format(seed), 1.0, top1) for seed, top1 in ((0, 70.0), (1, 74.0), (12, 72.0))])
    assert [(one["top1"], one["top1_std"]) for one in merged] == [(72.0, 2.0)]
    assert merged[0]["run"].endswith(" (3 seeds)")
    assert "seed1" not in merged[0]["run"].replace(" (3 seeds)", "")


def test_others_stay_as_they_are():
    rows = [row("a", 1.0, 70.0), row("b", 1.0, 71.0), row("seed1", 1.0, 72.0), row("linseed2-oil", 1.0, 73.0)]
    assert over_seeds(rows) == rows


def test_rates_range_over_all_seeds():
    (one,) = over_seeds([row(f"a-seed{n}", 1.0, 70.0, images_per_second_high=130.0 + n) for n in range(3)])
    assert (one["images_per_second_low"], one["images_per_second_high"]) == (90.0, 132.0)
    assert one["gflops_low"] is None


def drawn(rows):
    with Image.open(io.BytesIO(plot_sweep(rows))) as picture:
        return np.asarray(picture.convert("RGB"))


def test_the_spread_is_drawn(monkeypatch):
    bars = []
    original = plots.Axes.errorbar
    monkeypatch.setattr(
        plots.Axes, "errorbar", lambda self, xs, ys, **of: bars.append((xs, ys, of)) or original(self, xs, ys, **of)
    )
    before = [dict(one) for one in SEEDS]
    drawn(SEEDS)
    assert before == SEEDS
    speed, seeds, again = bars
    assert speed[2]["xerr"] == [pytest.approx([20, 10]), pytest.approx([40, 20])]  # 180 to 240 around 200, then of 100
    assert seeds[2]["yerr"] == again[2]["yerr"] == [1.0, 1.0]
    bars.clear()
    drawn([one | {"images_per_second_low": None} for one in SEEDS if "seed0" in one["run"]])
    assert bars == []


def test_ten_runs_are_told_apart_in_the_legend(monkeypatch):
    legends = []
    original = plots.Figure.legend
    monkeypatch.setattr(
        plots.Figure,
        "legend",
        lambda self, lines, names, **of: legends.append(lines) or original(self, lines, names, **of),
    )
    plot_sweep([row(f"runs/{name}", rho, 60 + 10 * rho) for name in "abcdefghij" for rho in (1.0, 0.5)])
    (lines,) = legends
    styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(lines) == len(styles) == 10
