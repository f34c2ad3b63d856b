"""The study of schedules: what equal time and arithmetic are, and what is said of accuracy at every rho."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from comparisons import TINY, assert_refused_before_training
from hypothesis import given
from hypothesis import strategies as st

from tests import warm
from tools import study
from tools.comparing import arms as known_arms
from tools.comparing import comparison, evaluation, schedule_page
from tools.comparing.arms import Layout
from tools.comparing.schedule_page import share_reached
from tools.comparing.statistics import Mean

STEPS = 3  # 53 images in batches of 16
SECONDS = {"dense": 4.0, "half": 2.0, "stages": 1.0}
"""Of an epoch."""
ARMS = """
[half]
settings = ["method=sampled", "schedule.name=fixed", "schedule.rho=0.5"]

[stages]
settings = ["method=sampled", "schedule.name=stages", "schedule.rhos=0.4,1", "schedule.lengths=1,1"]
"""


class Machine:
    """Stands in for pss-train: an epoch takes as many seconds as `SECONDS` says, and gains a point of accuracy."""

    def __init__(self):
        self.called, self.fails_at = [], None

    def run(self, command, *, stdin, stdout, stderr, check):
        if len(self.called) == self.fails_at:
            return subprocess.CompletedProcess(command, 137)
        folder = Path(command[command.index("--output") + 1])
        settings = dict(word.split("=", 1) for word in command if "=" in word)
        epochs = int(settings["train.max_steps"]) // STEPS
        self.called.append((f"{folder.parent.name}/{folder.name}", epochs))
        arm = folder.name.split("-")[0]
        rows = [
            {"kind": "epoch", "step": STEPS * n, "epoch": n, "train_seconds": SECONDS[arm], "top1": 50.0 + n}
            for n in range(1, epochs + 1)
        ]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return subprocess.CompletedProcess(command, 0)


def accuracies(runs, options, points, folder):
    """A run has 50 % and a point for each epoch and for its seed at rho = 1; dense ones lose 20 at half, others 4."""
    lost = {run.name: 40 if run.name.startswith("dense") else 8 for run in runs}
    return {
        run.name: {rho: 50 + run.epochs + int(run.name[-1]) - lost[run.name] * (1 - rho) for rho in points}
        for run in runs
    }


@pytest.fixture
def start(image_root, tmp_path, monkeypatch):
    machine = Machine()
    monkeypatch.setattr(comparison.subprocess, "run", machine.run)
    monkeypatch.setattr(evaluation, "accuracies", accuracies)
    monkeypatch.setattr(study, "environment", lambda device: {"device": "cpu", "threads": "1"})
    (tmp_path / "arms.toml").write_text(ARMS)

    def begin(*words, arms=("dense", "half", "stages"), epochs=4):
        options = ["--data", str(image_root), "--output", str(tmp_path / "out"), "--recipe", "digits", "--turn", "9"]
        options += ["--arms-file", str(tmp_path / "arms.toml"), "--arms", *arms, "--epochs", str(epochs)]
        settings = [word for one in TINY for word in ("--set", one)]
        return study.main([*options, "--loader", "torch", *settings, *words])

    return begin, machine, tmp_path / "out"


def test_every_arm_gets_the_time_of_the_dense_run_and_a_study_goes_on_where_it_stopped(start, capsys):
    begin, machine, out = start
    words = ["--seeds", "0", "1", "--equal", "time", "time:0.5", "--rhos", "1", "0.5"]
    machine.fails_at = 8  # the pilots are two turns each, as their turns are one epoch
    with pytest.raises(SystemExit) as stopped:
        begin(*words)
    assert stopped.value.code == 137
    pilots = [name for name, _ in machine.called if name.startswith("pilots/")]
    assert sorted(set(pilots)) == ["pilots/dense-2-s0", "pilots/half-2-s0", "pilots/stages-2-s0"]
    machine.fails_at = None
    result = begin(*words)
    assert len(machine.called) == len(set(machine.called))
    epochs = {(line["column"], line["arm"]): line["epochs"] for line in result["lines"]}
    assert epochs == {
        ("time", "dense"): [4, 4], ("time", "half"): [8, 8], ("time", "stages"): [16, 16],
        ("time-0.5", "dense"): [2, 2], ("time-0.5", "half"): [4, 4], ("time-0.5", "stages"): [8, 8],
    }  # fmt: skip
    lines = {(line["column"], line["arm"]): line for line in result["lines"]}
    half = lines["time-0.5", "half"]
    assert half["time_of_dense"] == [0.5, 0.5]
    assert half["difference"][1.0].mean == 4 - 2  # against the dense run of that time
    assert half["difference_to_whole"][1.0].mean == 0
    assert half["difference"][0.5].mean == 4 - 2 + 16
    assert half["difference"][0.5].half_width == 0
    curve = next(run["curve"] for run in result["runs"] if (run["column"], run["arm"]) == ("time-0.5", "half"))
    assert curve == [(2.0, 51.0), (4.0, 52.0), (6.0, 53.0), (8.0, 54.0)]
    told = (out / "study.md").read_text()
    assert "## Equal training time, 0.5 of the dense run's" in told
    assert "| half | 4 | 8.0 ± 0.0 s | 0.50 ± 0.00 |" in told
    assert "| dense | about 1.00 | about 1.00 |" in told
    assert "| half | at most 0.50 | at most 0.50 |" in told
    assert "python -m tools.study --data" in told
    rows = list(csv.DictReader(io.StringIO((out / "study.csv").read_text())))
    assert len(rows) == 2 * len(result["lines"])
    assert {float(row["difference"]) for row in rows if row["arm"] == "dense"} == {0.0}
    assert (out / "study.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "study.json").read_text())["lines"][0]["arm"] == "dense"
    machine.called.clear()
    assert begin(*words)["lines"] == result["lines"]
    assert machine.called == []


def test_equal_arithmetic_is_counted_and_needs_no_pilots(start):
    begin, machine, _ = start
    result = begin("--equal", "arithmetic", "epochs", epochs=10)
    assert all(name.startswith("runs/") for name, _ in machine.called)
    lines = {(line["column"], line["arm"]): line for line in result["lines"]}
    for arm in ("dense", "half", "stages"):
        line = lines["arithmetic", arm]
        per_epoch = line["arithmetic_of_dense"] * 10 / line["epochs"][0]
        assert abs(line["arithmetic_of_dense"] - 1) * 10 <= per_epoch / 2 + 1e-9  # as near as whole epochs allow
        assert lines["epochs", arm]["epochs"] == [10]
    assert lines["epochs", "half"]["arithmetic_of_dense"] < 0.75


@pytest.mark.parametrize("columns", [("epochs", "time"), ("time", "epochs")])
def test_paces_come_from_equal_epochs_where_there_are_any(start, columns):
    begin, machine, _ = start
    result = begin("--equal", *columns, arms=("dense", "half"))
    assert not [name for name, _ in machine.called if name.startswith("pilots/")]
    assert sorted(line["epochs"] for line in result["lines"]) == [[4], [4], [4], [8]]


@pytest.mark.parametrize(
    ("words", "arms", "told"),
    [
        (["--equal", "time:0.5"], ("dense",), "--equal names shares only; add time"),
        (["--equal", "hours"], ("dense",), "--equal is 'hours'; write epochs, time or arithmetic"),
        (["--equal", "time:2"], ("dense",), "--equal is 'time:2'"),
        (["--equal", "epochs:0.5"], ("dense",), "--equal is 'epochs:0.5'"),
        (["--rhos", "0"], ("dense",), "--rhos are shares of patches"),
        (["--seeds", "1", "1"], ("dense",), "--seeds names one twice"),
        (["--epochs", "0"], ("dense",), "--epochs is 0"),
        ([], ("half",), "dense is what the others are compared with"),
        ([], ("dense", "gone"), "there is no arm gone"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(start, capsys, words, arms, told):
    assert_refused_before_training(start, capsys, told, *words, arms=arms)


def test_arms_without_a_rho_belong_to_the_other_tool(start, tmp_path, capsys):
    begin, _, _ = start
    (tmp_path / "arms.toml").write_text(
        '[svite]\nsettings = ["method=svite"]\n'
        '[tuned]\nsettings = ["model.weights={start}"]\nstart = "dense"\nfine_tuning = 0.5\n'
        '[avit]\nsettings = ["method=avit", "model.weights={start}"]\nstart = "dense"\nfine_tuning = 0.5\n'
    )
    for arm in ("tuned", "avit"):
        with pytest.raises(SystemExit):
            begin(arms=("dense", arm))
        assert f"arm {arm} fine-tunes; compare it with python -m tools.compare_methods" in capsys.readouterr().err


@given(st.lists(st.tuples(st.floats(0.1, 1), st.floats(-10, 10)), max_size=5, unique_by=lambda point: point[0]))
def test_the_share_lies_where_an_arm_catches_up(points):
    found = share_reached(points)
    ordered = sorted(points)
    if found is None:
        assert all(behind < 0 for _, behind in ordered)
        return
    told, share = found
    first = next(place for place, (_, ahead) in enumerate(ordered) if ahead >= 0)
    if told == "at most":
        assert (first, share) == (0, ordered[0][0])
    else:
        (before, _), (after, _) = ordered[first - 1], ordered[first]
        assert before <= share <= after


def test_a_share_is_found_on_the_straight_line():
    assert share_reached([(1.0, 2.0), (0.5, -2.0)]) == ("about", 0.75)
    assert share_reached([(0.5, 1.0), (1.0, 2.0)]) == ("at most", 0.5)
    assert share_reached([(0.5, -3.0), (1.0, -1.0)]) is None
    assert share_reached([]) is None


def test_the_arms_that_are_there_are_runs_of_both_small_recipes(tmp_path):
    known = known_arms.read(study.ARMS)
    for recipe, images in (("digits", 1438), ("cifar10", 50_000)):
        layout = Layout(recipe, (), 20, tmp_path, known, images)
        for arm in known.values():
            config = layout.config(layout.run(arm, 0, 20))
            assert config.train.epochs == 20
            assert arm.note
    stages = {name for name in known if name.startswith("stages")}
    assert {"stages-40-30", "stages-climb", "stages-random"} <= stages


def test_kept_accuracies_are_read_and_damage_is_told(tmp_path, monkeypatch):
    run = comparison.Run(tmp_path / "runs" / "dense-2-s0", 2, ())
    options = evaluation.Options(tmp_path, "torch", 8, device="cpu")
    folder = tmp_path / "accuracy"
    folder.mkdir()
    (folder / "dense-2-s0.json").write_text('{"1": 81.5, "0.4": 60.25}')
    asked = []

    def top1(opened, points, options, world):
        asked.append(points)
        return dict.fromkeys(points, 12.5)

    monkeypatch.setattr(evaluation, "open_run", lambda *words, **options: None)
    monkeypatch.setattr(evaluation, "_top1", top1)
    found = evaluation.accuracies([run], options, [1.0, 0.4], folder)
    assert found == {"dense-2-s0": {1.0: 81.5, 0.4: 60.25}}
    assert not asked
    assert evaluation.accuracies([run], options, [1.0, 0.2], folder)["dense-2-s0"] == {1.0: 81.5, 0.2: 12.5}
    assert asked == [[0.2]]
    assert evaluation.accuracies([run], options, [0.2], folder)["dense-2-s0"] == {0.2: 12.5}
    (folder / "dense-2-s0.json").write_text("[1]")
    with pytest.raises(ValueError, match="is damaged; remove it"):
        evaluation.accuracies([run], options, [1.0], folder)


def test_what_is_not_shown_is_told():
    arm = {"note": ""}
    line = {"column": "time", "difference": {}, "top1": {}, "seconds": Mean.of([1.0])}
    result = {
        "plan": {"arms": {"dense": arm, "late": arm, "left": arm}, "seeds": [0, 1], "epochs": 4, "reference": "dense"},
        "columns": {"time": "equal training time"}, "rhos": [1.0], "num_images": 53, "num_val_images": 23,
        "num_classes": 3, "img_size": 16, "environment": {"device": "cpu", "threads": "1"},
        "lines": [
            line | {"arm": "dense", "time_of_dense": [1.0, 1.0]}, line | {"arm": "late", "time_of_dense": [1.2, 1.0]},
        ],
    }  # fmt: skip
    told = "\n".join(schedule_page.limits(result))
    assert "left cannot be trained in that time" in told
    assert "(equal training time): late +10%." in told
    assert "2 are made, of which one in twenty" in told
    assert "no difference here can be told from chance" in "\n".join(
        schedule_page.limits(result | {"plan": result["plan"] | {"seeds": [0]}})
    )


@pytest.mark.exhaustive  # half a minute of processes
def test_a_study_trains_and_evaluates(image_root, tmp_path, monkeypatch):
    def run(command, *, stdin, stdout, stderr, check):
        done = warm.run(command, capture_output=True, timeout=240)
        stdout.write(done.stdout + done.stderr)
        return done

    monkeypatch.setattr(comparison.subprocess, "run", run)
    monkeypatch.setattr(study, "environment", lambda device: {"device": "cpu", "threads": "1"})
    settings = [word for one in TINY for word in ("--set", one)]
    out = tmp_path / "out"
    words = ["--data", str(image_root), "--output", str(out), "--recipe", "digits", "--loader", "torch", "--turn", "4"]
    words += ["--arms", "dense", "stages-40-30", "--epochs", "2", "--equal", "arithmetic", "--rhos", "1", "0.4"]
    monkeypatch.setattr(sys, "argv", ["study", *words, *settings])
    result = study.main()
    for one in result["runs"]:
        assert one["top1"][1.0] == pytest.approx(one["curve"][-1][1], abs=1e-3)
        assert len(one["curve"]) == one["epochs"]
        assert json.loads((out / "accuracy" / f"{one['run']}.json").read_text()).keys() == {"1", "0.4"}
    assert result["lines"][1]["epochs"] == [3]
    assert (out / "study.md").exists()
