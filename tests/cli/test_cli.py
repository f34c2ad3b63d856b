"""The commands as people use them: real runs in real processes, and every mistake answered in one sentence."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import warm
from conftest import free_port, missing, shared
from safetensors.torch import load_file, save_file

import cli.doctor
import cli.eval
import cli.train
import pss.inference.report
import pss.runs.lock
from cli.errors import run
from pipelines.extras import install_hint
from pss.runs import checkpoint
from pss.runs.log import read_rows
from tools import crash_runs

ROOT = Path(__file__).parents[2]
TINY = ["model.embed_dim=24", "model.depth=2", "train.batch_size=16", "train.num_workers=1", "optim.warmup_epochs=0"]


def settings(*extra):
    return [word for setting in (*TINY, *extra) for word in ("--set", setting)]


def call(app, *arguments):
    """Run a command in this process; returns its exit code."""
    with pytest.raises(SystemExit) as done:
        run(app, [str(argument) for argument in arguments])
    return done.value.code


def train(data, output, *extra, options=("--loader", "torch")):
    return call(cli.train.app, "digits", "--data", data, "--output", output, *options, *settings(*extra))


def mistake(capsys, app, *arguments):
    """The one sentence that a mistake is answered with."""
    assert call(app, *arguments) == 2
    told = capsys.readouterr().err
    chatter = ("digits: starting", "waiting for ", "ρ: ")
    (sentence,) = [line for line in told.splitlines() if not line.startswith(chatter)]
    assert sentence.startswith("error: ")
    return sentence


@pytest.fixture(scope="module")
def trained(image_root, tmp_path_factory):
    def make(folder):
        assert train(image_root, folder / "run", "train.epochs=2", "train.ema_decay=0.9") in (0, None)

    with shared(tmp_path_factory, "trained", make) as folder:
        yield folder / "run"


def test_a_run_leaves_what_it_promises(trained):
    assert {path.name for path in trained.iterdir()} == {
        "config.json", "log.jsonl", "summary.json", "curves.png", "augmented.png", "tensorboard", "checkpoints",
        ".lock",
    }  # fmt: skip
    epochs = read_rows(trained, "epoch")
    assert [row["epoch"] for row in epochs] == [1, 2]
    assert {"loss", "top1", "top5", "val_loss", "ema_top1", "data_wait", "images_per_second"} <= epochs[0].keys()
    assert json.loads((trained / "config.json").read_text())["train"]["epochs"] == 2


def test_eval_writes_table_rows_and_picture(trained, image_root, tmp_path, capsys):
    assert call(
        cli.eval.app, trained, "--data", image_root, "--rho", "1.0,0.5", "--output", tmp_path, "--batch-size", 8,
        "--loader", "torch",
    ) in (0, None)  # fmt: skip
    rows = json.loads((tmp_path / "rho.json").read_text())
    assert [(row["rho"], row["tokens"], row["num_images"]) for row in rows] == [(1.0, 17, 23), (0.5, 8, 23)]
    assert rows[0]["top1"] == pytest.approx(read_rows(trained, "epoch")[-1]["top1"], abs=1e-3)
    assert (tmp_path / "rho.png").exists()
    assert (tmp_path / "report.html").exists() == (find_spec("plotly") is not None)
    assert "GFLOPs" in capsys.readouterr().out


def test_eval_says_what_the_report_needs(trained, image_root, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    call(cli.eval.app, trained, "--data", image_root, "--rho", "1", "--output", tmp_path, "--loader", "torch")
    assert f"report.html needs plotly; run: {install_hint('report')}" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_accuracy_does_not_depend_on_batch_size_or_loader(trained, image_root, tmp_path):
    pytest.importorskip("nvidia.dali")
    found = []
    for number, (loader, size) in enumerate((("torch", 5), ("torch", 23), ("dali", 7))):
        output = tmp_path / str(number)
        call(cli.eval.app, trained, "--data", image_root, "--output", output, "--batch-size", size,
             "--loader", loader, "--rho", "0.6")  # fmt: skip
        (row,) = json.loads((output / "rho.json").read_text())
        found.append((row["top1"], row["loss"]))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[2][1] == pytest.approx(found[0][1], abs=0.02)  # the decoders differ by rounding


def test_auto_says_what_it_took_and_a_resumed_run_keeps_it(trained, image_root, tmp_path, capsys):
    assert train(image_root, tmp_path / "run", "train.epochs=1", options=("--loader", "auto")) in (0, None)
    told = capsys.readouterr().err
    assert "--loader auto: " in told
    assert re.search(r"^digits: starting, .*\nρ: cyclic 0.2→1.0 within each epoch of 3 steps$", told, re.MULTILINE)
    shutil.copytree(trained, tmp_path / "begun")
    again = ["train.epochs=2", "train.ema_decay=0.9"]
    assert train(image_root, tmp_path / "begun", *again, options=("--resume",)) in (0, None)
    assert "--loader auto: torch (the run began with it)" in capsys.readouterr().err


def test_the_doctor_measures_and_trains_nothing(capsys, image_root, monkeypatch):
    monkeypatch.setattr(cli.doctor, "_SECONDS", 0.2)
    options = ["--data", image_root, "--loader", "torch", *settings()]
    assert call(cli.train.app, "digits", "--doctor", *options) in (0, None)
    told = capsys.readouterr().out
    assert "torch loader alone" in told
    assert sum(line.endswith(("  model", "  loader")) for line in told.splitlines()) >= 2  # one of them at each rho
    assert "give --data" in mistake(capsys, cli.train.app, "digits", "--doctor")


def test_list_shows_every_recipe(capsys):
    assert call(cli.train.app, "--list") == 0
    assert "deit-s-224" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digit", "--data", "{data}"], "did you mean digits?"),
        (["digits", "--data", "{data}", "--set", "train.epoch=1"], "did you mean train.epochs?"),
        (["digits", "--data", "{data}", "--set", "schedule.low=1.2"], "it must be at most 1"),
        (
            ["digits", "--data", "{data}", "--set", "method=dnese"],
            "use one of avit, dense, dynamicvit, s2vite, sampled, sparsifiner, svite, toe, or package",
        ),
        (["digits", "--data", "{data}", "--set", "model.name=deit_smal_patch16_224"], "deit_small_patch16_224"),
        (["digits", "--data", "{data}", "--set", "data.img_size=33"], "33"),
        (["digits", "--data", "{data}", "--set", "train.batch_size=100"], "53"),
        (["digits", "--data", "{missing}"], "no data set in"),
        (["digits", "--data", "{empty}"], "empty"),
        (["digits", "--data", "{text}"], "note.jpg"),
        (["digits", "--data", "{truncated}"], "cut.jpg"),
    ],
)
@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_train_answers_mistakes_and_leaves_nothing(capsys, bad_data, tmp_path, arguments, words, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    filled = [word.format(**bad_data) for word in arguments]
    tiny = settings("train.epochs=1")
    sentence = mistake(capsys, cli.train.app, *filled[:1], *tiny, *filled[1:], "--output", tmp_path / "run",
                       "--loader", loader)  # fmt: skip
    assert words in sentence
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def bad_data(image_root, tmp_path_factory):
    """Folders that cannot be trained on, by name."""
    base = tmp_path_factory.mktemp("bad")
    (base / "empty" / "train" / "cat").mkdir(parents=True)
    (base / "empty" / "val" / "cat").mkdir(parents=True)
    for name, content in (("text/note", b"no picture"), ("truncated/cut", None)):
        folder, stem = name.split("/")
        for split in ("train", "val"):
            for category in ("cat", "dog"):
                place = base / folder / split / category
                place.mkdir(parents=True)
                for number, path in enumerate(sorted((image_root / "train" / category).glob("*.jpg"))[:16]):
                    whole = path.read_bytes()
                    (place / f"{number}.jpg").write_bytes(whole)
                (place / f"{stem}.jpg").write_bytes(whole[: len(whole) // 2] if content is None else content)
    return {"data": image_root, "missing": base / "missing"} | {n: base / n for n in ("empty", "text", "truncated")}


@pytest.mark.parametrize(
    ("rho", "words"),
    [
        ("0", "out of range"),
        ("1.2", "out of range"),
        ("", "--rho is empty"),
        ("a,b", "write numbers"),
        ("1:2", "write numbers"),
    ],
)
def test_eval_answers_bad_rhos(capsys, trained, image_root, rho, words):
    assert words in mistake(capsys, cli.eval.app, trained, "--data", image_root, "--rho", rho)


def test_rho_ranges():
    assert cli.eval.parse_rhos("0.2:1.0:0.2") == [1.0, 0.8, 0.6, 0.4, 0.2]
    assert cli.eval.parse_rhos("1,.5,.5") == [1.0, 0.5]


def test_eval_refuses_data_of_another_class_count(capsys, trained, bad_data):
    sentence = mistake(capsys, cli.eval.app, trained, "--data", bad_data["truncated"])
    assert "3 classes" in sentence
    assert "has 2" in sentence


@pytest.mark.parametrize("torchrun", [False, True])
@pytest.mark.exhaustive
def test_eval_counts_every_image_once_on_two_processes(trained, image_root, tmp_path, torchrun):
    """Started by torchrun, or by ourselves with what torchrun would tell them."""
    rows = {}
    for processes in (1, 2):
        output = tmp_path / str(processes)
        arguments = [trained, "--data", image_root, "--output", output, "--loader", "torch", "--rho", "1,0.5",
                     "--batch-size", "8"]  # fmt: skip
        if processes == 1:
            launch("eval", *arguments, popen=subprocess.Popen)
        elif torchrun:
            launch("eval", *arguments, processes=processes)
        else:
            meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            ranks = [start("eval", *arguments, more=meet | {"RANK": str(rank)}) for rank in range(2)]
            ends = [finish(process) for process in ranks]
            assert [code for code, _ in ends] == [0, 0], ends
        rows[processes] = json.loads((output / "rho.json").read_text())
    for one, two in zip(rows[1], rows[2], strict=True):
        assert one["num_images"] == two["num_images"] == 23
        assert (one["top1"], one["top5"]) == (two["top1"], two["top5"])
        assert one["loss"] == pytest.approx(two["loss"], abs=2e-6)


def test_eval_takes_weights_of_timm_and_says_what_is_missing(capsys, image_root, tmp_path):
    file = tmp_path / "tiny.safetensors"
    save_file(timm.create_model("deit_tiny_patch16_224", num_classes=3, depth=12).state_dict(), file)
    data = ("--data", image_root, "--output", tmp_path)
    assert "no plain Vision Transformer" in mistake(capsys, cli.eval.app, f"deit_tniy={file}", *data)
    assert "no weights file" in mistake(capsys, cli.eval.app, "deit_tiny_patch16_224=nowhere.pth", *data)
    other = write_head(file, tmp_path / "other.safetensors", 7)
    assert "trained on 7 classes" in mistake(capsys, cli.eval.app, f"deit_tiny_patch16_224={other}", *data)
    assert "there is no data set" in mistake(capsys, cli.eval.app, f"deit_tiny_patch16_224={file}", "--data", tmp_path)


def write_head(source, target, num_classes):
    weights = load_file(source)
    weights |= {"head.weight": torch.zeros(num_classes, 192), "head.bias": torch.zeros(num_classes)}
    save_file(weights, target)
    return target


def test_eval_pushes_and_pulls(trained, image_root, tmp_path):
    options = ["--data", image_root, "--rho", "0.5", "--loader", "torch", "--output"]
    pushing = ("--push", tmp_path / "hub", "--license", "mit")
    assert call(cli.eval.app, trained, *pushing, *options, tmp_path / "a") in (0, None)
    shown = (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")
    assert "license: mit" in shown
    assert f"images of {image_root.name}, split val" in shown
    assert (tmp_path / "hub" / "rho.png").read_bytes() == (tmp_path / "a" / "rho.png").read_bytes()
    assert call(cli.eval.app, tmp_path / "hub", *options, tmp_path / "b") in (0, None)
    ((one,), (other,)) = (json.loads((tmp_path / name / "rho.json").read_text()) for name in "ab")
    assert (one["top1"], one["loss"]) == (other["top1"], other["loss"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget-ms", "5", "--max-drop", "1"], "choose ρ by one of them"),
        (["--budget-ms", "-1"], "not negative"),
        (["--batch", "4"], "it is --batch-size"),
        (["--max-drop", "1"], "--data is missing"),
        (["--rho", "0.5"], "--data is missing"),
        (["--dynamic"], "goes with --export"),
        (["--export", "model.pt2", "--rho", "0.5,1"], "needs one ρ"),
        (["--export", "model.h5", "--dynamic"], "ends in .onnx or .pt2"),
        (["--export", "model.pt2", "--rho", "0.5", "--push", "there"], "leave out --export"),
        (["--license", "mit"], "add --push, or leave it out"),
        (["other", "--budget-ms", "5"], "for one model and 2 are named"),
    ],
)
def test_eval_answers_options_that_do_not_go_together(capsys, trained, options, words):
    assert words in mistake(capsys, cli.eval.app, trained, *options)


def test_eval_chooses_rho_and_exports_it(capsys, trained, image_root, tmp_path):
    data = ("--data", image_root, "--loader", "torch")
    file = tmp_path / "model.pt2"
    assert call(cli.eval.app, trained, "--max-drop", "100", "--rho", "0.5,0.3", *data, "--export", file) in (0, None)
    told = capsys.readouterr().out
    assert "ρ 0.3 (5 of 17 tokens)" in told
    assert "points of top-1 less" in told
    about = {"pss.json": ""}
    torch.export.load(file, extra_files=about)
    assert json.loads(about["pss.json"])["rho"] == 0.3
    assert call(cli.eval.app, trained, "--budget-ms", "10000", "--batch", "2") in (0, None)
    assert "ρ 1 (17 of 17 tokens)" in capsys.readouterr().out


def test_eval_names_what_is_no_run(capsys, image_root, tmp_path):
    assert "config.json not found" in mistake(capsys, cli.eval.app, tmp_path, "--data", image_root)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_is_not_overwritten(capsys, trained, image_root):
    before = sorted(path.name for path in (trained / "checkpoints").iterdir())
    sentence = mistake(capsys, cli.train.app, "digits", "--data", image_root, "--output", trained)
    assert "--resume" in sentence
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == before


def test_resume_with_other_settings_names_them(capsys, trained, image_root):
    sentence = mistake(
        capsys,
        cli.train.app,
        "digits",
        "--data",
        image_root,
        "--output",
        trained,
        "--resume",
        *settings("train.epochs=2"),
    )
    assert "train.ema_decay (0.9, 0.998)" in sentence


@pytest.mark.parametrize("rel_pos", ["none", "bias", "separable", "rope"])
def test_every_kind_of_position_trains_and_resumes_bit_identical(image_root, tmp_path, rel_pos):
    chosen = [f"model.rel_pos={rel_pos}", "train.epochs=1"]
    for name, stretches in (("straight", [None]), ("resumed", [2, None])):
        for stop in stretches:
            extra = [f"train.max_steps={stop}"] if stop else []
            options = ("--loader", "torch", "--resume")
            assert train(image_root, tmp_path / name, *chosen, *extra, options=options) in (0, None)
    straight, resumed = (checkpoint.load_latest(tmp_path / name / "checkpoints")[0] for name in ("straight", "resumed"))
    assert straight["step"] == resumed["step"] == 3
    assert straight["config"]["model"]["rel_pos"] == rel_pos
    tables = [weight for name, weight in straight["method"].items() if name.endswith("bias_table")]
    assert bool(tables) == (rel_pos in ("bias", "separable"))
    assert all(table.any() for table in tables)
    for part in ("method", "ema"):
        for name, weight in straight[part].items():
            assert weight.equal(resumed[part][name]), name


@pytest.mark.parametrize("loader", [pytest.param("torch", marks=pytest.mark.exhaustive), "dali"])
def test_stopped_after_an_epoch_and_resumed_is_bit_identical(image_root, tmp_path, loader):
    """Each stretch in a process of its own, so that nothing but the checkpoint connects them. With torch's loader, the
    straight one has a hash seed of its own, too."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    options = [
        "--loader",
        loader,
        *settings("train.epochs=3", "loss.mixup=0.8", "data.flip=0.5", "model.drop_path_rate=0.2"),
    ]
    for output, stretches in (("straight", [None]), ("resumed", [3, None])):
        for stop in stretches:
            extra = ["--set", f"train.max_steps={stop}"] if stop else []
            arguments = ["digits", "--data", image_root, "--output", tmp_path / output, "--resume", *options, *extra]
            launch(
                "train", *arguments, popen=subprocess.Popen if (output, loader) == ("straight", "torch") else warm.Popen
            )
    straight, resumed = (checkpoint.load_latest(tmp_path / name / "checkpoints")[0] for name in ("straight", "resumed"))
    assert straight["step"] == resumed["step"] == 9
    for part in ("method", "ema"):
        for name, weight in straight[part].items():
            assert weight.equal(resumed[part][name]), name


def test_sigterm_and_resume_auto_end_bit_identical(image_root, tmp_path):
    options = ["digits", "--data", image_root, "--loader", "torch", *settings("train.epochs=30")]
    launch("train", *options, "--resume", "auto", "--output", tmp_path / "straight")
    process = start("train", *options, "--resume", "auto", "--output", tmp_path / "stopped")
    wait_for_new_checkpoint(process, tmp_path / "stopped" / "checkpoints")
    process.send_signal(signal.SIGTERM)
    code, told = finish(process)
    assert code == 75
    assert "continue with --resume" in told
    launch("train", *options, "--resume", "auto", "--output", tmp_path / "stopped")
    states = [checkpoint.load_latest(tmp_path / name / "checkpoints")[0] for name in ("straight", "stopped")]
    for name, weight in states[0]["method"].items():
        assert weight.equal(states[1]["method"][name]), name
    assert [row["epoch"] for row in read_rows(tmp_path / "stopped", "epoch")] == list(range(1, 31))


def test_a_run_stopped_in_several_ways_ends_bit_identical(image_root, tmp_path, monkeypatch):
    """`tools.crash_runs` does it in every way there is, on two processes, with each loader."""
    monkeypatch.setattr(crash_runs, "subprocess", SimpleNamespace(Popen=warm.Popen, PIPE=subprocess.PIPE))
    rounds = [crash_runs.Round("KILL", moment="saving"), crash_runs.Round("TERM")]
    rounds.append(crash_runs.Round("KILL", moment="validation"))
    done = crash_runs.crash(image_root, tmp_path, loader="torch", rounds=rounds, epochs=40, seconds=0.2)
    assert (done.differing, done.stuck) == ((), ())
    assert len(done.told) == 3


def test_another_loader_goes_on_from_the_end_of_an_epoch_and_says_so(converted_root, tmp_path, capsys):
    """Three steps an epoch: stopped at step 5, it goes on from step 3."""
    if missing("dali"):
        pytest.skip(missing("dali"))
    chosen = ["train.epochs=3", "train.keep_checkpoints=1"]
    assert train(converted_root, tmp_path / "run", *chosen, "train.max_steps=5") in (0, None)
    folder = tmp_path / "run" / "checkpoints"
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(folder)] == [5, 3]
    options = ("--loader", "dali", "--resume")
    assert train(converted_root, tmp_path / "run", *chosen, options=options) in (0, None)
    told = capsys.readouterr().err
    assert (
        "loader torch before and dali now: the run goes on from the end of an epoch, step 3, and not from step 5"
        in told
    )
    assert "continuing at step 3" in told
    assert checkpoint.load_latest(folder)[0]["step"] == 9
    # At the end of an epoch there is nothing to say; before the first one, the run begins again.
    for stop, begin in ((3, "continuing at step 3"), (2, "starting")):
        output = tmp_path / f"stopped-{stop}"
        assert train(converted_root, output, *chosen, f"train.max_steps={stop}") in (0, None)
        assert train(converted_root, output, *chosen, options=options) in (0, None)
        told = capsys.readouterr().err
        assert f"digits: {begin}, " in told
        assert ("goes on from the end of an epoch, step 0" in told) == (stop == 2)


def test_a_full_disk_ends_a_run_in_one_sentence_and_nothing_is_lost(capsys, image_root, tmp_path):
    output, options = tmp_path / "run", ("--loader", "torch", "--resume")
    assert train(image_root, output, "train.epochs=2", "train.max_steps=3") in (0, None)
    folder = output / "checkpoints"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        assert train(image_root, output, "train.epochs=2", options=options) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: the checkpoint of step 6 cannot be written to {folder} (File too large; "), last
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert train(image_root, output, "train.epochs=2", options=options) in (0, None)
    assert checkpoint.load_latest(folder)[0]["step"] == 6


def wait_for_new_checkpoint(process, folder):
    before = set(checkpoint.list_checkpoints(folder))
    deadline = time.monotonic() + 60
    while set(checkpoint.list_checkpoints(folder)) <= before:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start(name, *arguments, processes=1, popen=warm.Popen, more=None):
    command = [sys.executable, "-m"]
    if processes > 1:
        popen = subprocess.Popen  # torchrun, which starts them anew
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command += [f"cli.{name}", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (more or {})
    return popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process):
    """Its exit code and what it said; also closes the pipe, which a leaked child process would keep open."""
    try:
        _, told = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, told


def launch(name, *arguments, **options):
    code, told = finish(start(name, *arguments, **options))
    assert code == 0, told


def test_a_folder_in_use_is_refused_and_free_again_after_a_kill(capsys, image_root, tmp_path, monkeypatch):
    monkeypatch.setattr(pss.runs.lock, "_PATIENCE_SECONDS", 0.2)
    output = tmp_path / "run"
    command = [sys.executable, "-m", "cli.train", "digits", "--data", str(image_root), "--output", str(output)]
    command += ["--loader", "torch", "--resume", *settings("train.epochs=4000", "train.max_steps=9000")]
    process = warm.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not list((output / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        arguments = ["digits", "--data", image_root, "--output", output, "--loader", "torch", "--resume"]
        told = mistake(capsys, cli.train.app, *arguments, *settings("train.epochs=4000"))
        assert f"{output} is in use by a run (process {process.pid} on " in told
    finally:
        process.kill()
        process.communicate()
    newest = checkpoint.step_of(checkpoint.list_checkpoints(output / "checkpoints")[0])
    stop = f"train.max_steps={newest + 1}"
    assert train(image_root, output, "train.epochs=4000", stop, options=("--loader", "torch", "--resume")) in (0, None)


@pytest.mark.exhaustive
def test_the_best_checkpoint_can_be_evaluated(capsys, image_root, tmp_path):
    output = tmp_path / "run"
    assert train(image_root, output, "train.epochs=3", "train.keep_checkpoints=3") in (0, None)
    best = output / "checkpoints" / "best.json"
    (oldest,) = (output / "checkpoints").glob("step-000000003-*")
    best.write_text(json.dumps({"file": oldest.name, "step": 3, "score": 100.0}))
    arguments = ["--data", image_root, "--rho", "1", "--loader", "torch", "--output", tmp_path]
    for options, step in (((), 9), (("--best",), 3)):
        assert call(cli.eval.app, output, *arguments, *options) in (0, None)
        (row,) = json.loads((tmp_path / "rho.json").read_text())
        assert row["step"] == step
    capsys.readouterr()
    assert "leave out --best" in mistake(capsys, cli.eval.app, oldest, *arguments, "--best")
    best.unlink()
    assert "no validated checkpoint; leave out --best" in mistake(capsys, cli.eval.app, output, *arguments, "--best")
