"""Two gloo processes do what one process does, and nothing is counted twice."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
import warm
from conftest import free_port, shared
from ranks import assert_same_to_rounding, reports
from torch import nn

from pss.runs import checkpoint
from pss.training.parts import Parts

HERE = Path(__file__).parents[1]
SETTINGS = [
    "model.embed_dim=24", "model.depth=2", "model.qkv_bias=qv", "train.batch_size=16", "train.epochs=7",
    "train.max_steps=20", "train.log_every_steps=2", "optim.warmup_epochs=1", "schedule.period_steps=9",
]  # fmt: skip


def torchrun(*options):
    return [sys.executable, "-m", "torch.distributed.run", *options]


def script(data, output, *settings):
    return [str(HERE / "distributed_run.py"), str(data), str(output), *SETTINGS, *settings]


environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}


def launch(processes, data, output, *settings):
    return ranks.launch(processes, data, output, *SETTINGS, *settings)


@pytest.fixture(scope="module")
def runs(image_root, tmp_path_factory):
    def make(output):
        launch(1, image_root, output / "one")
        launch(2, image_root, output / "two")

    with shared(tmp_path_factory, "distributed", make) as output:
        yield output, reports(output / "one", 1), reports(output / "two", 2)


def test_rho_is_the_same_on_both_ranks_and_as_in_one_process(runs):
    _, (one,), two = runs
    rhos = [[rho for rho, _ in rank["seen"]] for rank in (one, *two)]
    assert rhos[0] == rhos[1] == rhos[2] == (3 * [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.8, 0.6, 0.4])[:20]


def test_the_ranks_share_the_batches_of_one_process(runs):
    _, (one,), (first, second) = runs
    for (_, whole), (_, left), (_, right) in zip(one["seen"], first["seen"], second["seen"], strict=True):
        assert left + right == whole


def test_two_processes_equal_one(runs):
    """After 20 steps."""
    output, (one,), two = runs
    assert_same_to_rounding(output / "one", output / "two")
    assert two[0]["digest"] == two[1]["digest"]
    for key in ("loss", "val_loss"):
        assert two[0]["row"][key] == pytest.approx(one["row"][key], abs=1e-5)


def test_validation_counts_every_image_once(runs):
    _, (one,), two = runs
    assert one["num_val"] == two[0]["num_val"] == 23  # odd, so the ranks have unequal shares
    assert two[0]["row"]["top1"] == two[1]["row"]["top1"] == pytest.approx(one["row"]["top1"])


def test_two_processes_resume_bit_identically(image_root, runs, tmp_path):
    output, _, _ = runs
    launch(2, image_root, tmp_path, "train.max_steps=4")
    launch(2, image_root, tmp_path)
    resumed = checkpoint.load_latest(tmp_path / "checkpoints")[0]
    straight = checkpoint.load_latest(output / "two" / "checkpoints")[0]
    assert resumed["step"] == straight["step"] == 20
    for name, weight in straight["method"].items():
        assert torch.equal(resumed["method"][name], weight), name


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.exhaustive
def test_four_processes_resume_bit_identically(image_root, tmp_path, parallel):
    """The order in which they add up gradients, which two have no choice of, is that of the first step on."""
    words = [f"train.parallel={parallel}", "optim.warmup_epochs=0"]
    launch(4, image_root, tmp_path / "straight", *words, "train.max_steps=8")
    for stop in (4, 8):
        launch(4, image_root, tmp_path / "resumed", *words, f"train.max_steps={stop}")
    assert_same_weights(tmp_path / "straight", tmp_path / "resumed")


def assert_same_weights(left, right):
    states = [checkpoint.load_latest(folder / "checkpoints")[0] for folder in (left, right)]
    assert states[0]["step"] == states[1]["step"]
    for name, weight in states[0]["method"].items():
        assert torch.equal(states[1]["method"][name], weight), name


RANDOM = [
    "model.drop_path_rate=0.2", "model.sort=random", "loss.mixup=0.8", "loss.cutmix=1", "loss.label_smoothing=0.1",
    "data.rand_augment=rand-m9-mstd0.5-inc1", "data.erasing=0.5", "train.ema_decay=0.9", "optim.clip_grad=1",
    "train.max_steps=8",
]  # fmt: skip
GROWING = ["data.progressive.start_size=16", "data.progressive.begin_epoch=1", "data.progressive.end_epoch=2"]


@pytest.mark.parametrize(
    ("processes", "parts", "words"),
    [
        (1, 2, ["data.repeats=3", *GROWING, "data.progressive.multiple=8"]),
        pytest.param(1, 4, ["data.decode_once=2", "loss.mix_mode=elem"], marks=pytest.mark.exhaustive),
        pytest.param(2, 2, ["data.repeats=2", "loss.mix_mode=elem"], marks=pytest.mark.exhaustive),
    ],
)
def test_processes_in_parts_are_as_many_processes_and_skip_what_one_cannot_compute(
    image_root, tmp_path, processes, parts, words
):
    """With everything that draws random numbers: a part draws those of the process that it stands for."""
    words = [*RANDOM, *words, "nan=1:4"]
    some = launch(processes, image_root, tmp_path / "some", *words, f"train.accumulate={parts}")
    many = launch(processes * parts, image_root, tmp_path / "many", *words)
    assert {report["skipped"] for report in (*some, *many)} == {1}
    assert len({report["digest"] for report in many}) == 1
    assert_same_to_rounding(tmp_path / "some", tmp_path / "many")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_part_sees_the_buffers_of_the_process_that_it_stands_for(world_size):
    """Of DDP's processes: all begin a step with the first one's."""
    torch.manual_seed(0)
    together, alone = (nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)) for _ in range(2))
    for _ in range(3):
        batches = torch.randn(3, 8, 3).unbind()
        computed = Parts(together, 3)
        for number, batch in enumerate(batches):
            with computed.part(number):
                if number == 0 and world_size == 2:
                    together[0].running_var.copy_(alone[0].running_var)  # as DDP does on all but the first process
                before = together[0].running_var.clone()
                together(batch)
                assert torch.equal(before, alone[0].running_var)
        alone(batches[0])
        assert together[0].num_batches_tracked == alone[0].num_batches_tracked
        torch.testing.assert_close(together[0].running_mean, alone[0].running_mean, rtol=0, atol=0)
        if world_size == 2:
            together[0].running_var.fill_(7)


def test_other_processes_go_on_from_the_end_of_an_epoch_and_say_so(image_root, runs, tmp_path):
    output, _, _ = runs
    launch(2, image_root, tmp_path, "train.max_steps=4")
    (one,) = launch(1, image_root, tmp_path)
    assert one["moved"] == (
        "processes 2 before and 1 now: the run goes on from the end of an epoch, step 3, and not from step 4"
    )
    assert len(one["seen"]) == 20 - 3
    assert_same_to_rounding(output / "one", tmp_path)


@pytest.mark.exhaustive
def test_a_dead_rank_ends_the_job_and_torchrun_begins_it_again(image_root, runs, tmp_path):
    output, _, _ = runs
    command = torchrun("--standalone", "--nproc-per-node=2", "--max-restarts=1")
    command += script(image_root, tmp_path, "kill=1:5")
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "killed").exists()
    assert_same_weights(output / "two", tmp_path)


def test_a_rank_that_hangs_ends_the_job_within_the_timeout(image_root, tmp_path):
    """Without torchrun, which would end the others by itself."""
    processes = []
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for rank in range(2):
        own = environment | meet | {"RANK": str(rank)}
        command = [sys.executable, *script(image_root, tmp_path, "train.timeout_seconds=4", "hang=1:4")]
        processes.append(warm.Popen(command, env=own, stderr=subprocess.PIPE, text=True))
    try:
        _, told = processes[0].communicate(timeout=120)
        assert processes[0].returncode not in (0, None)
        assert "imed out" in told or "imeout" in told
    finally:
        processes[1].kill()
        processes[1].communicate()
    assert checkpoint.load_latest(tmp_path / "checkpoints")[0]["step"] == 3


@pytest.mark.exhaustive
def test_two_nodes_are_two_processes(image_root, runs, tmp_path):
    """The line of docs/cluster.md, with both nodes on this machine."""
    output, _, _ = runs
    guide = (HERE.parent / "docs" / "cluster.md").read_text()
    line = next(line for line in guide.splitlines() if line.startswith("torchrun --nnodes 2 "))
    options, _, _ = line.removeprefix("torchrun ").partition(" --no-python pss-train")
    words = options.replace("--nproc-per-node 8", "--nproc-per-node 1").replace(
        "NODE0:29400", f"127.0.0.1:{free_port()}"
    )
    command = torchrun(*words.split()) + script(image_root, tmp_path)
    agents = [
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        for _ in range(2)
    ]
    try:
        told = [agent.communicate(timeout=150)[1] for agent in agents]
        assert [agent.returncode for agent in agents] == [0, 0], told
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
    assert_same_weights(output / "two", tmp_path)


@pytest.fixture(scope="module")
def sharded(image_root, tmp_path_factory):
    def make(output):
        launch(2, image_root, output, "train.parallel=fsdp", *SHARDED)

    with shared(tmp_path_factory, "sharded", make) as output:
        yield output, reports(output, 2)


SHARDED = ["train.ema_decay=0.9", "optim.clip_grad=0.5", "train.checkpoint_every_minutes=0.0001"]


def test_sharded_processes_learn_what_whole_ones_do(image_root, sharded, tmp_path):
    output, reports = sharded
    launch(2, image_root, tmp_path, *SHARDED)
    states = [checkpoint.load_latest(folder / "checkpoints")[0] for folder in (tmp_path, output)]
    for part in ("method", "ema"):
        for name, weight in states[0][part].items():
            torch.testing.assert_close(states[1][part][name], weight, atol=1e-5, rtol=0)
    (whole,), (shards,) = ([state["optimizer"]["state"].values()] for state in states)
    for values, others in zip(whole, shards, strict=True):
        assert {name: value.shape for name, value in values.items()} == {n: v.shape for n, v in others.items()}
    assert reports[0]["row"]["top1"] == reports[1]["row"]["top1"]
    assert (output / "augmented.png").is_file()


@pytest.fixture(scope="module")
def stopped(image_root, tmp_path_factory):
    def make(output):
        launch(2, image_root, output, "train.parallel=fsdp", "train.max_steps=4", *SHARDED)

    with shared(tmp_path_factory, "stopped", make) as output:
        yield output


@pytest.mark.exhaustive
def test_sharded_processes_resume_bit_identically(image_root, sharded, stopped, tmp_path):
    output, _ = sharded
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    launch(2, image_root, tmp_path, "train.parallel=fsdp", *SHARDED)
    assert_same_weights(output, tmp_path)


def test_sharded_processes_validate_in_step(image_root, tmp_path):
    """23 images in batches of 11 on two processes: one has two batches, the other one. Parts and a skipped step too."""
    words = ["train.batch_size=44", "train.max_steps=2", "train.accumulate=2", "optim.warmup_epochs=0", "nan=1:1"]
    reports = launch(2, image_root, tmp_path, "train.parallel=fsdp", *words)
    assert [report["skipped"] for report in reports] == [1, 1]
    launch(2, image_root, tmp_path / "whole", *words)
    assert_same_to_rounding(tmp_path / "whole", tmp_path)
    assert reports[0]["num_val"] == 23


def test_whole_and_sharded_runs_continue_each_other(image_root, sharded, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    first, _ = launch(2, image_root, tmp_path, *SHARDED)
    assert first["moved"].startswith(
        "parallel fsdp before and ddp now: the run goes on from the end of an epoch, step 3"
    )
    assert_same_to_rounding(sharded[0], tmp_path)


def test_a_process_that_loses_another_says_so_in_a_sentence(image_root, tmp_path):
    """The command itself, two of it, without torchrun; one is killed."""
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = [word for setting in (*SETTINGS[:3], "train.epochs=4000") for word in ("--set", setting)]
    command = [
        sys.executable,
        "-m",
        "cli.train",
        "digits",
        "--data",
        str(image_root),
        "--output",
        str(tmp_path / "run"),
    ]
    processes = [
        warm.Popen(
            [*command, "--loader", "torch", *words],
            env=environment | meet | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "run" / "checkpoints").is_dir() and time.monotonic() < deadline:
            time.sleep(0.1)
        processes[1].kill()
        _, told = processes[0].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode == 1
    assert "Traceback" not in told
    assert told.splitlines()[-1].startswith("error: process 0 has lost another one")
    assert checkpoint.load_latest(tmp_path / "run" / "checkpoints") is not None
