"""`pss.convert`, `pss.train` and `pss.evaluate` from a script: what they return, and that the commands are these."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest

import pss
from pss.api import prediction
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


@pytest.fixture(scope="module")
def on_photographs(image_root, tmp_path_factory):
    small = [*SHORT, "model.depth=1", "train.batch_size=16", "optim.warmup_epochs=0"]
    folder = tmp_path_factory.mktemp("photographs") / "run"
    return pss.train("digits", image_root, folder, settings=small, loader="torch", quiet=True).folder


@pytest.mark.parametrize("rho", [1.0, 0.5])
def test_files_are_taken_for_what_evaluation_takes_them_for(on_photographs, image_root, rho):
    found = pss.predict(on_photographs, image_root / "val", rho=rho, top=3, batch_size=5)
    (row,) = pss.evaluate(on_photographs, image_root, rho=[rho], loader="torch").rows
    right = sum(one.classes[0][0] == Path(one.file).parent.name for one in found)
    assert len(found) == row["num_images"]
    assert 100 * right / len(found) == pytest.approx(row["top1"], abs=1e-3)
    for one in found:
        assert sum(value for _, value in one.classes) == pytest.approx(1, abs=1e-5)  # there are three classes
        assert [value for _, value in one.classes] == sorted((value for _, value in one.classes), reverse=True)


def test_a_damaged_file_takes_no_other_with_it(on_photographs, image_root, tmp_path):
    whole = sorted((image_root / "val").rglob("*.jpg"))[:2]
    (tmp_path / "=bad.jpg").write_bytes(whole[0].read_bytes()[:200])
    found = pss.predict(on_photographs, [*whole, tmp_path], top=1)
    assert [bool(one.error) for one in found] == [False, False, True]
    assert found[:2] == pss.predict(on_photographs, whole, top=1)
    assert json.loads(prediction.as_json(found))[2]["error"] == found[2].error
    lines = list(csv.reader(io.StringIO(prediction.as_csv(found))))
    assert [line[2] for line in lines[1:3]] == [one.classes[0][0] for one in found[:2]]
    assert lines[3][4] == found[2].error
    assert prediction.as_table(found).splitlines()[2].endswith(found[2].error)


def test_what_is_no_image_is_refused(on_photographs, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there is no image in"):
        pss.predict(on_photographs, tmp_path / "empty")
    with pytest.raises(ValueError, match="is not there; name image files"):
        pss.predict(on_photographs, tmp_path / "nothing.jpg")


@pytest.mark.exhaustive
def test_the_page_on_recipes_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code.replace("train.epochs=5", "train.epochs=3"), {})
    assert "top-1 %" in capsys.readouterr().out
    assert (tmp_path / "runs" / "digits" / "rho.png").exists()
    (recipe,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    Path("mine.yaml").write_text(recipe, encoding="utf-8")
    assert configuration("mine.yaml").optim.lr == 1e-3


@pytest.mark.parametrize("as_text", [True, False])
def test_a_work_dir_is_a_text_or_a_path(tmp_path, monkeypatch, as_text):
    seen = []
    monkeypatch.setattr("pss.api.conversion.conversion.convert", lambda *told: seen.append(told[2].work_dir) or 1)
    pss.convert("digits", "s3://bucket/set", work_dir=str(tmp_path) if as_text else tmp_path)
    assert seen == [tmp_path]
