"""`distributed_run.py` on some processes, as torchrun would start them, and what may differ between two such runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import warm
from conftest import free_port

from pss.runs import checkpoint

HERE = Path(__file__).parent


def launch(processes: int, data: Path, output: Path, *words: str, path: str = "") -> list[dict[str, Any]]:
    """What each rank tells of its run. `path` is put before PYTHONPATH."""
    command = [sys.executable, str(HERE / "distributed_run.py"), str(data), str(output), *words]
    meet = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    meet["OMP_NUM_THREADS"] = "1"
    found = os.pathsep.join(filter(None, (path, str(HERE.parent))))
    ranks = [os.environ | meet | {"RANK": str(rank), "PYTHONPATH": found} for rank in range(processes)]
    started = [warm.Popen(command, env=own, stderr=subprocess.PIPE, text=True) for own in ranks]
    try:
        told = [process.communicate(timeout=200)[1] for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert [process.returncode for process in started] == [0] * processes, "\n".join(told)[-5000:]
    return reports(output, processes)


def reports(output: Path, processes: int) -> list[dict[str, Any]]:
    """What each rank of a run that has ended told."""
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(processes)]


def assert_same_to_rounding(left: Path, right: Path) -> None:
    states = [checkpoint.load_latest(folder / "checkpoints")[0] for folder in (left, right)]
    assert states[0]["step"] == states[1]["step"]
    for name, weight in states[0]["method"].items():
        torch.testing.assert_close(states[1]["method"][name], weight, atol=1e-5, rtol=0)
