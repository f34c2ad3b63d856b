"""Two gloo processes under torchrun do what one process does, and nothing is counted twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pss import checkpoint

HERE = Path(__file__).parent
SETTINGS = [
    "model.embed_dim=24", "model.depth=2", "model.qkv_bias=qv", "train.batch_size=16", "train.epochs=4",
    "train.max_steps=9", "train.log_every_steps=2", "optim.warmup_epochs=1", "schedule.period_steps=9",
]  # fmt: skip


def launch(processes, data, output, *settings):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(HERE / "distributed_run.py"), str(data), str(output), *SETTINGS, *settings]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def runs(image_root, tmp_path_factory):
    output = tmp_path_factory.mktemp("distributed")
    one = launch(1, image_root, output / "one")
    two = launch(2, image_root, output / "two")
    return output, one, two


def test_rho_is_the_same_on_both_ranks_and_as_in_one_process(runs):
    _, (one,), two = runs
    rhos = [[rho for rho, _ in rank["seen"]] for rank in (one, *two)]
    assert rhos[0] == rhos[1] == rhos[2] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.8, 0.6, 0.4]


def test_the_ranks_share_the_batches_of_one_process(runs):
    _, (one,), (first, second) = runs
    for (_, whole), (_, left), (_, right) in zip(one["seen"], first["seen"], second["seen"], strict=True):
        assert left + right == whole


def test_two_processes_equal_one(runs):
    output, (one,), two = runs
    states = [checkpoint.load_latest(output / name / "checkpoints")[0] for name in ("one", "two")]
    for name, weight in states[0]["method"].items():
        torch.testing.assert_close(states[1]["method"][name], weight, atol=1e-5, rtol=1e-4)
    assert two[0]["digest"] == two[1]["digest"]
    for key in ("loss", "val_loss"):
        assert two[0]["row"][key] == pytest.approx(one["row"][key], abs=1e-5)


def test_validation_counts_every_image_once(runs):
    _, (one,), two = runs
    assert one["num_val"] == two[0]["num_val"] == 23  # odd, so the ranks have unequal shares
    assert two[0]["row"]["top1"] == two[1]["row"]["top1"] == pytest.approx(one["row"]["top1"])


def test_two_processes_resume_bit_identically(image_root, runs, tmp_path):
    output, _, _ = runs
    launch(2, image_root, tmp_path, "train.max_steps=4", "train.epochs=4")
    launch(2, image_root, tmp_path)
    resumed = checkpoint.load_latest(tmp_path / "checkpoints")[0]
    straight = checkpoint.load_latest(output / "two" / "checkpoints")[0]
    assert resumed["step"] == straight["step"] == 9
    for name, weight in straight["method"].items():
        assert torch.equal(resumed["method"][name], weight), name
