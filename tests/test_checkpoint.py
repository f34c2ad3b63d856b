"""Checkpoints: nothing half-written is ever taken for whole, and nothing unreadable is written."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
import torch

from pss import checkpoint


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
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, damage):
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
    with pytest.warns(UserWarning, match="is damaged"):
        state, _ = checkpoint.load_latest(tmp_path)
    assert state["step"] == 1


def test_only_the_newest_are_kept(tmp_path):
    for step in range(6):
        save(tmp_path, step, keep=2)
    assert [int(path.name.split("-")[1]) for path in checkpoint.list_checkpoints(tmp_path)] == [5, 4]
    assert len(list(tmp_path.iterdir())) == 2


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
        "import sys, torch; from pathlib import Path; from pss import checkpoint; step = int(sys.argv[2])\n"
        "while True:\n"
        "    step += 1\n"
        "    state = {'step': step, 'w': torch.full((1_000_000,), float(step))}\n"
        "    checkpoint.save(Path(sys.argv[1]), state, step=step, keep=2); print(step, flush=True)\n"
    )
    last = 0
    for delay in (0.005, 0.02, 0.033):
        with subprocess.Popen(
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
