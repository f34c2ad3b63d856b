"""What pss-eval writes: it is known beforehand whether it can be, the result is shown first, and each file is whole."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest
import torch
import warm
from conftest import write_folder
from test_cli import call, mistake, train

import cli.eval
from pss.inference import choose, sweep

PAGE = os.sysconf("SC_PAGE_SIZE")
WRITTEN = ("rho.json", "rho.csv", "rho.png", "report.html")
PUSHED = ("config.json", "model.safetensors", "README.md", "rho.png")


@pytest.fixture(scope="module")
def run_folder(image_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs") / "run[b]"
    assert train(image_root, folder, "train.epochs=1", "model.depth=1") in (0, None)
    return folder


@pytest.fixture
def measured_once(monkeypatch):
    """What is found is measured by the first evaluation of a test, and the same for the others."""
    original, known = sweep.sweep, []

    def once(*arguments, **options):
        if not known:
            known.append(original(*arguments, **options))
        return known[0]

    monkeypatch.setattr(sweep, "sweep", once)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} if folder.is_dir() else {}


def pages(content):
    return -(-len(content) // PAGE)


def test_a_full_disk_at_every_write(run_folder, image_root, small_disk, measured_once, capsys, tmp_path):
    pytest.importorskip("plotly")
    disk = small_disk(16 << 20)
    words = ["--data", image_root, "--rho", "1,0.5", "--loader", "torch", "--output"]
    assert call(cli.eval.app, run_folder, *words, tmp_path / "out", "--push", tmp_path / "hub") in (0, None)
    table = capsys.readouterr().out
    assert "run[b]" in table
    whole, pushed = contents(tmp_path / "out"), contents(tmp_path / "hub")
    assert (set(whole), set(pushed)) == (set(WRITTEN), set(PUSHED))
    in_order = [*(whole[name] for name in WRITTEN), b"".join(pushed.values())]
    for number, (name, content) in enumerate(zip((*WRITTEN, "hub"), in_order, strict=True)):
        output, hub = disk.path / f"{number}", disk.path / f"{number}-hub"
        disk.leave((sum(map(pages, in_order[:number])) + pages(content) - 1) * PAGE)
        assert call(cli.eval.app, run_folder, *words, output, "--push", hub) == 2
        told = capsys.readouterr()
        assert told.out == table
        (sentence,) = [line for line in told.err.splitlines() if line.startswith("error: ")]
        assert sentence.endswith("could not be written: no space left on that disk; make room and run it again, "
                                 "or write to another disk")  # fmt: skip
        assert str(hub if name == "hub" else output / name) in sentence
        left = contents(output)
        assert name not in left
        assert left.items() <= whole.items()
        sizes = [{name: len(content) for name, content in one.items()} for one in (contents(hub), pushed)]
        assert sizes[0] in ({}, sizes[1])  # safetensors writes its metadata in any order
        assert hub.exists() == bool(contents(hub))
        assert not [one for one in disk.files() if "partial" in one]


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.exhaustive)])
def test_a_full_disk_in_an_export(run_folder, small_disk, tmp_path, suffix):
    """In a process of its own, as torch's writer of a .pt2 file would end it."""
    disk = small_disk(1 << 20)
    disk.leave(5 * PAGE)
    words = [run_folder, "--budget-ms", "10000", "--rho", "0.5", "--export", disk.path / "new" / f"model{suffix}"]
    done = warm.run(
        [sys.executable, "-m", "cli.eval", *map(str, words)],
        capture_output=True,
        timeout=200,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(warm.ROOT)},
    )
    assert done.returncode == 2, done.stderr
    assert "ρ 0.5 (8 of 17 tokens)" in done.stdout
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"model{suffix}: no space left on that disk; " in sentence
    assert disk.files() == []


def test_what_cannot_be_written_is_known_before_anything_is_measured(
    capsys, run_folder, image_root, small_disk, tmp_path, monkeypatch
):
    monkeypatch.setattr(sweep, "sweep", lambda *_, **__: pytest.fail("it was measured"))
    sealed = small_disk(1 << 20)
    sealed.seal()
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "clash" / "rho.csv").mkdir(parents=True)
    (tmp_path / "notes" / "hub").mkdir(parents=True)
    (tmp_path / "notes" / "README.md").write_text("mine")
    data = ("--data", image_root, "--loader", "torch")
    for options, words in [
        (["--output", tmp_path / "file"], "cannot be written into: a file is in the way; name another folder"),
        (["--output", tmp_path / "file" / "x"], "a file is in the way"),
        (["--output", tmp_path / ("n" * 300)], "the name is too long"),
        (["--output", sealed.path / "x"], "read-only file system"),
        (["--output", tmp_path / "clash"], "rho.csv in it is a folder"),
        (["--push", tmp_path / "file"], "a file is in the way"),
        (["--push", sealed.path / "x"], "read-only file system"),
        (["--push", run_folder], "and was not made by --push"),
        (["--push", tmp_path / "notes"], "holds README.md"),
        (["--export", tmp_path / "folder.pt2", "--rho", "1"], "it is a folder; name another file"),
        (["--export", tmp_path / "file" / "model.pt2", "--rho", "1"], "a file is in the way"),
        (["--export", sealed.path / "model.onnx", "--max-drop", "1"], "read-only file system"),
    ]:  # fmt: skip
        sentence = mistake(capsys, cli.eval.app, run_folder, *data, *options)
        assert words in sentence
        assert str(options[0]) in sentence
        assert "Errno" not in sentence
    monkeypatch.setattr(sweep, "default_output", lambda _: sealed.path)
    assert "read-only file system; name one with --output" in mistake(capsys, cli.eval.app, run_folder, *data)


def test_a_model_is_pushed_again_and_beside_what_git_keeps(run_folder, image_root, tmp_path, measured_once):
    words = ["--data", image_root, "--rho", "1", "--loader", "torch", "--output", tmp_path / "out", "--push"]
    (tmp_path / "hub" / ".git").mkdir(parents=True)
    for _ in range(2):
        assert call(cli.eval.app, run_folder, *words, tmp_path / "hub") in (0, None)
    assert set(contents(tmp_path / "hub")) == set(PUSHED)


def test_a_picture_that_fails_takes_nothing_along(run_folder, image_root, tmp_path, measured_once, monkeypatch, capsys):
    def broken(rows):
        raise RuntimeError("no\nfont")

    monkeypatch.setitem(sweep.FILES, "rho.png", broken)
    words = ["--data", image_root, "--rho", "1", "--loader", "torch", "--output", tmp_path / "out"]
    assert call(cli.eval.app, run_folder, *words) == 1
    told = capsys.readouterr()
    assert "run[b]" in told.out
    assert f"error: {tmp_path / 'out' / 'rho.png'} could not be written: no font; " in told.err
    assert {"rho.json", "rho.csv"} <= set(contents(tmp_path / "out"))


def test_a_table_that_nobody_can_read_is_written(run_folder, image_root, tmp_path, small_disk):
    disk = small_disk(1 << 20)
    disk.leave(0)
    words = ["--data", image_root, "--rho", "1", "--loader", "torch", "--output", tmp_path / "out"]
    command = f"import sys; sys.stdout = open({str(disk.path / 'told')!r}, 'w'); import cli.eval; cli.eval.main()"
    done = warm.run(
        [sys.executable, "-c", command, str(run_folder), *map(str, words)], capture_output=True, timeout=200
    )
    assert done.returncode == 2, done.stderr
    assert "the table could not be written: no space left on that disk" in done.stderr
    assert {"rho.json", "rho.csv", "rho.png"} <= set(contents(tmp_path / "out"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
    ids=["gpu", "cpu", "host"],
)
def test_a_batch_too_large_is_told_before_the_split_is_evaluated(
    run_folder, image_root, capsys, tmp_path, monkeypatch, error
):
    def predict(*_):
        raise error

    monkeypatch.setattr(sweep, "_evaluate", lambda *_: pytest.fail("it was evaluated"))
    monkeypatch.setattr(sweep, "predict", predict)
    monkeypatch.setattr(choose, "predict", predict)
    words = ["--data", image_root, "--rho", "1", "--loader", "torch", "--output", tmp_path / "out"]
    for option, more in (("--batch-size", words), ("--batch", ["--budget-ms", "1"])):
        sentence = mistake(capsys, cli.eval.app, run_folder, *more, option, 5)
        assert f"batches of 5 images ({option}) take more memory than there is here; make them smaller" in sentence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("counts", "top5"), [({"cat": 3, "dog": 0, "emu": 2}, 100.0), ({"cat": 1}, 100.0)])
def test_a_split_may_lack_classes(run_folder, image_root, tmp_path, counts, top5):
    """Classes are those of the training split, and top-5 of three classes is all of them."""
    shutil.copytree(image_root / "train", tmp_path / "data" / "train")
    write_folder(tmp_path / "data" / "val", counts, seed=3)
    words = ["--data", tmp_path / "data", "--rho", "1", "--loader", "torch", "--output", tmp_path / "out"]
    assert call(cli.eval.app, run_folder, *words) in (0, None)
    (row,) = json.loads((tmp_path / "out" / "rho.json").read_text())
    assert (row["num_images"], row["top5"]) == (sum(counts.values()), top5)


def test_a_split_without_images_is_refused(run_folder, image_root, tmp_path, capsys):
    shutil.copytree(image_root / "train", tmp_path / "data" / "train")
    (tmp_path / "data" / "val" / "cat").mkdir(parents=True)
    words = ["--data", tmp_path / "data", "--loader", "torch", "--output", tmp_path / "out"]
    assert "there is no image in" in mistake(capsys, cli.eval.app, run_folder, *words)
    assert not (tmp_path / "out").exists()
