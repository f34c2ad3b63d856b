"""The search for a schedule: who goes on, that it can be stopped, and that it reports on seeds that it did not see."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from comparisons import TINY, assert_refused_before_training
from hypothesis import given
from hypothesis import strategies as st

from tools import search_schedule, study
from tools.comparing import comparison, evaluation

STEPS = 3  # 53 images in batches of 16
WORTH = {"dense": 0, "stages-20-30": 1, "stages-40-15": 5, "stages-40-30": 4, "linear": 3, "fixed": 2}
NAMES = tuple(WORTH)


class Machine:
    """Stands in for pss-train: an epoch takes a second."""

    def __init__(self):
        self.called, self.fails_at = [], None

    def run(self, command, *, stdin, stdout, stderr, check):
        if len(self.called) == self.fails_at:
            return subprocess.CompletedProcess(command, 130)
        folder = Path(command[command.index("--output") + 1])
        epochs = int(next(word for word in command if word.startswith("train.max_steps=")).split("=")[1]) // STEPS
        self.called.append((folder, epochs))
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {"kind": "epoch", "step": STEPS * n, "epoch": n, "train_seconds": 1.0, "top1": 50.0}
            for n in range(1, epochs + 1)
        ]
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return subprocess.CompletedProcess(command, 0)


def accuracies(runs, options, points, folder):
    """stages-40-15 is lucky on the seeds of the search; on others stages-40-30 would be ahead."""
    found = {}
    for run in runs:
        name, _, seed = run.name.rsplit("-", 2)
        lucky = -3 if name == "stages-40-15" and int(seed[1:]) > 1 else 0
        found[run.name] = dict.fromkeys(points, 50 + WORTH[name] + lucky + int(seed[1:]) / 10)
    return found


@pytest.fixture
def start(image_root, tmp_path, monkeypatch):
    machine = Machine()
    monkeypatch.setattr(comparison.subprocess, "run", machine.run)
    monkeypatch.setattr(evaluation, "accuracies", accuracies)
    monkeypatch.setattr(study, "environment", lambda device: {"device": "cpu", "threads": "1"})

    def begin(*words, arms=NAMES):
        options = ["--data", str(image_root), "--output", str(tmp_path / "out"), "--recipe", "digits", "--turn", "99"]
        options += ["--arms", *arms, "--epochs", "8", "--loader", "torch"]
        settings = [word for one in TINY for word in ("--set", one)]
        seeds = [] if "--held-out" in words else ["--seeds", "0", "1", "--held-out", "2", "3", "4"]
        return search_schedule.main([*options, *settings, *seeds, *words])

    return begin, machine, tmp_path / "out"


def test_the_best_go_on_and_the_winner_is_reported_on_other_seeds(start):
    begin, machine, out = start
    machine.fails_at = 20
    with pytest.raises(SystemExit) as stopped:
        begin("--keep", "0.4")
    assert stopped.value.code == 130
    machine.fails_at = None
    result = begin("--keep", "0.4")
    first, second, last = result["rungs"]
    assert list(first["scores"]) == ["stages-40-15", "stages-40-30", "linear", "fixed", "stages-20-30", "dense"]
    assert first["kept"] == ["stages-40-15", "stages-40-30"]
    assert list(second["scores"]) == ["stages-40-15", "stages-40-30", "dense"]
    assert list(last["scores"]) == ["stages-40-15", "dense"]
    assert (first["share"], second["share"], last["share"]) == (0.25, 0.5, 1.0)
    assert result["winner"] == "stages-40-15"
    trained = [folder.relative_to(out).as_posix() for folder, _ in machine.called]
    whole = [name for name in trained if "pilots/" not in name]  # pilots take turns of an epoch
    assert len(whole) == len(set(whole))
    # Only the winner and dense training see the held-out seeds, and the search sees none of them.
    assert {name.rpartition("-s")[2] for name in trained if name.startswith("runs/")} == {"0", "1"}
    late = {name.split("/")[-1].rsplit("-", 2)[0] for name in trained if name.startswith("held-out/runs/")}
    assert late == {"dense", "stages-40-15"}
    report = {(line["column"], line["arm"]): line for line in result["report"]["lines"]}
    assert report["time", "stages-40-15"]["difference"][1.0].mean == pytest.approx(2)  # and not the lucky 5
    assert report["time", "stages-40-15"]["top1"][1.0].count == 3
    told = (out / "search.md").read_text()
    assert "| stages-40-15 | 2 | 55.05 ± 0.07 | yes |" in told
    assert "The winner is `stages-40-15`" in told
    assert (out / "held-out" / "study.md").exists()
    assert json.loads((out / "search.json").read_text())["winner"] == "stages-40-15"


@given(st.integers(2, 100), st.floats(0.01, 0.99))
def test_some_go_on_and_some_do_not(count, keep):
    assert 1 <= search_schedule.survivors(count, keep) < count
    assert search_schedule.survivors(1, keep) == 1


@pytest.mark.parametrize(
    ("words", "arms", "told"),
    [
        (["--keep", "1"], NAMES, "--keep is 1; it is a share of the candidates"),
        (["--seeds", "0", "1", "--held-out", "1", "2"], NAMES, "--held-out are seeds that --seeds does not name"),
        (["--seeds", "0", "--held-out", "2", "2"], NAMES, "--held-out are seeds that --seeds does not name"),
        (["--rhos", "2"], NAMES, "--rhos are shares of patches"),
        ([], ("dense", "linear"), "--arms leaves 1 beside dense"),
        ([], ("linear", "fixed"), "dense is what the others are compared with"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(start, capsys, words, arms, told):
    assert_refused_before_training(start, capsys, told, *words, arms=arms)


def test_a_plan_trains_nothing(start, capsys):
    begin, machine, out = start
    assert begin("--plan") is None
    told = capsys.readouterr().out
    assert "5 at 0.25 of the dense run's time, 2 at 0.5 of the dense run's time, 1 at 1 of the dense run's" in told
    assert "the winner with 3 others: about" in told
    assert not machine.called
    assert not out.exists()
