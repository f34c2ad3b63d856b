"""The benchmark of rho runs and says what the FLOPs allow."""

from __future__ import annotations

import sys

from tools.benchmarks import rho as bench_rho


def test_a_line_for_every_rho(capsys, monkeypatch):
    arguments = ["--model", "deit_tiny_patch16_224", "--img-size", "32", "--batch-size", "2", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["bench_rho", *arguments, "--rho", "0.5"])
    bench_rho.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("| 1 | 5 |")
    assert "| 1.000 (1.000–1.000) | – | 1.000 |" in lines[-2]
    assert lines[-1].startswith("| 0.5 | 2 |")
