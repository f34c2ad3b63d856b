"""The README's first command, shortened: everything it promises is there afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm
from PIL import Image

from tools import demo

ROOT = Path(__file__).parents[2]


@pytest.mark.exhaustive
@pytest.mark.parametrize("start", ["forked", "anew"])
def test_the_demo_ends_with_rows_and_a_picture(tmp_path, monkeypatch, start):
    output = tmp_path / "demo"
    short = ["train.epochs=3", "train.batch_size=16", "model.depth=1", "model.embed_dim=48", "optim.warmup_epochs=0"]
    short += ["optim.lr=3e-3"]
    settings = [word for setting in short for word in ("--set", setting)]
    words = ["--output", str(output), *settings]
    if start == "anew":
        command = [sys.executable, "-m", "tools.demo", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
    else:
        monkeypatch.setattr(demo, "subprocess", SimpleNamespace(run=warm.run))
        monkeypatch.setattr(sys, "argv", ["demo", *words])
        assert demo.main() == 0
    rows = json.loads((output / "rho.json").read_text())
    assert [(row["run"], row["rho"]) for row in rows] == [
        (run, rho) for run in ("pss", "dense") for rho in (1.0, 0.8, 0.6, 0.4, 0.2)
    ]
    assert [row["tokens"] for row in rows[:5]] == [37, 30, 22, 15, 7]
    assert {row["num_images"] for row in rows} == {1000}
    assert rows[0]["top1"] > 25  # three epochs on ten classes
    assert (output / "rho.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "pss" / "config.json").exists()
    assert (output / "dense" / "config.json").exists()


def test_the_digits_are_those_of_mnist(tmp_path):
    assert demo.save_digits(tmp_path / "images") == 5000
    for digit in range(10):
        files = sorted((tmp_path / "images" / str(digit)).iterdir())
        assert len(files) == 500
    with Image.open(files[0]) as image:
        assert (image.size, image.mode) == ((28, 28), "L")
        low, high = image.getextrema()
    assert low == 0  # paper
    assert high > 200  # ink


def test_without_its_digits_the_demo_says_where_they_are(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["demo", "--output", str(tmp_path / "demo")])
    with pytest.raises(SystemExit) as refused:
        demo.main()
    assert refused.value.code == 2
    assert "mlxtend, which is not installed; run make setup" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()
