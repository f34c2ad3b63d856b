"""The method that docs/methods.md builds trains, is planned, evaluated and exported as the page says."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import warm

from pss.methods import Method

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def block(language):
    return re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)[1]


@pytest.mark.exhaustive
def test_the_page_shows_a_method_that_works(tmp_path):
    code = block("python")
    assert len(code.splitlines()) < 90
    (tmp_path / "halved.py").write_text(code, encoding="utf-8")
    small = ["--set", "train.epochs=2", "--set", "model.depth=3", "--set", "model.embed_dim=24"]
    small += ["--set", "optim.warmup_epochs=0", "--loader", "torch"]
    for line in block("sh").splitlines():
        program, *words = shlex.split(line)
        command = {"pss-convert": "cli.convert", "pss-train": "cli.train", "pss-eval": "cli.eval"}[program]
        run(tmp_path, command, *words, *(small if program == "pss-train" else []))
    rows = json.loads((tmp_path / "runs" / "halved" / "rho.json").read_text(encoding="utf-8"))
    assert [row["rho"] for row in rows] == [0.6, 1.0, 0.75, 0.25]
    assert [row["tokens"] for row in rows][1] == 17
    assert rows[3]["gflops"] < rows[0]["gflops"] < rows[1]["gflops"]
    told = run(tmp_path, "cli.train", "digits", "--plan", *small[:-2], "--set", "method=halved:Halved")
    assert "of dense" in told


def run(folder, module, *words):
    done = warm.run(
        [sys.executable, "-m", module, *words], cwd=folder, capture_output=True, timeout=250,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_prediction_of_ones_own_needs_its_costs():
    with pytest.raises(TypeError, match="Half has a predict of its own; it must say what that costs and keeps: tokens"):
        type("Half", (Method,), {"predict": lambda self, images, point=None: images})
