"""The benchmark of rho runs and says what the FLOPs allow."""

from __future__ import annotations

import sys

import pytest

from tools.benchmarks import rho as bench_rho

SMALL = ["--model", "deit_tiny_patch16_224", "--img-size", "32", "--batch-size", "2", "--rounds", "2"]


def test_a_line_for_every_rho(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_rho", *SMALL, "--rho", "0.5"])
    bench_rho.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("| dense | 5 |")
    assert "| 1.000 (1.000–1.000) | – | 1.000 |" in lines[-2]
    assert lines[-1].startswith("| 0.5 | 2 |")


@pytest.mark.parametrize(
    ("arguments", "point"),
    [(["--method", "dynamicvit", "--rho", "0.5"], 0.5), (["--method", "avit", "--set", "avit.gate_center=3"], None)],
)
def test_other_methods_stand_beside_dense(arguments, point):
    dense, other = bench_rho.main([*SMALL, *arguments])["levels"]
    assert (dense["point"], other["point"]) == ("dense", point)
    assert dense["arithmetic"] == 1.0
    assert other["arithmetic"] > 1.01
