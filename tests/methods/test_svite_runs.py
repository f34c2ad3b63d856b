"""Masks that move on two processes, through a `kill -9` and the run that goes on from it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
import warm
from conftest import free_port

from pss.runs import checkpoint

HERE = Path(__file__).parent
RUN = [
    "model.embed_dim=24", "model.depth=2", "model.num_heads=6", "optim.warmup_epochs=1", "data.prefetch_gb=0",
    "train.log_every_steps=1000", "train.ema_decay=0.9", "train.keep_checkpoints=1000",
]  # fmt: skip
KINDS = {
    "SViTE": ["svite.interval=1", "svite.keep=0.5", "data.flip=0.5"],
    "S2ViTE": ["s2vite.interval=1", "s2vite.head_density=0.5"],
}


def killed(data, output, *words):
    """Two processes, of which one is killed on its way; the other fails with it."""
    command = [sys.executable, str(HERE.parent / "distributed_run.py"), str(data), str(output), *words]
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    found = os.pathsep.join((str(HERE), str(HERE.parents[1])))
    started = [
        warm.Popen(command, env=os.environ | meet | {"RANK": str(rank), "PYTHONPATH": found}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        for process in started:
            process.communicate(timeout=200)
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert started[1].returncode == -9
    assert started[0].returncode != 0


@pytest.mark.parametrize(
    ("kind", "batch", "epochs", "killed_at", "updates"),
    [
        ("SViTE", 16, 10, 13, 23),
        pytest.param("SViTE", 2, 25, 333, 519, marks=pytest.mark.exhaustive),
        pytest.param("S2ViTE", 2, 25, 333, 519, marks=pytest.mark.exhaustive),
    ],
)
def test_counts_stay_through_a_killed_process_and_masks_are_alike(
    image_root, tmp_path, kind, batch, epochs, killed_at, updates
):
    """`counting.py` looks at the counts after every update."""
    words = [*RUN, f"method=counting:{kind}", *KINDS[kind], f"train.batch_size={batch}", f"train.epochs={epochs}"]
    killed(image_root, tmp_path, *words, f"kill=1:{killed_at}")
    began = checkpoint.load_latest(tmp_path / "checkpoints")[0]
    two = ranks.launch(2, image_root, tmp_path, *words, path=str(HERE))
    assert len({rank["buffers"] for rank in two}) == len({rank["digest"] for rank in two}) == 1
    state = checkpoint.load_latest(tmp_path / "checkpoints")[0]
    assert 0 < began["step"] <= killed_at < state["step"]
    assert int(state["method"]["updates_made"]) == updates
    masks = {name: mask for name, mask in state["method"].items() if name.startswith("masks.")}
    for path in checkpoint.list_checkpoints(tmp_path / "checkpoints"):
        for which in ("method", "ema"):
            other = checkpoint.load(path)[which]
            assert all(int(other[name].sum()) == int(mask.sum()) for name, mask in masks.items())
    assert sum(not torch.equal(began["method"][name], mask) for name, mask in masks.items()) > len(masks) // 3
