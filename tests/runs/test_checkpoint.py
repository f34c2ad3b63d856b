"""Checkpoints: nothing half-written is ever taken for whole, and nothing unreadable is written."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import warm

from pss.runs import checkpoint, records
from pss.runs.writer import Writer


def save(folder, step, keep=3):
    return checkpoint.save(folder, {"step": step, "w": torch.full((1000,), float(step))}, step=step, keep=keep)


def test_the_newest_whole_checkpoint_is_used(tmp_path):
    for step in (1, 2, 3):
        newest = save(tmp_path, step)
    state, path = checkpoint.load_latest(tmp_path)
    assert path == newest
    assert state["step"] == 3
    assert torch.equal(state["w"], torch.full((1000,), 3.0))


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    content = bytearray(newest.read_bytes())
    if damage == "truncate":
        content = content[: len(content) // 2]
    elif damage == "flip":
        content[len(content) // 2] ^= 1
    else:
        content = bytearray()
    newest.write_bytes(content)
    state, used = checkpoint.load_latest(tmp_path)
    assert state["step"] == 1
    (said,) = caplog.messages
    assert said.startswith(f"{newest} is damaged: its content does not match the hash in its name")
    assert said.endswith(f"{used.name} is used in its place")
    used.write_bytes(b"")
    with pytest.raises(ValueError, match=r"is damaged.*is damaged.*there is no other"):
        checkpoint.load_latest(tmp_path)


def test_only_the_newest_are_kept(tmp_path):
    for step in range(6):
        save(tmp_path, step, keep=2)
    assert [int(path.name.split("-")[1]) for path in checkpoint.list_checkpoints(tmp_path)] == [5, 4]
    assert len(list(tmp_path.iterdir())) == 2


def steps(folder):
    return [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(folder)]


def test_the_best_and_the_newest_of_an_epochs_end_are_kept_too(tmp_path):
    scores = {4: 50.0, 8: 70.0, 12: 70.0, 16: 60.0}
    state = {"w": torch.zeros(3)}
    for step in range(1, 20):
        checkpoint.save(tmp_path, {**state, "step": step}, step=step, keep=2, epoch_steps=4)
        if step in scores:
            checkpoint.note_best(tmp_path, step=step, continuation=0, score=scores[step], weights="ema")
    assert steps(tmp_path) == [19, 18, 16, 8]
    best = checkpoint.best(tmp_path)
    assert checkpoint.load(best)["step"] == 8
    noted = {"file": best.name, "step": 8, "score": 70.0, "weights": "ema"}
    assert json.loads((tmp_path / "best.json").read_text()) == {**records.STAMP, **noted}
    assert checkpoint.load_latest(tmp_path, lambda step: step % 4 == 0)[0]["step"] == 16
    for content in ("{", "[]", "{}"):
        (tmp_path / "best.json").write_text(content)
        assert checkpoint.best(tmp_path) is None
    checkpoint.save(tmp_path, {**state, "step": 20}, step=20, keep=2, epoch_steps=4)
    checkpoint.note_best(tmp_path, step=20, continuation=0, score=1.0, weights="method")
    assert checkpoint.load(checkpoint.best(tmp_path))["step"] == 20
    assert steps(tmp_path) == [20, 19]


def test_the_writer_saves_what_was_there_when_it_was_asked(tmp_path, monkeypatch):
    """In the order it was asked, one at a time, while the weights move on."""
    (tmp_path / ".partial-123").write_bytes(b"of a killed process")
    release, begun, original = threading.Event(), [], checkpoint.save

    def slow(folder, state, *, step, **options):
        begun.append(step)
        assert release.wait(20)
        return original(folder, state, step=step, **options)

    monkeypatch.setattr(checkpoint, "save", slow)
    writer = Writer(tmp_path, keep=5)
    assert list(tmp_path.iterdir()) == []
    weights = torch.zeros(4)
    writer.save({"w": weights, "nested": [{"w": weights[:2]}]}, step=1)
    weights += 1  # training goes on
    assert not steps(tmp_path)
    threading.Timer(0.2, release.set).start()
    writer.save({"w": weights, "nested": [{"w": weights[:2]}]}, step=2)  # waits for the first
    assert steps(tmp_path) == [1]
    writer.wait()
    writer.close()
    assert (begun, steps(tmp_path)) == ([1, 2], [2, 1])
    for path, value in zip(reversed(checkpoint.list_checkpoints(tmp_path)), (0.0, 1.0), strict=True):
        state = checkpoint.load(path)
        assert state["w"].tolist() == [value] * 4
        assert state["nested"][0]["w"].tolist() == [value] * 2


@pytest.fixture
def limited():
    """Files may not grow beyond 100 kB, as on a disk that has no more room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_earlier_checkpoints_alone(tmp_path, limited, caplog):
    small = checkpoint.save(tmp_path, {"w": torch.zeros(10)}, step=1, keep=1)
    writer = Writer(tmp_path, keep=1)
    writer.save({"w": torch.zeros(100_000)}, step=2)
    message = rf"checkpoint of step 2 cannot be written to {tmp_path} \(File too large; .* GB are free"
    with pytest.raises(OSError, match=rf"{message}.*{small.name} is untouched.*--resume"):
        writer.save({"w": torch.zeros(10)}, step=3)  # the next one tells
    assert [path.name for path in tmp_path.iterdir()] == [small.name]
    assert checkpoint.load(small)["w"].tolist() == [0.0] * 10
    writer.save({"w": torch.zeros(100_000)}, step=4)
    writer.close()  # something else ended the run
    assert "checkpoint of step 4 cannot be written" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [small.name]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_no_space_left_is_told_as_such(tmp_path):
    """Through the same calls: the file that is written to is on a device without room."""
    small = checkpoint.save(tmp_path, {"w": torch.zeros(10)}, step=1, keep=1)
    (tmp_path / f".partial-{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device"):
        checkpoint.save(tmp_path, {"w": torch.zeros(100_000)}, step=2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [small.name]


def test_a_disk_that_really_is_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk takes rights that this process has not")
    try:
        small = checkpoint.save(disk, {"w": torch.zeros(10)}, step=1, keep=1)
        message = rf"written to {disk} \(No space left on device; 0\.00 of 0\.00 GB are free.*{small.name} is untouched"
        with pytest.raises(OSError, match=message):
            checkpoint.save(disk, {"w": torch.zeros(1_000_000)}, step=2, keep=1)
        assert [path.name for path in disk.iterdir()] == [small.name]
        assert checkpoint.load_latest(disk)[0]["w"].tolist() == [0.0] * 10
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_no_checkpoint_is_no_error(tmp_path):
    assert checkpoint.load_latest(tmp_path / "none") is None


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path):
    path = tmp_path / "step.pt"
    torch.save({"w": Fraud(tmp_path / "executed")}, path)
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(path)
    assert not (tmp_path / "executed").exists()


class Fraud:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (self.path.touch, ())


def test_kill_while_saving_leaves_a_whole_checkpoint(tmp_path):
    """A process that does nothing but save is killed again and again; whatever is left must load."""
    code = (
        "import sys, torch; from pathlib import Path; from pss.runs import checkpoint; step = int(sys.argv[2])\n"
        "while True:\n"
        "    step += 1\n"
        "    state = {'step': step, 'w': torch.full((1_000_000,), float(step))}\n"
        "    checkpoint.save(Path(sys.argv[1]), state, step=step, keep=2); print(step, flush=True)\n"
    )
    last = 0
    for delay in (0.005, 0.02, 0.033):
        with warm.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(last)], stdout=subprocess.PIPE, text=True
        ) as process:
            told = int(process.stdout.readline())
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        state, _ = checkpoint.load_latest(tmp_path)
        assert state["step"] >= told > last
        assert torch.equal(state["w"], torch.full((1_000_000,), float(state["step"])))
        last = state["step"]


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    with pytest.raises(AssertionError, match=r"state\.a\[0\]\.b is a <class 'torch.torch_version.TorchVersion'>"):
        checkpoint.save(tmp_path, {"a": [{"b": torch.__version__}]}, step=0, keep=1)
    assert not list(tmp_path.iterdir())
