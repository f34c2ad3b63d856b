"""A run on data without a validation split: it trains as any other, says what it lacks, and no command stumbles."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import warm
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cli.doctor
import cli.eval
import cli.train
import pss
from cli.errors import run
from pss.api.training import Trained
from pss.inference.plots import plot_training
from pss.runs import checkpoint
from pss.runs.log import read_rows

ROOT = Path(__file__).parents[2]
TINY = ["model.embed_dim=24", "model.depth=1", "train.batch_size=16", "train.num_workers=1", "optim.warmup_epochs=0"]
SETTINGS = [*TINY, "train.epochs=2", "train.ema_decay=0.9", "train.log_every_steps=1"]


def words(*extra):
    return [word for setting in (*SETTINGS, *extra) for word in ("--set", setting)]


def call(app, *arguments):
    with pytest.raises(SystemExit) as done:
        run(app, [str(argument) for argument in arguments])
    return done.value.code or 0


def trained_in_a_process(data, output, *extra):
    arguments = [sys.executable, "-m", "cli.train", "digits", "--data", data, "--output", output, "--resume"]
    done = warm.run(
        [str(word) for word in (*arguments, "--loader", "torch", *words(*extra))],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def train_only(image_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("train-only") / "images"
    shutil.copytree(image_root / "train", folder / "train")
    return folder


@pytest.fixture(scope="module")
def outcome(train_only, tmp_path_factory):
    """A run, and what it said."""
    output = tmp_path_factory.mktemp("run") / "run"
    return output, trained_in_a_process(train_only, output)


def weights(folder):
    state, path = checkpoint.load_latest(folder / "checkpoints")
    return state, path


def test_it_says_what_is_lost_and_keeps_the_newest(outcome, train_only):
    output, said = outcome
    assert f"{train_only} has no validation split: no accuracy will be measured" in said
    assert "epoch 2/2  loss " in said
    assert "top-1" not in said
    assert said.splitlines()[-1].endswith(f"next: pss-eval {output} --data a data set with a validation split")
    assert not (output / "checkpoints" / "best.json").exists()
    state, _ = weights(output)
    assert state["step"] == 6
    summary = Trained(output).summary
    assert (summary["finished"], summary["best"]) == (True, None)
    rows = read_rows(output, "epoch")
    assert [row["epoch"] for row in rows] == [1, 2]
    assert not {"top1", "val_loss"} & {name for row in rows for name in row}


def test_its_pictures_show_the_loss(outcome, tmp_path):
    output, _ = outcome
    with Image.open(output / "curves.png") as curves:
        assert curves.format == "PNG"
        without = curves.width
    validated = [{"epoch": 1, "loss": 2.0, "val_loss": 2.0, "top1": 10.0, "train_seconds": 1.0}]
    (tmp_path / "with.png").write_bytes(plot_training(validated))
    with Image.open(tmp_path / "with.png") as other:
        assert other.width > without  # a panel more
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert "epoch/loss" in tags
    assert not [tag for tag in tags if "top1" in tag or "val_loss" in tag]


def test_validation_changes_nothing_of_the_training_and_neither_does_a_pause(outcome, train_only, image_root, tmp_path):
    trained_in_a_process(train_only, tmp_path / "resumed", "train.max_steps=3")
    trained_in_a_process(train_only, tmp_path / "resumed")
    trained_in_a_process(image_root, tmp_path / "validated")
    expected, _ = weights(outcome[0])
    for name in ("resumed", "validated"):
        found, _ = weights(tmp_path / name)
        for part in ("method", "ema"):
            for key, value in expected[part].items():
                assert torch.equal(value, found[part][key]), (name, key)
    assert checkpoint.read_best(tmp_path / "validated" / "checkpoints") is not None


def test_a_run_goes_on_without_the_split_that_it_was_validated_on(train_only, image_root, tmp_path):
    trained_in_a_process(image_root, tmp_path / "run", "train.max_steps=3")
    said = trained_in_a_process(train_only, tmp_path / "run")
    assert "no validation split" in said
    assert checkpoint.read_best(tmp_path / "run" / "checkpoints")["step"] == 3
    assert ["top1" in row for row in read_rows(tmp_path / "run", "epoch")] == [True, False]


def test_plan_and_doctor_need_none(train_only, capsys, monkeypatch):
    monkeypatch.setattr(cli.doctor, "_SECONDS", 0.05)
    assert call(cli.train.app, "digits", "--data", train_only, "--plan", *words()) == 0
    assert "53 images" in capsys.readouterr().out
    assert call(cli.train.app, "digits", "--data", train_only, "--doctor", "--loader", "torch", *words()) == 0
    assert "bound by" in capsys.readouterr().out


def test_it_is_evaluated_on_other_data(outcome, train_only, image_root, tmp_path, capsys):
    output, _ = outcome
    options = ["--rho", "1", "--loader", "torch", "--output", tmp_path]
    assert call(cli.eval.app, output, "--data", train_only, *options) == 2
    assert capsys.readouterr().err.endswith(
        "has no val split; name another data set with --data, or add --split train\n"
    )
    assert call(cli.eval.app, output, "--data", train_only, "--split", "train", *options) == 0
    assert call(cli.eval.app, output, "--data", image_root, *options) == 0
    (row,) = json.loads((tmp_path / "rho.json").read_text())
    assert (row["step"], row["num_images"]) == (6, 23)
    capsys.readouterr()
    assert call(cli.eval.app, output, "--data", image_root, *options, "--best") == 2
    assert "holds no validated checkpoint; leave out --best" in capsys.readouterr().err
    start = words(f"model.weights={output}#best")
    assert call(cli.train.app, "digits", "--data", image_root, "--output", tmp_path / "x", *start) == 2
    assert "holds no validated checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_function_trains_on_a_converted_set_without_one(train_only, tmp_path):
    pss.convert(str(train_only), tmp_path / "set", jobs=1, say=lambda line: None)
    said = []
    found = pss.train(
        "digits", tmp_path / "set", tmp_path / "run", settings=[*SETTINGS, "train.epochs=1"], loader="torch",
        quiet=True, say=said.append,
    )  # fmt: skip
    assert found.summary["finished"]
    assert any("no validation split" in line for line in said)
    assert found.figure().startswith(b"\x89PNG")


@pytest.mark.parametrize("option", [["--plan"], ["--doctor"], ["--output", "run"]])
def test_data_without_training_images_is_refused(image_root, tmp_path, capsys, option, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(image_root / "val", tmp_path / "images" / "val")
    assert call(cli.train.app, "digits", "--data", tmp_path / "images", *option, *words()) == 2
    told = capsys.readouterr().err
    assert "has no train split" in told
    assert told.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]
