"""What is reported ends no run and is not lost; what cannot be saved or was not learnt ends it in a sentence."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time

import pytest
import torch
from memory_loader import MemoryLoader
from test_train import CLASSES, HERE, SETTINGS, assert_same, final_state, trainer

import cli.errors
import cli.train
from pss import recipes
from pss.runs import checkpoint, lock, log, writer
from pss.runs.log import RunLog, read_rows
from pss.training import reporting, sheet
from pss.training.console import TrainView
from pss.training.guard import Guard
from pss.training.meter import Meter
from pss.training.setup import Interrupted
from pss.training.trainer import Trainer

DISK_FULL = OSError(28, "No space left on device")


def fail(*args, **kwargs):
    raise DISK_FULL


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        (log.Board, "add"),
        (log.Board, "__init__"),
        (log.Board, "picture"),
        (sheet, "draw"),
        (sheet, "seen"),
        (TrainView, "step"),
        (TrainView, "say"),
        (TrainView, "close"),
        (Meter, "saving"),
        (RunLog, "write"),
    ],
)
def test_an_error_in_a_report_is_a_warning_told_once(tmp_path, monkeypatch, caplog, broken, name):
    monkeypatch.setattr(broken, name, fail)
    row = trainer(tmp_path, "train.epochs=2").fit()
    assert row["step"] == 10
    assert final_state(tmp_path)["step"] == 10
    warnings = [message for message in caplog.messages if "no space left" in message]
    assert len(warnings) == (2 if (broken, name) == (RunLog, "write") else 1) or len(set(warnings)) == len(warnings)
    assert warnings


def test_rows_that_found_no_room_are_written_later(tmp_path, monkeypatch, caplog):
    original, calls = os.write, []

    def full(file, content):
        if content.startswith(b'{"kind"'):
            calls.append(content)
            if len(calls) in (3, 4):
                return original(file, content[:20])  # a full disk takes a part of a row
            if len(calls) == 5:
                raise DISK_FULL
        return original(file, content)

    monkeypatch.setattr(log.os, "write", full)
    trainer(tmp_path, "train.epochs=2").fit()
    assert [(row["kind"], row["step"]) for row in read_rows(tmp_path)] == [
        ("start", 0), ("step", 2), ("step", 4), ("epoch", 5), ("step", 6), ("step", 8), ("step", 10), ("epoch", 10),
    ]  # fmt: skip
    assert sum("log.jsonl cannot be written" in message for message in caplog.messages) == 1


def test_rows_that_never_found_room_end_a_finished_run_in_a_sentence(tmp_path, monkeypatch):
    original = os.write
    monkeypatch.setattr(
        log.os, "write", lambda file, content: fail() if b'"epoch": 1' in content else original(file, content)
    )
    with pytest.raises(OSError, match=r"\d rows could not be written to .*log\.jsonl; the checkpoints are whole"):
        trainer(tmp_path, "train.epochs=2").fit()
    assert final_state(tmp_path)["step"] == 10


def test_a_summary_that_cannot_be_written_ends_a_finished_run_in_a_sentence(tmp_path, monkeypatch):
    original = reporting.records.write
    monkeypatch.setattr(
        reporting.records,
        "write",
        lambda path, values: fail() if path.name == "summary.json" else original(path, values),
    )
    with pytest.raises(OSError, match=r"summary\.json cannot be written \(no space left"):
        trainer(tmp_path, "train.epochs=1", "optim.warmup_epochs=0").fit()
    assert final_state(tmp_path)["step"] == 5


@pytest.mark.parametrize("rhos", ["1.0,0.98", "0.98,1.0,0.99"])
def test_levels_that_keep_as_many_tokens_save_nothing_and_end_nothing(tmp_path, rhos):
    row = trainer(
        tmp_path, "schedule.name=list", f"schedule.rhos={rhos}", "train.epochs=1", "optim.warmup_epochs=0"
    ).fit()
    assert len(row["by_rho"]) == len(rhos.split(","))
    assert "saved_share" not in row


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    run = RunLog(tmp_path, resume_step=0)
    run.write("step", 1, loss=float("inf"), norm=float("nan"), by={"a": float("-inf")})
    run.close()
    assert '"loss": null, "norm": null, "by": {"a": null}' in (tmp_path / "log.jsonl").read_text()


# The folder of a run.


def claimed(folder, body=lambda: None, **options):
    with lock.claim(folder, HERE, **options):
        body()


@pytest.mark.parametrize("kind", ["removed", "renamed", "replaced"])
def test_a_folder_that_goes_away_ends_the_run_in_a_sentence(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(writer, "_LOOK_SECONDS", 0.0)
    output = tmp_path / "run"
    output.mkdir()

    def take(step):
        if step == 7:
            output.rename(tmp_path / "elsewhere")
            if kind == "replaced":
                output.mkdir()
            if kind == "removed":
                shutil.rmtree(tmp_path / "elsewhere")

    with pytest.raises(ValueError, match=rf"{output} was removed, renamed or replaced .*--resume"):
        trainer(output, on_batch=take).fit()
    assert not output.exists() or list(output.iterdir()) == []
    if kind == "renamed":  # goes on from where it is now
        assert trainer(tmp_path / "elsewhere").step == 5


@pytest.mark.parametrize("kind", ["removed", "renamed", "replaced"])
@pytest.mark.parametrize("at", ["before the folder", "in the checkpoint", "in best.json"])
def test_a_folder_that_goes_away_while_it_is_written_to_is_told_as_such(tmp_path, monkeypatch, kind, at):
    run = tmp_path / "run"
    run.mkdir()
    saving = writer.Writer(run / "checkpoints", keep=3)

    def before(module, name):
        original = getattr(module, name)

        def gone(*args, **kwargs):
            monkeypatch.setattr(module, name, original)
            run.rename(tmp_path / "elsewhere")
            if kind == "removed":
                shutil.rmtree(tmp_path / "elsewhere")
            if kind == "replaced":
                run.mkdir()
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, gone)

    if at == "in best.json":
        saving.save({"step": 5}, step=5)
        saving.wait()
        before(checkpoint.records, "write")
        saving.note_best(step=5, score=1.0, weights="method")
    else:
        if at == "in the checkpoint":
            before(checkpoint.torch, "save")
        else:
            before(checkpoint, "assert_plain")
        saving.save({"step": 5}, step=5)
    with pytest.raises(ValueError, match=rf"{run} was removed, renamed or replaced .*--resume"):
        saving.wait()
    saving.close()
    assert not list(run.rglob("step-*")) or kind == "replaced"


def test_a_folder_that_nothing_was_trained_in_is_removed_and_its_parents_too(tmp_path):
    def fruitless():
        (tmp_path / "a" / "b" / "config.json").write_text("{}")
        RunLog(tmp_path / "a" / "b", resume_step=0).close()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        claimed(tmp_path / "a" / "b", fruitless)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("theirs", ["notes.txt", "checkpoints/model.pt", "tensorboard/sub/x", "sub/log.jsonl"])
def test_what_others_put_into_the_folder_stays(tmp_path, theirs):
    def fruitless():
        (tmp_path / "run" / theirs).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / theirs).write_text("mine")
        (tmp_path / "run" / "config.json").write_text("{}")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        claimed(tmp_path / "run", fruitless)
    assert (tmp_path / "run" / theirs).read_text() == "mine"


def test_what_was_there_before_stays(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("before")
    claimed(tmp_path / "run", lambda: (tmp_path / "run" / "summary.json").write_text("{}"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_log_that_tells_why_a_run_failed_stays(tmp_path):
    def diverge():
        trainer(tmp_path / "run", "optim.lr=1e30", "optim.warmup_epochs=0", "optim.clip_grad=none").fit()

    with pytest.raises(ValueError, match="left weights that are not finite"):
        claimed(tmp_path / "run", diverge)
    rows = read_rows(tmp_path / "run", "step")
    assert rows == []  # the first rows would come with step 2, and the weights are broken after step 1
    with pytest.raises(ValueError, match="not finite"):
        claimed(tmp_path / "other", lambda: spoilt(tmp_path / "other").fit())
    assert [row["step"] for row in read_rows(tmp_path / "other", "step")] == [1, 2, 3]


def spoilt(output):
    """A run whose loss is no number from step 3 on."""
    run = trainer(output, "train.log_every_steps=1", "train.max_skipped=1")
    forward = run.method.forward

    def spoil(images, targets, at):
        out = forward(images, targets, at)
        return out | {"loss": out["loss"] * float("nan")} if at.step >= 3 else out

    run.method.forward = spoil
    return run


def test_who_waits_for_a_folder_says_so_and_gets_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE_SECONDS", 20.0)
    told, order, release = [], [], threading.Event()

    def hold():
        (tmp_path / "run" / "mine").write_text("")
        order.append("first")
        release.wait(20)

    first = threading.Thread(target=claimed, args=(tmp_path / "run", hold))
    first.start()
    while not order:
        time.sleep(0.01)

    def say(line):
        told.append(line)
        release.set()

    claimed(tmp_path / "run", lambda: order.append("second"), say=say)
    first.join()
    assert order == ["first", "second"]
    (line,) = told
    assert line.startswith(f"waiting for the run in {tmp_path}/run (process {os.getpid()} on ")


def test_a_folder_that_is_removed_while_it_is_waited_for_is_told_or_made_anew(tmp_path, monkeypatch):
    """The run before fails and takes its folder with it."""
    monkeypatch.setattr(lock, "_PATIENCE_SECONDS", 20.0)
    begun, release = threading.Event(), threading.Event()

    def hold():
        begun.set()
        release.wait(20)

    first = threading.Thread(target=claimed, args=(tmp_path / "run", hold))
    first.start()
    assert begun.wait(20)
    with pytest.raises(ValueError, match=r"run was removed by somebody else just now; start again"):
        claimed(tmp_path / "run", say=lambda line: release.set())
    first.join()


@pytest.mark.parametrize("name", ["file/run", "x" * 300])
def test_a_folder_that_cannot_be_made_is_told_in_words(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be used as --output \([a-z].*\); choose another folder") as told:
        claimed(tmp_path / name)
    assert "Errno" not in str(told.value)


# What was learnt.


def big(run, steps, factor):
    """Have the loss, and with it the gradients, be larger by `factor` in `steps`."""
    forward = run.method.forward

    def larger(images, targets, at):
        out = forward(images, targets, at)
        return out | {"loss": out["loss"] * factor} if at.step in steps else out

    run.method.forward = larger
    return run


@pytest.mark.parametrize("factor", [1e22, 1e30])
def test_gradients_that_cannot_be_squared_change_nothing(tmp_path, factor):
    """Finite, but the optimizer's second moments would not be."""
    plain = "optim.clip_grad=none"
    for name, steps in (("before", ()), ("after", (5,))):
        big(trainer(tmp_path / name, plain, f"train.max_steps={5 + len(steps)}"), steps, factor).fit()
    before, after = (final_state(tmp_path / name) for name in ("before", "after"))
    assert_same(before["method"], after["method"])
    assert after["skipped"].tolist()[0] == 1
    clipped = big(trainer(tmp_path / "clipped", "train.max_steps=6"), (5,), 1e15)  # to a norm of 1
    clipped.fit()
    assert clipped.guard.check(6) == 0
    assert all(value.isfinite().all() for value in final_state(tmp_path / "clipped")["method"].values())


def test_weights_that_are_not_finite_end_the_run_and_are_never_saved(tmp_path):
    run = trainer(tmp_path, "train.log_every_steps=50")

    def broken(at, step):
        if at.step == 7:
            with torch.no_grad():
                run.method.model.head.bias[0] = float("inf")

    run.method.after_optimizer = broken
    with pytest.raises(ValueError, match=r"one of steps 6 to 8 left weights that are not finite, .*model\.weights=RUN"):
        run.fit()
    state = final_state(tmp_path)
    assert state["step"] == 5
    assert all(value.isfinite().all() for value in state["method"].values())


def test_the_guard_counts_what_it_skips():
    guard = Guard(torch.device("cpu"), limit=100)
    loss = torch.tensor(1.0)
    for norm, clip, bad in ((1.0, None, 0), (1e20, None, 1), (1e20, 1.0, 0), (float("inf"), 1.0, 1), (1e18, None, 0)):
        skip, measured = guard.judge(loss, torch.tensor(norm), clip)
        assert (int(skip), int(measured[2])) == (bad, 1 - bad)
    assert guard.check(5) == 2


def test_a_run_that_skipped_most_steps_is_not_done(tmp_path):
    run = big(trainer(tmp_path, "train.max_skipped=7"), {n for n in range(20) if n % 5}, float("nan"))
    with pytest.raises(ValueError, match=r"16 of the run's 20 steps were skipped.*optim\.lr"):
        run.fit()
    assert json.loads((tmp_path / "summary.json").read_text())["skipped"] == 16
    assert final_state(tmp_path)["step"] == 20


def test_a_stop_while_the_resumed_validation_runs_is_noticed_too(tmp_path):
    """Between the end of an epoch and its row, twice."""

    def stopping(_):
        os.kill(os.getpid(), signal.SIGTERM)

    for _ in range(2):
        config = recipes.get("digits").with_settings(SETTINGS)
        loaders = MemoryLoader(), MemoryLoader(train=False, on_batch=stopping)
        run = Trainer(config, *loaders, classes=CLASSES, output=tmp_path, world=HERE)
        with pytest.raises(Interrupted):
            run.fit()
        assert (run.step, read_rows(tmp_path, "epoch")) == (5, [])
    assert trainer(tmp_path).fit()["step"] == 20
    assert [row["epoch"] for row in read_rows(tmp_path, "epoch")] == [1, 2, 3, 4]


# A full disk.

ROOM = {
    "the lock": 0,
    "the configuration": 4,
    "the log": 8,
    "a checkpoint": 40,
    "the second checkpoint": 260,
    "later": 420,
}
"""KiB that are left when a run begins, by what the room does not suffice for."""


@pytest.mark.parametrize("what", ROOM)
def test_a_full_disk_ends_a_run_in_a_sentence_and_nothing_is_half_written(small_disk, image_root, capsys, what):
    disk = small_disk(1 << 21)
    disk.leave(ROOM[what] << 10)
    output = disk.path / "run"
    settings = ["train.epochs=4", "model.embed_dim=24", "model.depth=1", "train.batch_size=8", "optim.warmup_epochs=0"]
    settings += ["train.log_every_steps=1", "train.keep_checkpoints=4"]
    words = ["digits", "--data", image_root, "--output", output, "--loader", "torch"]
    words += [word for setting in settings for word in ("--set", setting)]
    with pytest.raises(SystemExit) as done:
        cli.errors.run(cli.train.app, [str(word) for word in words])
    told = capsys.readouterr().err
    assert done.value.code == 2
    (sentence,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert re.search(r"no space left on that disk|make room", sentence)
    assert "Errno" not in told
    assert "Traceback" not in told
    left = disk.files()
    assert not [name for name in left if "partial" in name]
    for path in checkpoint.list_checkpoints(output / "checkpoints"):
        assert checkpoint.load(path)["step"] > 0  # whole
    for row in read_rows(output):
        assert row["kind"] in ("start", "step", "epoch")
    if what in ("the lock", "the configuration"):
        assert left == []
    if what in ("a checkpoint", "the second checkpoint", "later"):
        assert "top-1" in told  # what was found is shown
