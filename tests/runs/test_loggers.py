"""What shows a run's rows: each row once however often the run is resumed, and no run the worse for it."""

from __future__ import annotations

import json
import struct
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from own_logger import CALLS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipelines import extras
from pipelines.base import DataError
from pss import methods, recipes
from pss.api.training import train
from pss.runs import loggers
from pss.runs.log import read_rows
from pss.runtime.processes import World
from pss.sections import LOGGERS
from pss.training.reporting import Reporter

sys.path.append(str(Path(__file__).parents[1] / "training"))
from test_train import assert_same, final_state, trainer

NOTES, FAILING, HANGING = (f"own_logger:{name}" for name in ("Notes", "Failing", "Hanging"))


@pytest.fixture(autouse=True)
def forget():
    CALLS.clear()


def rows_given():
    return [call for call in CALLS if call[0] in ("step", "epoch")]


def test_a_logger_of_ones_own_is_given_all_that_the_log_has(tmp_path):
    trainer(tmp_path, "train.epochs=2", f"train.loggers={NOTES}").fit()
    assert CALLS[0] == ("begin", None, tmp_path.name)
    assert CALLS[1] == ("start", 0)
    assert CALLS[2] == ("picture", "augmented.png", 0)
    assert CALLS[-1] == ("close",)
    assert rows_given() == [(row["kind"], row["step"]) for row in read_rows(tmp_path) if row["kind"] != "start"]
    assert not (tmp_path / "tensorboard").exists()  # it was not named
    assert loggers.keys_of(tmp_path) == {NOTES: "first"}


def cut_short(folder, names):
    """A run that stops at step 14, past its last checkpoint of step 10."""
    run = trainer(folder, f"train.loggers={names}")
    original, calls = run.saver.save, []

    def die(**state):
        calls.append(state["step"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(**state)

    run.saver.save = die
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    run.saver.wait()


def test_no_row_is_shown_twice_after_a_resume(tmp_path):
    """Rows that came after the checkpoint are trained again, and were shown."""
    cut_short(tmp_path, f"{NOTES},tensorboard")
    assert rows_given()[-1] == ("step", 14)
    trainer(tmp_path, f"train.loggers={NOTES},tensorboard").fit()
    assert ("begin", "first", tmp_path.name) in CALLS
    given = rows_given()
    assert len(given) == len(set(given))
    assert set(given) == {(row["kind"], row["step"]) for row in read_rows(tmp_path) if row["kind"] != "start"}
    assert [call for call in CALLS if call[0] == "picture"] == [("picture", "augmented.png", 0)]


def test_a_logger_that_comes_later_is_shown_what_was_before_it(tmp_path):
    trainer(tmp_path, "train.max_steps=7").fit()
    assert CALLS == []
    trainer(tmp_path, "train.max_steps=12", f"train.loggers={NOTES}").fit()
    assert rows_given() == [(row["kind"], row["step"]) for row in read_rows(tmp_path) if row["kind"] != "start"]


def test_a_logger_that_comes_after_a_cut_is_shown_what_is_trained_again(tmp_path):
    cut_short(tmp_path, "tensorboard")
    trainer(tmp_path, f"train.loggers={NOTES}").fit()
    assert rows_given() == [(row["kind"], row["step"]) for row in read_rows(tmp_path) if row["kind"] != "start"]
    assert [call for call in CALLS if call[0] == "picture"] == [("picture", "augmented.png", 0)]


def test_one_that_fails_is_told_once_and_changes_nothing(tmp_path, caplog):
    row = trainer(tmp_path / "a", f"train.loggers={FAILING},{NOTES}").fit()
    trainer(tmp_path / "b").fit()
    assert row["step"] == 20
    warnings = [message for message in caplog.messages if "Failing" in message]
    assert warnings == [f"logger {FAILING} failed (ConnectionError: the server hung up); the run goes on without it"]
    a, b = final_state(tmp_path / "a"), final_state(tmp_path / "b")
    assert_same(a | {"config": b["config"]}, b)
    assert ("epoch", 20) in CALLS  # of the other one


def test_one_that_hangs_is_not_waited_for(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(loggers, "_PATIENCE_SECONDS", 0.2)
    began = time.monotonic()
    trainer(tmp_path, "train.epochs=2", f"train.loggers={HANGING}").fit()
    assert time.monotonic() - began < 200
    assert any("is still sending" in message for message in caplog.messages)
    assert final_state(tmp_path)["step"] == 10


def test_loggers_may_change_where_a_run_is_resumed(tmp_path):
    trainer(tmp_path, "train.max_steps=7", f"train.loggers={NOTES}").fit()
    assert trainer(tmp_path, "train.loggers=").fit()["step"] == 20


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("tensorbord", "there is no logger 'tensorbord'; name tensorboard, wandb, mlflow, or package.module:Class"),
        ("own_logger:NoLogger", r"own_logger:NoLogger is no logger; derive it from pss\.runs\.loggers\.Logger"),
        ("own_logger:Nothing", "has nothing called 'Nothing'"),
        ("no_module:Class", "the module no_module cannot be imported"),
    ],
)
def test_what_is_no_logger_is_refused_before_anything_is_read(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        train("digits", tmp_path / "none", tmp_path / "run", settings=[f"train.loggers={names}"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_an_extra_that_is_missing_is_noticed_before_training(tmp_path, monkeypatch, name):
    monkeypatch.setattr(extras, "find_spec", lambda module: None)
    with pytest.raises(DataError, match=rf"train\.loggers={name} needs {name}; run: pip install "):
        train("digits", tmp_path / "none", tmp_path / "run", settings=[f"train.loggers={name}"])
    assert not (tmp_path / "run").exists()


def test_the_names_of_the_setting_are_those_that_there_are():
    assert set(LOGGERS) == {loggers.TENSORBOARD, *loggers.BUILT_IN}


def test_a_damaged_file_of_keys_begins_anew(tmp_path):
    for content in ("", "[1]", '{"wandb": 3, "format": 1, "version": "1"}'):
        (tmp_path / loggers.STATE).write_text(content)
        assert loggers.keys_of(tmp_path) == {}


def test_tensorboard_has_the_settings(tmp_path):
    trainer(tmp_path, "train.epochs=1", "optim.warmup_epochs=0").fit()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    (shown,) = events.Tensors("settings/text_summary")
    assert "    optim.lr = 0.001\n" in shown.tensor_proto.string_val[0].decode()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["optim.lr"].number_value == recipes.get("digits").optim.lr
    assert hparams["method"].string_value == "sampled"
    assert {scalar.step for scalar in events.Scalars("epoch/top1")} == {5}


# Real packages, offline.


def history_of(folder):
    """What a run has sent to Weights & Biases: by step, all figures, over all its offline files."""
    from wandb.proto import wandb_internal_pb2

    found: list[dict] = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda one: one.stat().st_mtime):
        for content in records_of(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                found.append({(one.key or "/".join(one.nested_key)): json.loads(one.value_json) for one in items})
    return found


def records_of(content):
    """Of LevelDB's log format: blocks of 32 KiB, in them fragments of checksum, length, and whether more follows."""
    place, whole = 7, b""  # after the file's own header
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # all of it, or its last part
            yield whole
            whole = b""


@pytest.mark.parametrize("stops", [(20,), (7, 20)])
def test_weights_and_biases_has_each_row_once(tmp_path, monkeypatch, caplog, stops):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for stop in stops:
        trainer(tmp_path, "train.loggers=wandb", f"train.max_steps={stop}").fit()
    assert not [message for message in caplog.messages if "failed" in message]
    key = loggers.keys_of(tmp_path)["wandb"]
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == len(stops)
    assert {path.stem for path in files} == {f"run-{key}"}  # the same run, continued
    wanted = {kind: [(row["step"], row["loss"]) for row in read_rows(tmp_path, kind)] for kind in ("step", "epoch")}
    deadline = time.monotonic() + 60
    while True:  # its own process goes on writing for a moment, and at the end of ours is waited for
        history = history_of(tmp_path)
        sent = {
            kind: [(row["_step"], row[f"{kind}/loss"]) for row in history if f"{kind}/loss" in row] for kind in wanted
        }
        if sent == wanted or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert sent == wanted
    assert sum(any(name.startswith("augmented") for name in row) for row in history) == 1


@pytest.mark.parametrize("stops", [(20,), (7, 20)])
def test_mlflow_has_each_row_once(tmp_path, monkeypatch, caplog, stops):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    run = tmp_path / "run"
    for stop in stops:
        trainer(run, "train.loggers=mlflow", f"train.max_steps={stop}").fit()
    assert not [message for message in caplog.messages if "failed" in message]
    client = MlflowClient()
    experiment = client.get_experiment_by_name("mine")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == loggers.keys_of(run)["mlflow"]
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    assert found.data.params["optim.lr"] == "0.001"
    for kind in ("step", "epoch"):
        sent = [(one.step, one.value) for one in client.get_metric_history(found.info.run_id, f"{kind}/loss")]
        assert sent == [(row["step"], row["loss"]) for row in read_rows(run, kind)]
    assert [one.path for one in client.list_artifacts(found.info.run_id)] == ["augmented.png"]


def test_a_server_that_is_not_there_ends_nothing(tmp_path, monkeypatch, caplog):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    trainer(tmp_path, "train.epochs=2", "train.loggers=mlflow").fit()
    (warning,) = [message for message in caplog.messages if "mlflow" in message]
    assert "\n" not in warning
    assert warning.endswith("the run goes on without it")
    assert final_state(tmp_path)["step"] == 10


def test_other_processes_have_no_logger(tmp_path):
    """The second process of a run writes nothing, and begins nothing."""
    second = World(rank=1, size=2, device=torch.device("cpu"))
    config = recipes.get("digits").with_settings([f"train.loggers={NOTES}"])
    reporter = Reporter(config, tmp_path, methods.build(config, 4, 5), second)
    reporter.open(step=0, last_step=10, epochs=2)
    reporter.picture(torch.zeros(8, 3, 32, 32), 10, nullcontext())
    reporter.close()
    assert CALLS == []
    assert list(tmp_path.iterdir()) == []
