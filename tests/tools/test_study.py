"""The study: runs take turns, go on where they were, and are compared epoch by epoch."""

from __future__ import annotations

import json

import pytest

from tools import study

STEPS = 3  # 53 images in batches of 16


class Commands:
    """Stands in for the commands: an epoch of training takes as many seconds as `seconds` says."""

    def __init__(self, seconds):
        self.seconds, self.called = seconds, []

    def __call__(self, name, *words):
        output = words[words.index("--output") + 1]
        if name == "train":
            settings = dict(word.split("=") for word in words if "=" in word)
            arm = "dense" if settings.get("method") == "dense" else settings["schedule.name"]
            epochs = int(settings["train.max_steps"]) // STEPS
            self.called.append((output.rsplit("/", 1)[1], epochs))
            folder = study.Path(output)
            folder.mkdir(parents=True, exist_ok=True)
            rows = [
                {
                    "kind": "epoch",
                    "epoch": n,
                    "step": STEPS * n,
                    "train_seconds": self.seconds[arm] * n,
                    "by_rho": {"1": {"steps": STEPS}},
                }
                for n in range(1, epochs + 1)
            ]
            (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            rhos = [float(rho) for rho in words[words.index("--rho") + 1].split(",")]
            runs = [study.Path(word).name for word in words[: words.index("--data")]]
            rows = [{"run": run, "rho": rho, "top1": 10 * rho + int(run[-1])} for run in runs for rho in rhos]
            (study.Path(output) / "rho.json").write_text(json.dumps(rows))


@pytest.fixture
def run(image_root, tmp_path, monkeypatch):
    commands = Commands({"dense": 2.0, "cyclic": 1.0, "fixed": 1.5})
    monkeypatch.setattr(study, "command", commands)

    def start(*words):
        options = ["--data", str(image_root), "--output", str(tmp_path / "runs"), "--recipe", "digits"]
        settings = [w for setting in ("train.batch_size=16", "train.epochs=4") for w in ("--set", setting)]
        return study.main([*options, *settings, *words]), commands.called

    return start


def test_runs_take_turns_in_alternating_order(run):
    result, called = run("--turn", "2", "--rhos", "1", "0.5")
    first, second = "dense-magnitude-0", "cyclic-magnitude-0"
    assert called == [(second, 2), (first, 2), (first, 4), (second, 4)]
    assert result["images"] == 53
    dense, cyclic = result["lines"]
    assert dense["ratios"] == []
    assert cyclic["ratios"] == [0.5] * 2  # of four epochs; the first one of a turn is not counted
    assert cyclic["seconds"] == [10.0]
    assert cyclic["limit"] < dense["limit"] == 1
    assert "| cyclic | magnitude | 10.00 | 5.00 | 0.17 | 0.500 (0.500–0.500) |" in study.report(result)


def test_every_seed_and_sort_is_a_run_and_a_study_goes_on_where_it_stopped(run):
    words = ["--arms", "dense", "fixed", "--sorts", "magnitude", "random", "--seeds", "0", "1", "--turn", "4"]
    result, called = run(*words)
    names = [f"{arm}-{seed}" for seed in (0, 1) for arm in ("dense-magnitude", "fixed-magnitude", "fixed-random")]
    assert called == [(name, 4) for name in reversed(names)]
    lines = {(line["arm"], line["sort"]): line for line in result["lines"]}
    assert lines["fixed", "random"]["ratios"] == [0.75] * 6
    assert lines["fixed", "random"]["top1"][1.0] == [10.0, 11.0]
    assert "10.50 ± 0.71" in study.report(result)
    called.clear()
    again, called = run(*words)
    assert called == []
    assert again["lines"] == result["lines"]


def test_an_epoch_in_which_a_run_was_stopped_is_not_timed(tmp_path):
    steps = {1: 3, 2: 1, 3: 3, 4: 3}  # by the process that ended the epoch
    rows = [
        {"kind": "epoch", "step": 3 * n, "epoch": n, "train_seconds": float(n), "by_rho": {"1": {"steps": count}}}
        for n, count in steps.items()
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trial = study.Trial("dense", "magnitude", 0, study.Run(tmp_path, 4, ()))
    assert trial.timed(1, 3) == {1: 1.0, 3: 3.0, 4: 4.0}
    assert trial.timed(2, 3) == {4: 4.0}
