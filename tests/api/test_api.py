"""`pss.convert`, `pss.train` and `pss.evaluate` from a script: what they return, and that the commands are these."""

from __future__ import annotations

import json

import pytest

import pss
from pss.api.training import configuration

SHORT = ["train.epochs=2", "optim.warmup_epochs=0.5", "train.batch_size=64", "model.depth=2", "train.num_workers=1"]
PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    said = []
    made = pss.convert("digits", tmp_path_factory.mktemp("api") / "digits", jobs=1, say=said.append)
    assert made.manifest.splits["train"].num_samples == 1438
    assert made.table().splitlines()[0] == "class\ttrain\tval"
    assert made.table().splitlines()[1].startswith("0\t")
    return made.folder


@pytest.fixture(scope="module")
def trained(data):
    said = []
    run = pss.train("digits", data, data.parent / "run", settings=SHORT, loader="torch", quiet=True, say=said.append)
    assert said[0].startswith("digits: starting, sampled")
    return run


def test_a_run_is_what_lies_in_its_folder(trained, data, capfd):
    assert [row["epoch"] for row in trained.rows()] == [1, 2]
    assert trained.summary["finished"]
    assert trained.config == configuration("digits", SHORT)
    assert trained.figure().startswith(PNG)
    assert (trained.folder / "curves.png").read_bytes().startswith(PNG)


def test_quiet_is_quiet(data, tmp_path, capfd):
    pss.train("digits", data, tmp_path / "run", settings=[*SHORT, "train.max_steps=2"], loader="torch", quiet=True)
    assert capfd.readouterr() == ("", "")


def test_what_is_found_has_a_table_and_a_picture(trained, data, tmp_path):
    found = pss.evaluate(trained.folder, data, rho=[1.0, 0.5], batch_size=16, loader="torch")
    assert [row["rho"] for row in found.rows] == [1.0, 0.5]
    assert "top-1 %" in found.table()
    assert found.figure().startswith(PNG)
    written = {path.name for path in found.write(tmp_path / "out")}
    assert written >= {"rho.json", "rho.csv", "rho.png"}
    assert [row["top1"] for row in json.loads((tmp_path / "out" / "rho.json").read_text())] == [
        row["top1"] for row in found.rows
    ]


def test_a_run_begins_with_the_weights_of_another_and_its_settings(trained, data, tmp_path):
    said = []
    more = pss.train(
        None, data, tmp_path / "more", start=trained.folder, settings=["train.epochs=3", "optim.lr=1e-4"],
        loader="torch", quiet=True, say=said.append,
    )  # fmt: skip
    assert more.config.train.epochs == 3
    assert more.config.model.depth == 2
    assert any(line.startswith(f"weights of {trained.folder}: loaded") for line in said)
    first, last = more.rows()[0]["val_loss"], trained.rows()[-1]["val_loss"]
    assert first < trained.rows()[0]["val_loss"]
    assert first < 1.2 * last


def test_what_cannot_be_is_refused(trained, data, tmp_path):
    with pytest.raises(ValueError, match="no recipe is named"):
        pss.train(None, data, tmp_path / "run")
    with pytest.raises(ValueError, match=r"train.epochs \(2, 5\).*--from .*begins a new run with its weights"):
        pss.train("digits", data, trained.folder, settings=[*SHORT, "train.epochs=5"], resume=True, quiet=True)
    with pytest.raises(ValueError, match="there is no option 'jpeg_quality'"):
        pss.convert("digits", tmp_path / "x", jpeg_quality=3)
    with pytest.raises(ValueError, match="profile is 'huge'"):
        pss.convert("digits", tmp_path / "x", profile="huge")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        configuration("digits", start=tmp_path / "empty")
