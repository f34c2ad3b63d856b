"""The comparison of methods: trained in turns, continued, refused where it is another one, told as it was logged."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from comparisons import TINY, assert_refused_before_training

from pss.runs.log import read_rows
from tests import warm
from tools import compare_methods
from tools.comparing import comparison

ARMS = """
[short]
settings = ["method=sampled", "schedule.name=fixed", "schedule.rho=0.5"]

[tuned]
settings = ["method=dense", "model.weights={start}"]
start = "dense"
fine_tuning = 0.5
note = "half of the epochs anew"
"""


class Machine:
    """Forks pss-train, and can be told to fail at a turn."""

    def __init__(self):
        self.called, self.fails_at = [], None

    def run(self, command, *, stdin, stdout, stderr, check):
        if len(self.called) == self.fails_at:
            stdout.write("the machine goes down\n")
            return subprocess.CompletedProcess(command, 137)
        self.called.append(Path(command[command.index("--output") + 1]).name)
        done = warm.run(command, capture_output=True, timeout=120)
        stdout.write(done.stdout + done.stderr)
        return done


@pytest.fixture
def compare(image_root, tmp_path, monkeypatch):
    machine = Machine()
    monkeypatch.setattr(comparison.subprocess, "run", machine.run)
    monkeypatch.setattr(compare_methods, "environment", lambda device: {"device": "cpu", "threads": "1"})
    (tmp_path / "arms.toml").write_text(ARMS)

    def start(*words, arms=("dense", "short", "tuned"), epochs=2):
        options = ["--data", str(image_root), "--output", str(tmp_path / "out"), "--recipe", "digits"]
        options += ["--arms-file", str(tmp_path / "arms.toml"), "--arms", *arms, "--epochs", str(epochs)]
        options += ["--loader", "torch", "--batch-size", "8", "--turn", "4"]
        settings = [word for one in TINY for word in ("--set", one)]
        return compare_methods.main([*options, *settings, *words])

    return start, machine, tmp_path / "out"


@pytest.mark.exhaustive  # twenty seconds of processes
def test_a_comparison_goes_on_where_it_was_stopped_and_tells_what_was_logged(compare, capsys, monkeypatch):
    start, machine, out = compare
    monkeypatch.setattr(comparison, "epochs_for", lambda arm, pace, seconds: 3)  # of a second or so, all noise
    machine.fails_at = 2
    with pytest.raises(SystemExit) as stopped:
        start()
    assert stopped.value.code == 137
    assert "the machine goes down" in capsys.readouterr().err
    assert len(machine.called) == 2
    machine.fails_at = None
    result = start()
    assert len(machine.called) == len(set(machine.called))  # every run was trained once
    assert set(machine.called) == {
        "dense-2-s0", "short-2-s0", "dense-1-s0", "tuned-1+1-s0", "short-3-s0", "tuned-1+2-s0",
    }  # fmt: skip

    lines = {(line["column"], line["arm"]): line for line in result["lines"]}
    assert len(lines) == 6
    for column in ("epochs", "time"):
        for run in (run for run in result["runs"] if run["column"] == column):
            folder, line = out / "runs" / run["run"], lines[column, run["arm"]]
            rows = read_rows(folder, "epoch")
            assert len(rows) == run["epochs"]
            seconds = sum(row["train_seconds"] for row in rows)
            assert run["seconds"] == pytest.approx(seconds)
            assert line["seconds"].mean == pytest.approx(seconds + run["seconds_before"])
            # Validation takes the first point, and so does the table.
            assert line["points"][0]["top1"].mean == pytest.approx(rows[-1]["top1"], abs=1e-3)
    assert lines["time", "dense"]["time_of_dense"] == [1.0]
    tuned = next(run for run in result["runs"] if run["arm"] == "tuned")
    assert tuned["seconds_before"] == pytest.approx(
        sum(row["train_seconds"] for row in read_rows(out / "runs" / "dense-1-s0", "epoch"))
    )
    short = lines["epochs", "short"]
    assert short["arithmetic_of_dense"] < 1 == lines["epochs", "dense"]["arithmetic_of_dense"]

    told = (out / "comparison.md").read_text()
    for heading in ("## Equal epochs", "## Equal training time", "(published)", "## What these numbers do not show"):
        assert heading in told
    assert "53 training and 23 validation images of 3 classes, 16 pixels" in told
    assert "One seed: there is no spread" in told
    assert "tuned half of the epochs anew" in told
    kept = json.loads((out / "comparison.json").read_text())
    assert [run["run"] for run in kept["runs"]] == [run["run"] for run in result["runs"]]
    with (out / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(line["points"]) for line in result["lines"])
    assert float(rows[0]["top1"]) == pytest.approx(lines["epochs", "dense"]["points"][0]["top1"].mean)
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_other_settings_are_another_comparison(compare, capsys):
    start, machine, out = compare
    machine.fails_at = 0
    with pytest.raises(SystemExit):
        start(arms=("dense",))
    for words, told in [
        ({"epochs": 3}, "epochs (2, now 3); repeat them"),
        ({"arms": ("dense", "short")}, "arms (dense, now dense, short); repeat them"),
    ]:
        with pytest.raises(SystemExit) as refused:
            start(**({"arms": ("dense",)} | words))
        assert refused.value.code == 2
        assert f"holds a comparison with other settings: {told}" in capsys.readouterr().err
    (out / "plan.json").write_text("{")
    with pytest.raises(SystemExit):
        start(arms=("dense",))
    assert "plan.json is damaged" in capsys.readouterr().err
    shutil.rmtree(out)


def test_mistakes_are_told_before_anything_is_trained(compare, capsys):
    for words, options, told in [
        (("--seeds", "1", "1"), {}, "names one twice"),
        (("--set", "train.epoch=2"), {}, "train.epoch"),
        ((), {"arms": ("short",)}, "dense is what the others are compared with"),
        ((), {"epochs": 1}, "arms that fine-tune take at least 2"),
    ]:
        assert_refused_before_training(compare, capsys, told, *words, **options)


def test_a_plan_trains_nothing_and_a_budget_is_kept(compare, capsys):
    start, machine, out = compare
    assert start("--plan", "--seeds", "0", "1") is None
    told = capsys.readouterr().out
    assert "| tuned | 1 + 1 |" in told
    assert "2 seeds, about" in told
    with pytest.raises(SystemExit) as refused:
        start("--budget-minutes", "0.0001")
    assert refused.value.code == 2
    assert "more than --budget-minutes 0.0001" in capsys.readouterr().err
    assert not machine.called
    assert not out.exists()
