"""pss-convert as a user runs it: messages, exit codes, and nothing left behind."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
import warm
from conftest import missing, picture, write_folder

from pss.models.create import create_model

COMMAND = [sys.executable, "-m", "cli.convert"]
ROOT = Path(__file__).parents[2]


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env=os.environ | {"PYTHONWARNINGS": "error"} | environment,
        check=False,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    write_folder(root, {"a": 6, "b": 6})
    return root


def test_help_is_quick_and_complete() -> None:
    modules = "import sys, cli.convert; print(sorted({'torch', 'numpy', 'PIL', 'pipelines'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", modules], capture_output=True, text=True, cwd=ROOT, check=True)
    assert loaded.stdout.strip() == "[]"
    result = run("--help", COLUMNS="200")
    assert result.returncode == 0
    for option in (
        "format",
        "split",
        "val-fraction",
        "max-size",
        "quality",
        "jobs",
        "on-error",
        "shard-size",
        "seed",
        "verify",
        "full",
        "profile",
        "part",
        "merge",
        "restart",
        "engine",
        "inspect",
        "json",
        "source-format",
        "images",
        "label",
        "ignore",
        "follow-links",
        "class-order",
        "class-level",
        "use-test",
        "patience",
        "token-labels",
        "top-k",
        "label-grid",
        "label-square",
        "device",
    ):
        assert f"--{option} " in result.stdout


def test_a_conversion_says_what_it_did(source: Path, tmp_path: Path) -> None:
    result = run(source, tmp_path / "set", "--format", "dali", "--val-fraction", "0.5")
    assert result.returncode == 0
    done, rates, files, samples = result.stdout.splitlines()
    assert re.fullmatch(rf"{tmp_path}/set: 2 classes, 6 train, 6 val images, \d+\.\d MB", done)
    assert rates.startswith("images/s: checking ")
    assert files == (
        "files of the source: 12 found = 12 with samples + 0 used otherwise + 0 not read (dataset.json says which and "
        "why)"
    )
    assert samples == "samples: 12 found = 6 train + 6 val + 0 skipped"
    assert "12 in 2 classes, from ." in result.stderr  # before it works
    assert "2 classes, 6 train, 6 val images" in result.stdout
    assert re.search(r"images/s: checking \d+, writing \d+, verifying \d+", result.stdout)
    assert "checking train: 6/6 images" in result.stderr  # plain lines: this is no terminal
    assert "files are as they were written" in run(tmp_path / "set", "--verify").stdout
    (tmp_path / "set" / "val-00000.idx").unlink()
    damaged = run(tmp_path / "set", "--verify")
    assert damaged.returncode == 2
    assert "val-00000.idx are not as they were written" in damaged.stderr


def test_label_maps_are_added_and_told(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "set", "--format", "dali", "--val-fraction", "0.5")
    torch.manual_seed(0)
    model = create_model("deit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=2)
    torch.save(model.state_dict(), tmp_path / "t.pt")
    teacher = f"deit_tiny_patch16_224={tmp_path}/t.pt"

    def label(*more: str) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, str(tmp_path / "set"), "--token-labels", teacher, *more]
        return warm.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)

    made = label("--device", "cpu")
    assert made.returncode == 0, made.stderr
    (line,) = made.stdout.splitlines()
    assert re.fullmatch(
        rf"{tmp_path}/set/train\.maps\.[0-9a-f]{{8}}\.npy: the 2 best of 2 classes at 4 x 4 places, 128 bytes an "
        r"image; the teacher's top-1 is \d+\.\d%; train with --set data.label_maps=auto",
        line,
    )
    assert re.search(r"labelling train: 6/6 images, \d+/s, 0 s left", made.stderr)
    assert "calls its classes is not known" in made.stderr
    again = label("--top-k", "1")
    assert again.returncode == 2
    assert "--restart makes these in their place" in again.stderr


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--format", "dali"], "leave DEST, --format, --inspect, --merge and --part out"),
        (["--split", "extra"], "there is no split 'extra'"),
        ([], "holds no dataset.json; convert it with pss-convert first"),
    ],
)
def test_label_maps_are_for_converted_sets(source: Path, more: list[str], match: str) -> None:
    result = run(source, "--token-labels", "timm:resnet10t", *more)
    assert result.returncode == 2
    assert match in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_options_of_label_maps_need_a_teacher(source: Path, tmp_path: Path) -> None:
    result = run(source, tmp_path / "set", "--format", "dali", "--top-k", "3")
    assert result.returncode == 2
    assert "are for --token-labels; add it, or leave them out" in result.stderr


def test_inspect_says_what_would_be_read_and_writes_nothing(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("valid", 1)):
        write_folder(tmp_path / "src" / split, {"cat": count, "dog": count, "emu": count, "fox": count})
    (tmp_path / "src" / "test").mkdir()
    picture(16, 16, 0).save(tmp_path / "src" / "test" / "1.jpg")
    (tmp_path / "src" / "sample_submission.csv").write_text("id,label\n1,cat\n")
    result = run(tmp_path / "src", "--inspect")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        f"{tmp_path}/src: class folders",
        "  train    12 in 4 classes, from train",
        "  val      4 in 4 classes, from valid",
        "  classes  4: cat, dog, … fox (labels 0 to 3)",
        "  labels   folders, in the order of their names",
        "  files    18 found: 16 with samples + 2 not read",
        "           test images without labels: test/1.jpg",
        "           neither images nor labels: sample_submission.csv",
    ]
    told = json.loads(run(tmp_path / "src", "--inspect", "--json").stdout)
    assert (told["format"], told["classes"]) == ("folders", ["cat", "dog", "emu", "fox"])
    assert told["splits"] == {
        "train": {"samples": 12, "where": "train", "per_class": [3] * 4},
        "val": {"samples": 4, "where": "valid", "per_class": [1] * 4},
    }
    assert (told["files"]["found"], told["files"]["with_samples"]) == (18, 16)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_source_that_two_readers_claim_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "src", {"cat": 1, "dog": 1})
    with tarfile.open(tmp_path / "src" / "shard.tar", "w") as tar:
        for name, content in (("0.jpg", (tmp_path / "src" / "cat" / "000.jpg").read_bytes()), ("0.cls", b"0")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    arguments = [tmp_path / "src", tmp_path / "set", "--format", "dali", "--split", "train"]
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stderr == (
        f"error: {tmp_path}/src holds WebDataset tars (shard.tar) and class folders (cat/000.jpg); say which with "
        "--source-format webdataset or folders, or leave one out with --ignore\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    assert run(*arguments, "--source-format", "folders").returncode == 0
    account = json.loads((tmp_path / "set" / "dataset.json").read_text())["account"]
    assert account["files"]["not_read"] == {"not of --source-format folders": {"count": 1, "names": ["shard.tar"]}}


def test_skipped_images_are_counted(source: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "src", {"a": 3})
    (tmp_path / "src" / "a" / "001.jpg").write_text("no image")
    result = run(tmp_path / "src", tmp_path / "set", "--format", "dali", "--split", "train", "--on-error", "skip")
    assert result.returncode == 0
    assert "1 unreadable image(s) left out" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{src}"], "give a folder to write and --format"),
        (["{src}", "--verify"], "holds no dataset.json"),
        (["{src}", "{dest}", "--format", "dali"], "give either --val-fraction"),
        (["{src}/none", "{dest}", "--format", "dali"], "there is no folder"),
        (["{src}", "{dest}", "--format", "zip", "--split", "train"], "--format is 'zip'"),
        (["{src}", "{src}", "--format", "dali", "--split", "train"], "already exists"),
        (["{src}", "{dest}", "--format", "dali", "--split", "train", "--jobs", "0"], "--jobs"),
        (["{src}", "{dest}", "--format", "ffcv", "--profile", "jpg900"], "--profile is 'jpg900'"),
        (["{src}", "{dest}", "--format", "ffcv", "--part", "two"], "--part is 'two'; use i/n"),
        (["{dest}", "--merge"], "there is no unfinished conversion"),
        (["{src}", "--full"], "--full is for --verify"),
        (["{src}", "--json"], "--json is for --inspect"),
        (["{src}", "{dest}", "--inspect"], "--inspect writes nothing"),
        (["{src}", "--inspect", "--use-test"], "--use-test asks for test images"),
        (["{src}", "--inspect", "--ignore", "*.png"], "--ignore *.png fits nothing"),
        (["{src}", "--inspect", "--images", "*.png"], "--images *.png fits no file"),
        (["{src}", "--inspect", "--label", "x"], "--label means nothing for class folders"),
        (["{src}", "--inspect", "--source-format", "zip"], "--source-format is 'zip'"),
        (["{src}", "--inspect", "--source-format", "parquet"], "holds nothing that --source-format parquet reads"),
        (["{src}", "--inspect", "--class-order", "/dev/zero"], "--class-order /dev/zero is no text file"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    arguments: list[str], message: str, source: Path, tmp_path: Path
) -> None:
    result = run(*(a.format(src=source, dest=tmp_path / "set") for a in arguments))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(missing("ffcv") is not None, reason="FFCV is not installed")
def test_an_image_that_cannot_be_scaled_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "src", {"a": 4})
    picture(2, 200, 0).save(tmp_path / "src" / "a" / "strip.jpg")
    result = run(tmp_path / "src", tmp_path / "set", "--format", "ffcv", "--max-size", "64", "--split", "train")
    assert result.returncode == 2
    message = result.stderr.splitlines()[-1]
    assert "strip.jpg: too narrow" in message
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_traceback_on_request(source: Path, tmp_path: Path) -> None:
    arguments = [source, tmp_path / "set", "--format", "dali"]
    for result in (run(*arguments, "--traceback"), run(*arguments, PSS_TRACEBACK="1")):
        assert result.returncode == 1
        assert "Traceback" in result.stderr
        assert "DataError" in result.stderr


def test_a_wrong_option_is_named(source: Path, tmp_path: Path) -> None:
    result = run(source, tmp_path / "set", "--formats", "dali")
    assert result.returncode == 2
    assert "--formats" in result.stderr


def test_the_first_table_that_a_process_reads_has_memory_left(tmp_path: Path) -> None:
    """pyarrow's own allocator reserves as much at its first use as reading may take."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for split in ("train", "test"):
        images = []
        for number in range(4):
            picture(32, 32, number).save(file := io.BytesIO(), "PNG")
            images.append(file.getvalue())
        (tmp_path / "src" / "plain").mkdir(parents=True, exist_ok=True)
        table = pyarrow.table({"img": [{"bytes": image, "path": None} for image in images], "label": [0, 1] * 2})
        parquet.write_table(table, tmp_path / "src" / "plain" / f"{split}-00000-of-00001.parquet")
    done = run(tmp_path / "src", tmp_path / "out", "--format", "dali", "--use-test")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_keeps_what_is_finished(sent: signal.Signals, code: int, tmp_path: Path) -> None:
    folder = tmp_path / "src" / "train" / "a"
    folder.mkdir(parents=True)
    picture(2000, 2000, 0).save(folder / "0.jpg")
    for i in range(1, 400):
        os.link(folder / "0.jpg", folder / f"{i}.jpg")
    process = subprocess.Popen(
        [*COMMAND, str(tmp_path / "src"), str(tmp_path / "set"), "--format", "dali", "--jobs", "2"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    while not list(tmp_path.glob(".set.partial/work/check-train-*")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, sent)  # as the terminal does on Ctrl-C
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert "the same command continues" in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".set.partial", "src"]
