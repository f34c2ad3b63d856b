"""`pss-eval RUN --predict`: files and folders, in three forms that say the same, and what cannot be read by name."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
from conftest import shared
from rich.cells import cell_len

import cli.eval
import pss
from cli.errors import run
from pss.api.prediction import Prediction, as_table

TINY = ["model.embed_dim=24", "model.depth=1", "train.batch_size=16", "train.num_workers=1", "optim.warmup_epochs=0"]


@pytest.fixture(scope="module")
def trained(image_root, tmp_path_factory):
    def make(folder):
        settings = [*TINY, "train.epochs=2"]
        pss.train("digits", image_root, folder / "run", settings=settings, loader="torch", quiet=True)

    with shared(tmp_path_factory, "for-predicting", make) as folder:
        yield folder / "run"


@pytest.fixture
def photos(image_root, tmp_path):
    """Four images in folders, and two files that a camera or a system left."""
    for number, file in enumerate(sorted((image_root / "val").rglob("*.jpg"))[::7]):
        target = tmp_path / "photos" / ("a" if number % 2 else "b/c") / f"{number}.JPG"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    (tmp_path / "photos" / "a" / "._1.JPG").write_bytes(b"left by an operating system")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def called(capsys, *arguments):
    """Exit code, what was printed, and what was said beside it."""
    with pytest.raises(SystemExit) as done:
        run(cli.eval.app, [str(argument) for argument in arguments])
    return done.value.code or 0, *capsys.readouterr()


def rows_of(form, printed):
    """(file, [(class, probability)]) of what was printed."""
    if form == "json":
        return [
            (row["file"], [(one["class"], one["probability"]) for one in row["classes"]]) for row in json.loads(printed)
        ]
    found: dict[str, list[tuple[str, float]]] = {}
    for row in csv.DictReader(io.StringIO(printed)):
        found.setdefault(row["file"], []).append((row["class"], float(row["probability"])))
    return list(found.items())


def test_all_forms_say_the_same_of_a_folder_and_all_below(trained, photos, capsys):
    expected = pss.predict(trained, photos, rho=0.5, top=2)
    assert [Path(one.file).relative_to(photos).as_posix() for one in expected] == [
        "a/1.JPG", "a/3.JPG", "b/c/0.JPG", "b/c/2.JPG",
    ]  # fmt: skip
    options = [trained, "--predict", photos, "--rho", "0.5", "--top", "2"]
    for form in ("json", "csv"):
        code, printed, said = called(capsys, *options, "--format", form)
        assert (code, said) == (0, "")
        found = rows_of(form, printed)
        assert [name for name, _ in found] == [one.file for one in expected]
        for (_, classes), one in zip(found, expected, strict=True):
            assert [name for name, _ in classes] == [name for name, _ in one.classes]
            assert [value for _, value in classes] == pytest.approx([value for _, value in one.classes], abs=1e-6)
    code, printed, said = called(capsys, *options)
    assert (code, said, printed) == (0, "", as_table(expected))


def test_files_are_taken_in_the_order_given_and_five_classes_or_all(trained, photos, capsys):
    files = [photos / "b/c/2.JPG", photos / "a/1.JPG"]
    code, printed, _ = called(capsys, trained, "--predict", files[0], "--predict", files[1], "--format", "json")
    assert code == 0
    assert [(row["file"], len(row["classes"])) for row in json.loads(printed)] == [(str(file), 3) for file in files]


@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_what_cannot_be_read_is_named_and_the_rest_is_told(trained, photos, capsys, form):
    broken = [photos / "a" / "2 cut.jpg", photos / "zero.png"]
    broken[0].write_bytes((photos / "a/1.JPG").read_bytes()[:300])
    broken[1].touch()
    code, printed, said = called(capsys, trained, "--predict", photos, "--format", form, "--top", "1")
    assert code == 2
    assert said.startswith(f"error: 2 of 6 images could not be read; {broken[0]}")
    assert said.count("\n") == 1
    for file in broken:
        assert str(file) in printed
    if form == "json":
        rows = json.loads(printed)
        assert [row["file"] for row in rows if "error" in row] == [str(file) for file in broken]
        assert sum("classes" in row for row in rows) == 4
    else:
        lines = printed.splitlines()
        assert len(lines) == 6 + (form == "csv")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rho", "1,0.5"], "one model at one --rho"),
        (["--data", "somewhere"], "--data does not go with --predict"),
        (["--rho", "1.5"], "--rho 1.5 is out of range"),
    ],
)
def test_what_does_not_go_together_is_refused(trained, photos, capsys, options, words):
    code, printed, said = called(capsys, trained, "--predict", photos, *options)
    assert (code, printed) == (2, "")
    assert words in said


def test_top_and_format_are_for_predictions(trained, capsys):
    assert "--top and --format are for --predict" in called(capsys, trained, "--top", "2")[2]


def test_columns_stand_below_each_other_in_any_script():
    found = [
        Prediction("a.jpg", (("猫", 0.5), ("dog", 0.25))),
        Prediction("写真.jpg", (("tabby cat", 0.875), ("dog", 0.125))),
        Prediction("bad.jpg", (), "bad.jpg is damaged; remove it"),
    ]
    lines = as_table(found).splitlines()
    assert len({cell_len(line[: line.index("dog")]) for line in lines[:2]}) == 1
    assert (
        len(
            {
                cell_len(line[: line.index(word)])
                for line, word in zip(lines, ("猫", "tabby", "bad.jpg is"), strict=True)
            }
        )
        == 1
    )
