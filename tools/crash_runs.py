"""Kill a run again and again, and see that it ends as if nothing had been.

    python -m tools.crash_runs --loader torch --kills 20

Trains a small model on the digits twice: once undisturbed, and once with `kill -9` at random moments, each followed by
`--resume`. Both must end with the same weights, moving average and optimizer state, to the bit. A checkpoint is written
every few steps, so that some moments lie inside its writing; what such a moment left half-written is counted.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from pss.runs import checkpoint

_START_SECONDS = 120.0
_SETTINGS = (
    "model.embed_dim=24", "model.depth=2", "model.drop_path_rate=0.1", "loss.mixup=0.8", "data.flip=0.5",
    "train.batch_size=16", "train.num_workers=1", "train.ema_decay=0.9", "train.log_every_steps=10",
    "optim.warmup_epochs=0",
)  # fmt: skip


@dataclass(frozen=True)
class Crashes:
    """What became of a run that was killed."""

    kills: int
    while_writing: int  # of the kills, those that left a checkpoint half-written
    at_steps: tuple[int, ...]  # of the newest checkpoint after each kill
    differing: tuple[str, ...]  # tensors that are not those of the undisturbed run

    @property
    def identical(self) -> bool:
        return not self.differing


def crash(data: Path, work: Path, *, loader: str, kills: int, epochs: int, seconds: float, seed: int = 0) -> Crashes:
    """Train in `work/straight` undisturbed, and in `work/killed` with `kills` kills.

    Args:
        data: a data set that `loader` reads.
        work: an empty folder.
        loader: dali, ffcv or torch.
        kills: how often to kill; the run must be long enough for all of them.
        epochs: the length of the run.
        seconds: each kill comes at a random moment up to so long after the first new checkpoint.
        seed: of the moments.
    """
    draw = random.Random(seed)
    options = ["digits", "--data", str(data), "--loader", loader, "--resume"]
    for setting in (*_SETTINGS, f"train.epochs={epochs}", "train.checkpoint_every_minutes=0.001"):
        options += ["--set", setting]
    _finish(_start(options, work / "straight"))
    folder = work / "killed" / "checkpoints"
    while_writing, steps = 0, []
    for _ in range(kills):
        before = set(folder.glob("step-*"))
        process = _start(options, work / "killed")
        _wait_for_progress(process, folder, before)
        time.sleep(draw.uniform(0, seconds))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode != -signal.SIGKILL:
            raise ValueError(
                f"the run ended (exit code {process.returncode}) before kill {len(steps) + 1} of {kills}; "
                "train more epochs"
            )
        while_writing += bool(list(folder.glob(".partial-*")))
        listed = checkpoint.list_checkpoints(folder)
        steps.append(checkpoint.step_of(listed[0]) if listed else 0)
    total = checkpoint.step_of(checkpoint.list_checkpoints(work / "straight" / "checkpoints")[0])
    if steps[-1] == total:
        raise ValueError(f"the run of {total} steps had ended before the last of {kills} kills; train more epochs")
    _finish(_start(options, work / "killed"))
    states = [_flat(_newest(work / name / "checkpoints")) for name in ("straight", "killed")]
    names = sorted(states[0].keys() | states[1].keys())
    differing = [name for name in names if not _same(states[0].get(name), states[1].get(name))]
    return Crashes(kills, while_writing, tuple(steps), tuple(differing))


def _newest(folder: Path) -> dict[str, Any]:
    found = checkpoint.load_latest(folder)
    assert found is not None
    return found[0]


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {name: leaf for key, inner in value.items() for name, leaf in _flat(inner, f"{where}.{key}").items()}
    if isinstance(value, list | tuple):
        return _flat(dict(enumerate(value)), where)
    return {where: value}


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else bool(a == b)


def _start(options: list[str], output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cli.train", *options, "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def _wait_for_progress(process: subprocess.Popen[str], folder: Path, before: set[Path]) -> None:
    """Until there is a checkpoint that was not there before."""
    began = time.monotonic()
    while set(folder.glob("step-*")) <= before:
        if process.poll() is not None or time.monotonic() - began > _START_SECONDS:
            process.kill()
            _, told = process.communicate()
            raise ValueError(f"the run did not get on: {told}")
        time.sleep(0.01)


def _finish(process: subprocess.Popen[str]) -> None:
    _, told = process.communicate(timeout=600)
    if process.returncode:
        raise ValueError(f"the run failed: {told}")


def main(
    loader: Annotated[str, typer.Option(help="dali, ffcv or torch.")] = "torch",
    kills: Annotated[int, typer.Option(help="How often to kill.", min=1)] = 20,
    epochs: Annotated[int, typer.Option(help="Length of the run.")] = 14,
    seconds: Annotated[float, typer.Option(help="Latest moment of a kill, after the first new checkpoint.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Kill a run again and again, and see that it ends as if nothing had been."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "digits"
        convert = [sys.executable, "-m", "cli.convert", "digits", str(data), "--format", "ffcv,dali"]
        subprocess.run(convert, check=True, capture_output=True)
        done = crash(data, Path(folder), loader=loader, kills=kills, epochs=epochs, seconds=seconds, seed=seed)
    typer.echo(
        f"{loader}: {done.kills}/{kills} kills, {done.while_writing} of them while a checkpoint was written, at steps "
        f"{', '.join(map(str, done.at_steps))}; {time.monotonic() - began:.0f} s"
    )
    if not done.identical:
        typer.echo(f"{len(done.differing)} values differ: {', '.join(done.differing[:5])}")
        raise typer.Exit(1)
    typer.echo("every weight, average and optimizer state is that of the undisturbed run, to the bit")


if __name__ == "__main__":
    typer.run(main)
