"""A run goes on from its newest checkpoint, and tells of all of it, wherever and however often it was stopped."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal

import pytest
import torch
from memory_loader import MemoryLoader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import CLASSES, HERE, SETTINGS, assert_same, final_state, trainer

from pss import recipes
from pss.inference.opening import load_run
from pss.runs import checkpoint, records
from pss.runs.log import ABANDONED, read_rows
from pss.training.reporting import Reporter
from pss.training.saving import Saver
from pss.training.setup import Interrupted
from pss.training.trainer import Trainer

STEPS = 5  # of an epoch
SETTLED = ("time", "train_seconds", "images_per_second", "data_wait", "saved_time", "saved_share")


def run(output, *settings, kill_in=None, kill_in_validation=None, backend="memory"):
    """A trainer whose process is told to stop when it loads the batches of these numbers."""
    config = recipes.get("digits").with_settings([*SETTINGS, *settings])
    numbers = itertools.count()

    def stop_training(step):
        if step == kill_in:
            os.kill(os.getpid(), signal.SIGTERM)

    def stop_validation(_):
        if next(numbers) == kill_in_validation:
            os.kill(os.getpid(), signal.SIGTERM)

    train = MemoryLoader(on_batch=stop_training)
    train.state_dict = lambda: {"num_samples": 40, "backend": backend}
    train.load_state_dict = lambda state: None
    val = MemoryLoader(train=False, on_batch=stop_validation, batch_size=4)
    return Trainer(config, train, val, classes=CLASSES, output=output, world=HERE)


def stopped(trainer):
    with pytest.raises(Interrupted):
        trainer.fit()
    return trainer


def steps(output):
    return [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(output / "checkpoints")]


def shown(output, tag="epoch/top1"):
    board = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return [event.step for event in board.Scalars(tag)]


def told(output, kind):
    """Rows without what the clock decides."""
    rows = read_rows(output, kind)
    for row in rows:
        for level in row.get("by_rho", {}).values():
            del level["ms_per_step"], level["data_wait"]
    return [{name: value for name, value in row.items() if name not in SETTLED} for row in rows]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    output = tmp_path_factory.mktemp("straight")
    run(output).fit()
    return output


@pytest.mark.parametrize(
    ("change", "backend"), [(["train.accumulate=2"], "memory"), (["train.accumulate=4"], "memory"), ([], "other")]
)
def test_a_run_that_went_back_goes_on_from_its_own_newest_checkpoint(tmp_path, change, backend):
    stopped(run(tmp_path, kill_in=8))
    assert steps(tmp_path) == [9, 5]
    first = stopped(run(tmp_path, *change, kill_in=5, backend=backend))
    assert "step 5, and not from step 9" in first.moved
    assert steps(tmp_path) == [6, 5]
    assert [checkpoint.step_of(path) for path in (tmp_path / "checkpoints" / "abandoned").iterdir()] == [9]
    second = stopped(run(tmp_path, *change, kill_in=7, backend=backend))
    assert (second.moved, second.saver.continuation) == (None, 1)
    assert steps(tmp_path)[0] == 8
    back = run(tmp_path, kill_in=6)  # as it was at first: another continuation, and again from the epoch's end
    assert (back.step, back.saver.continuation) == (5, 2)
    stopped(back)
    assert steps(tmp_path) == [7, 5]
    finished = run(tmp_path)
    assert finished.step == 7
    finished.fit()
    assert [row["step"] for row in read_rows(tmp_path, "epoch")] == [5, 10, 15, 20]
    assert [row["continuation"] for row in read_rows(tmp_path, "start")][-1] == 2


def test_what_was_not_saved_yet_abandons_nothing(tmp_path, straight):
    """A start with other parts that dies before its first checkpoint changes nothing for the run as it was."""
    stopped(run(tmp_path, kill_in=8))

    class Crash(Exception):
        pass

    moved = run(tmp_path, "train.accumulate=2")

    def crash(step):
        raise Crash

    moved.train_loader.on_batch = crash
    with pytest.raises(Crash):
        moved.fit()
    again = run(tmp_path)
    assert (again.step, again.moved) == (9, None)
    again.fit()
    assert_same(final_state(tmp_path)["method"], final_state(straight)["method"])


def test_the_best_of_what_was_abandoned_is_best_no_more(tmp_path):
    run(tmp_path, "train.max_steps=8").fit()
    checkpoint.note_best(tmp_path / "checkpoints", step=8, continuation=0, score=101.0, weights="method")
    stopped(run(tmp_path, "train.accumulate=2", kill_in=5))
    noted = checkpoint.read_best(tmp_path / "checkpoints")
    assert noted is None or noted["step"] <= 5


@pytest.mark.parametrize("places", [(1,), (0, 2, 3), (7, 8, 12, 13)])
def test_rows_are_of_the_whole_epoch_wherever_it_was_stopped(tmp_path, straight, places):
    for place in places:
        stopped(run(tmp_path, kill_in=place))
    before = json.loads((tmp_path / "summary.json").read_text())["train_seconds"]
    run(tmp_path).fit()
    for kind in ("step", "epoch"):
        assert told(tmp_path, kind) == told(straight, kind)
    assert all(sum(level["steps"] for level in row["by_rho"].values()) == STEPS for row in told(tmp_path, "epoch"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    seconds = [row["train_seconds"] for row in read_rows(tmp_path, "epoch")]
    assert summary["train_seconds"] == pytest.approx(sum(seconds))
    assert before < sum(seconds)
    assert shown(tmp_path) == [5, 10, 15, 20]
    assert shown(tmp_path, "step/loss") == list(range(2, 21, 2))


def test_a_stop_by_max_steps_is_no_epoch_and_the_epoch_is_whole_afterwards(tmp_path, straight):
    for stop in (3, 5, 12):
        run(tmp_path, f"train.max_steps={stop}").fit()
    run(tmp_path).fit()
    rows = told(tmp_path, "epoch")
    assert [(row["step"], row["complete"]) for row in rows] == [
        (3, False), (5, True), (10, True), (12, False), (15, True), (20, True),
    ]  # fmt: skip
    assert [row for row in rows if row["complete"]] == told(straight, "epoch")
    assert shown(tmp_path) == [3, 5, 10, 12, 15, 20]


@pytest.mark.parametrize("kill_in", [None, 4, 9, 19])
def test_what_is_saved_of_the_end_of_an_epoch_has_its_row(tmp_path, straight, monkeypatch, kill_in):
    """Which others could not make, as sums are kept by process; also where the run is stopped in its last step."""
    saved, original = [], Saver.save

    def save(self, *, step, epoch, measured, **more):
        saved.append((step, epoch, measured["pending"]))
        original(self, step=step, epoch=epoch, measured=measured, **more)

    monkeypatch.setattr(Saver, "save", save)
    often = "train.checkpoint_every_minutes=1e-9"
    if kill_in is not None:
        stopped(run(tmp_path, often, kill_in=kill_in))
        assert steps(tmp_path)[0] == kill_in + 1
    run(tmp_path, often).fit()
    ends = [(step // STEPS, epoch, pending) for step, epoch, pending in saved if step % STEPS == 0]
    assert [number for number, _, _ in ends] == [1, 2, 3, 4]
    assert all(epoch == number == pending["epoch"] for number, epoch, pending in ends)
    for kind in ("step", "epoch"):
        assert told(tmp_path, kind) == told(straight, kind)


@pytest.mark.parametrize("batch", [0, 3, 11, 15])
def test_a_stop_in_validation_is_noticed_within_a_batch_and_the_epoch_is_saved(tmp_path, straight, batch):
    """Ten batches an epoch of the weights, then ten of their average."""
    begun = []
    first = run(tmp_path, kill_in_validation=batch)
    original = first.val_loader.on_batch
    first.val_loader.on_batch = lambda number: (begun.append(number), original(number))
    stopped(first)
    assert len(begun) == batch + 1
    assert steps(tmp_path) == [5]
    assert read_rows(tmp_path, "epoch") == []
    run(tmp_path).fit()
    assert told(tmp_path, "epoch") == told(straight, "epoch")
    assert shown(tmp_path) == [5, 10, 15, 20]
    assert_same(final_state(tmp_path)["method"], final_state(straight)["method"])


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_around_an_epochs_row_neither_loses_nor_repeats_it(tmp_path, straight, monkeypatch, when):
    original = Reporter.epoch

    class Crash(Exception):
        pass

    def crash(self, validation, where):
        if self.pending["step"] == 10:
            if when == "after":
                original(self, validation, where)
            raise Crash
        return original(self, validation, where)

    monkeypatch.setattr(Reporter, "epoch", crash)
    with pytest.raises(Crash):
        run(tmp_path).fit()
    monkeypatch.undo()
    run(tmp_path).fit()
    assert told(tmp_path, "epoch") == told(straight, "epoch")
    assert shown(tmp_path) == [5, 10, 15, 20]
    best = [json.loads((output / "checkpoints" / "best.json").read_text()) for output in (tmp_path, straight)]
    assert best[0]["step"] == best[1]["step"]


@pytest.mark.parametrize(
    ("spoilt", "named"),
    [
        (b'{"kind": "step", "step": 12, "epoch": 1, "rh', "line 18"),
        (b'{"kind": "step", "st\n\0\0\0\0\0\n\n[1, 2]\n{"a": 1}\n"text"\n', "line 18 and 3 more"),
        (
            b'\xff\xfe{"kind"\n{"kind": 3, "step": "x"}\n{"kind": "step", "step": -1}\n' + b"[" * 100_000,
            "line 18 and 3",
        ),
    ],
)
def test_lines_that_are_no_rows_cost_nothing_and_are_named(tmp_path, straight, caplog, spoilt, named):
    shutil.copytree(straight, tmp_path / "run")
    assert len(read_rows(straight)) == 15
    with (tmp_path / "run" / "log.jsonl").open("ab") as file:
        file.write(b"\n\n" + spoilt)
    assert read_rows(tmp_path / "run") == read_rows(straight)
    assert f"log.jsonl: {named}" in caplog.text
    assert run(tmp_path / "run").fit()["step"] == 20
    assert [row for row in read_rows(tmp_path / "run") if row["kind"] != "start"] == [
        row for row in read_rows(straight) if row["kind"] != "start"
    ]


def test_a_first_try_that_was_killed_is_shown_no_more_but_its_rows_are_kept(tmp_path):
    class Crash(Exception):
        pass

    def crash(step):
        if step == 4:
            raise Crash

    with pytest.raises(Crash):
        trainer(tmp_path, "train.log_every_steps=1", on_batch=crash).fit()
    assert shown(tmp_path, "step/loss") == [1, 2, 3, 4]
    run(tmp_path, "train.log_every_steps=1", "train.max_steps=6").fit()
    assert shown(tmp_path, "step/loss") == [1, 2, 3, 4, 5, 6]
    kept = [json.loads(line) for line in (tmp_path / ABANDONED).read_text().splitlines()]
    assert [row["step"] for row in kept if row["kind"] == "step"] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "other",
    ["optim.lr=0.1", "train.seed=3", "model.embed_dim=48", "model.depth=1", "train.ema_decay=0.5", "data.flip=0"],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, straight, other):
    shutil.copytree(straight / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=rf"is of a run with other settings \(there, here\): {other.split('=')[0]} "):
        run(tmp_path, other)
    config = recipes.get("digits").with_settings([*SETTINGS, other])
    records.write(tmp_path / "config.json", config.to_dict())
    with pytest.raises(ValueError, match=rf"is of a run with other settings .*{other.split('=')[0]} "):
        load_run(tmp_path, torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 99, "version": "7.0"}, r"written by a later version of pss \(7\.0, format 99"),
        ({"step": "ten"}, r"edited or damaged \(step: "),
        ({"classes": 4}, r"edited or damaged \(classes: "),
        ({"optimizer": None}, r"edited or damaged \(optimizer: "),
        ({"config": {"recipe": "digits", "flux": 1}}, r"settings that this version of pss does not know"),
    ],
)
def test_a_checkpoint_that_is_not_what_it_was_is_refused(tmp_path, straight, change, words):
    state = final_state(straight) | change
    checkpoint.save(tmp_path / "checkpoints", state, step=20, keep=1)
    with pytest.raises(ValueError, match=words):
        run(tmp_path)
    shutil.copy(straight / "summary.json", tmp_path)
    records.write(tmp_path / "config.json", recipes.get("digits").with_settings(SETTINGS).to_dict())
    with pytest.raises(ValueError, match=words):
        load_run(tmp_path, torch.device("cpu"))


def test_weights_of_other_shapes_under_the_same_settings_are_refused(tmp_path, straight):
    state = final_state(straight)
    state["method"] = {name: value[:1] if "norm" in name else value for name, value in state["method"].items()}
    checkpoint.save(tmp_path / "checkpoints", state, step=20, keep=1)
    with pytest.raises(ValueError, match=r"does not hold the model that its settings describe \(.*it was edited"):
        run(tmp_path)


def test_a_later_versions_files_are_refused_in_a_sentence(tmp_path, straight):
    shutil.copytree(straight, tmp_path / "run")
    records.write(tmp_path / "run" / "config.json", recipes.get("digits").with_settings(SETTINGS).to_dict())
    for name in ("config.json", "checkpoints/best.json"):
        path = tmp_path / "run" / name
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | {"format": 2, "version": "9.9"}))
        with pytest.raises(ValueError, match=rf"{path.name} was written by a later version of pss \(9\.9, format 2"):
            load_run(tmp_path / "run", torch.device("cpu"), best=True)
        path.write_text(before)
    assert load_run(tmp_path / "run", torch.device("cpu"), best=True).step in (5, 10, 15, 20)


@pytest.mark.parametrize("content", ["{", "[1]", '{"file": 3}', '{"file": "../x.pt", "step": 1, "score": 1}', "\0"])
def test_a_best_that_cannot_be_read_is_noted_anew(tmp_path, straight, content):
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "best.json").write_text(content)
    assert checkpoint.best(tmp_path / "run" / "checkpoints") is None
    run(tmp_path / "run").fit()
    assert checkpoint.read_best(tmp_path / "run" / "checkpoints")["step"] == 20


def test_the_best_is_evaluated_with_the_weights_that_were_best(tmp_path):
    output = tmp_path / "run"
    run(output, "train.max_steps=10").fit()
    records.write(
        output / "config.json", recipes.get("digits").with_settings([*SETTINGS, "train.max_steps=10"]).to_dict()
    )
    state = final_state(output)
    for weights, part in (("method", "method"), ("ema", "ema")):
        (output / "checkpoints" / "best.json").unlink(missing_ok=True)
        checkpoint.note_best(output / "checkpoints", step=10, continuation=0, score=1.0, weights=weights)
        opened = load_run(output, torch.device("cpu"), best=True)
        assert_same(opened.method.state_dict(), state[part])
        assert opened.averaged == (weights == "ema")
