"""The SLURM script, with stand-ins for SLURM's own commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def batch(tmp_path):
    """Runs the script as SLURM would, with `srun` doing what `body` says; returns its exit code and SLURM's calls."""

    def run(body, *arguments):
        commands = tmp_path / "bin"
        commands.mkdir(exist_ok=True)
        scontrol = f'echo "$@" >> {tmp_path}/calls\n[ "$1" = show ] && printf "localhost\\nother\\n"\nexit 0\n'
        torchrun = f'exec {sys.executable} -m torch.distributed.run "$@"\n'
        train = f'exec {sys.executable} -m cli.train "$@"\n'
        for name, text in (("srun", body), ("scontrol", scontrol), ("torchrun", torchrun), ("pss-train", train)):
            (commands / name).write_text(f"#!/bin/bash\n{text}")
            (commands / name).chmod(0o755)
        (tmp_path / "calls").write_text("")
        environment = os.environ | {
            "PATH": f"{commands}:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_GPUS_ON_NODE": "1", "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path),
        }  # fmt: skip
        script = ["bash", str(ROOT / "docs" / "slurm.sh"), *map(str, arguments)]
        done = subprocess.run(
            script, env=environment, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path
        )
        return done, (tmp_path / "calls").read_text().splitlines()

    return run


@pytest.mark.exhaustive
def test_the_script_trains(batch, image_root, tmp_path):
    output = tmp_path / "run"
    words = ["train.epochs=1", "model.depth=1", "train.batch_size=16", "train.num_workers=0", "optim.warmup_epochs=0"]
    settings = [word for setting in words for word in ("--set", setting)]
    done, calls = batch(
        'shift; exec "$@"', "digits", "--data", image_root, "--output", output, "--loader", "torch", *settings
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((output / "summary.json").read_text())["finished"] is True
    assert calls == ["show hostnames node[0-1]"]


@pytest.mark.parametrize(
    ("summary", "again"), [('{"finished": false}', True), ('{"finished": true}', False), (None, False)]
)
def test_only_a_run_that_was_stopped_is_queued_again(batch, tmp_path, summary, again):
    body = f'echo "$@" > {tmp_path}/srun\nsleep 0.05\n'
    body += f"echo '{summary}' > {tmp_path}/summary.json\n" if summary else ""
    done, calls = batch(body + "exit 1\n", "digits", "--output", tmp_path, "--set", "a=b c")
    assert done.returncode == 1
    assert ("requeue 7" in calls) == again
    words = (tmp_path / "srun").read_text()
    assert "--nnodes 1 --nproc-per-node 1 --max-restarts 3" in words
    assert "--rdzv-id 7 --rdzv-endpoint localhost:29400 --no-python pss-train digits --output" in words
    assert words.endswith("--set a=b c --resume\n")
