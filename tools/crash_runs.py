"""Stop a run again and again, in every way there is, and see that it ends as if nothing had been.

    python -m tools.crash_runs --loader torch --processes 2 [--set method=dense] [--signal KILL --repeat 5] [--store]

Trains a small model on the digits twice: once undisturbed, and once with a disturbance in each round, followed by
`--resume`: SIGKILL, SIGSTOP or SIGTERM, of one process or of all, at its start, in the middle of an epoch, while a
checkpoint is written, in validation; under torchrun with restarts; with `--change`, with other numbers of processes
in between, each stopped twice within an epoch; with `--store`, from a bucket of a server on this machine, with a cache
that holds a part of the set. Every round must get further than the one before. Where the number of processes never
changed, weights, moving average and optimizer state must be those of the undisturbed run, to the bit. The log must
have each step and epoch once.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from pipelines.remote.place import windowed_bytes
from pipelines.storage.manifest import read_manifest
from pss.runs import checkpoint
from pss.runs.log import read_rows

Signal = Literal["KILL", "STOP", "TERM"]
Moment = Literal["start", "epoch", "saving", "validation"]

_PATIENCE_SECONDS = 180.0
_START_SECONDS = 5.0  # which a start takes, about
_TIMEOUT_SECONDS = 20  # after which a process gives up one that is stopped
_BATCH, _GROUPS = 16, 4
_WINDOWED = ("data.window=1", f"data.groups={_GROUPS}")  # of a bucket
_SETTINGS = (
    "model.embed_dim=24", "model.depth=2", "model.drop_path_rate=0.1", "loss.mixup=0.8", "data.flip=0.5",
    f"train.batch_size={_BATCH}", "train.num_workers=1", "train.ema_decay=0.9", "train.log_every_steps=10",
    "optim.warmup_epochs=0", f"train.timeout_seconds={_TIMEOUT_SECONDS}", "train.checkpoint_every_minutes=0.001",
)  # fmt: skip


@dataclass(frozen=True)
class Round:
    """One disturbance."""

    signal: Signal = "KILL"
    whom: Literal["one", "all"] = "all"
    moment: Moment = "epoch"
    processes: int = 1
    restarts: int = 0
    """How often torchrun begins the processes again by itself."""

    def __str__(self) -> str:
        again = f", {self.restarts} restarts" if self.restarts else ""
        return f"SIG{self.signal} of {self.whom} of {self.processes} in {self.moment}{again}"


@dataclass(frozen=True)
class Crashes:
    """What became of a run that was disturbed."""

    told: tuple[str, ...]  # for each round, what was done and how far the run was then
    while_writing: int  # rounds that left a checkpoint half-written
    differing: tuple[str, ...]  # tensors, and rows of the log, that are not those of the undisturbed run
    stuck: tuple[str, ...]  # rounds that did not get further than the one before

    @property
    def good(self) -> bool:
        return not self.differing and not self.stuck


def every_round(processes: int) -> list[Round]:
    """All disturbances of a run of so many processes."""
    whom: list[Literal["one", "all"]] = ["all"] if processes == 1 else ["one", "all"]
    signals: tuple[Signal, ...] = ("KILL", "STOP", "TERM")
    moments: tuple[Moment, ...] = ("start", "epoch", "saving", "validation")
    rounds = [Round(name, who, moment, processes) for name in signals for who in whom for moment in moments]
    if processes > 1:
        rounds += [Round(name, "one", "epoch", processes, restarts=2) for name in ("KILL", "TERM")]  # type: ignore[arg-type]
    return rounds


def changes(most: int) -> list[Round]:
    """2, 1, 2 and 1 processes, or 2, 1, 4 and 2 of them, each stopped twice within an epoch."""
    worlds = (2, 1, 4, 2) if most == 4 else (2, 1, 2, 1)
    return [Round("KILL", "all", "epoch", processes) for processes in worlds for _ in range(2)]


def crash(
    data: Path | str,
    work: Path,
    *,
    loader: str,
    rounds: Sequence[Round],
    epochs: int,
    seconds: float = 0.5,
    seed: int = 0,
    settings: Sequence[str] = (),
    cache_gb: float | None = None,
) -> Crashes:
    """Train in `work/straight` undisturbed, and in `work/disturbed` with a disturbance in each round.

    Args:
        data: A data set that `loader` reads, or its address.
        work: An empty folder.
        loader: dali, ffcv or torch.
        rounds: What to do; the run must be long enough for all of it.
        epochs: The length of the run.
        seconds: A disturbance comes at a random moment up to so long after it could.
        seed: Of the moments.
        settings: Of the run, as after `--set`.
        cache_gb: Of a set at an address, what its cache holds, which is in `work` too.
    """
    draw = random.Random(seed)
    settings = (*_SETTINGS, f"train.epochs={epochs}", *settings)
    options = ["digits", "--data", str(data), "--loader", loader, "--resume"]
    options += [word for setting in settings for word in ("--set", setting)]
    if cache_gb is not None:
        options += ["--cache-dir", str(work / "cache"), "--cache-gb", repr(cache_gb)]
    straight, disturbed = work / "straight", work / "disturbed"
    _finish(_start(options, straight, Round(processes=rounds[0].processes)))
    folder = disturbed / "checkpoints"
    told, stuck, while_writing = [], [], 0
    for one in rounds:
        before = newest(folder)
        process = _start(options, disturbed, one)
        try:
            _wait_for(one, process, disturbed, before)
            longest = {"start": _START_SECONDS, "epoch": seconds}.get(one.moment, 0.0)
            time.sleep(draw.uniform(0, longest))
            _disturb(process, one, draw)
            process.communicate(timeout=_PATIENCE_SECONDS)
        finally:
            _kill_all(process)
        while_writing += bool(list(folder.glob(".partial-*")))
        now = newest(folder)
        told.append(f"{one}: at step {now[1]}" + (f" of continuation {now[0]}" if now[0] else ""))
        if now < before or (now == before and one.moment != "start"):
            stuck.append(f"{one}: from {before} to {now}")
    if process.returncode == 0:
        raise ValueError(f"the run had ended before the last of {len(rounds)} disturbances; train more epochs")
    _finish(_start(options, disturbed, Round(processes=rounds[-1].processes)))
    constant = len({one.processes for one in rounds}) == 1
    differing = differences(straight, disturbed) if constant else []
    return Crashes(tuple(told), while_writing, (*differing, *_odd_rows(disturbed)), tuple(stuck))


def newest(folder: Path) -> tuple[int, int]:
    """Continuation and step of the newest checkpoint."""
    listed = checkpoint.list_checkpoints(folder)
    return (checkpoint.continuation_of(listed[0]), checkpoint.step_of(listed[0])) if listed else (0, 0)


def differences(straight: Path, disturbed: Path) -> list[str]:
    """Names of what is not the same in the last checkpoints of two runs, but for what the clock decides."""
    states = []
    for output in (straight, disturbed):
        found = checkpoint.load_latest(output / "checkpoints")
        assert found is not None
        states.append(_flat({name: part for name, part in found[0].items() if name != "measured"}))
    names = sorted(states[0].keys() | states[1].keys())
    return [name for name in names if not _same(states[0].get(name), states[1].get(name))]


def _odd_rows(output: Path) -> list[str]:
    """Rows of the log that are there twice or not at all."""
    seen = Counter((row["kind"], row["step"]) for row in read_rows(output) if row["kind"] != "start")
    odd = [f"{kind} row {step} {count} times" for (kind, step), count in seen.items() if count > 1]
    every = [step for kind, step in seen if kind == "step"]
    if every != list(range(10, max(every) + 1, 10)):
        odd.append("step rows out of order or missing")
    epochs = [step for kind, step in seen if kind == "epoch"]
    return odd + (["epoch rows missing"] if epochs != list(range(epochs[0], epochs[-1] + 1, epochs[0])) else [])


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {name: leaf for key, inner in value.items() for name, leaf in _flat(inner, f"{where}.{key}").items()}
    if isinstance(value, list | tuple):
        return _flat(dict(enumerate(value)), where)
    return {where: value}


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else bool(a == b)


def _start(options: list[str], output: Path, one: Round) -> subprocess.Popen[str]:
    command = [sys.executable]
    if one.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(one.processes)]
        command += ["--max-restarts", str(one.restarts)]
    command += ["-m", "cli.train", *options, "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def _workers(process: subprocess.Popen[str], one: Round) -> list[int]:
    """The processes that train: those that torchrun started, or the one."""
    if one.processes == 1:
        return [process.pid]
    try:
        told = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii")
    except OSError:
        return []
    return [int(word) for word in told.split()]


def _disturb(process: subprocess.Popen[str], one: Round, draw: random.Random) -> None:
    workers = _workers(process, one)
    chosen = [draw.choice(workers)] if one.whom == "one" and workers else workers
    for worker in chosen:
        with suppress(ProcessLookupError):
            os.kill(worker, getattr(signal, f"SIG{one.signal}"))
    if one.restarts:
        time.sleep(_TIMEOUT_SECONDS / 2)  # torchrun begins the processes again; then all goes down
        _kill_all(process)
    elif one.signal == "STOP" and (one.whom == "all" or one.processes == 1):
        time.sleep(0.5)  # nobody is left who could notice
        _kill_all(process)
    elif one.signal == "KILL" and one.whom == "all":
        _kill_all(process)


def _kill_all(process: subprocess.Popen[str]) -> None:
    """Of the run that was started, whatever is left: torchrun's processes have sessions of their own, and outlive it
    where they are stopped."""
    assert isinstance(process.args, list)
    output = str(process.args[-1]).encode()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if output in (folder / "cmdline").read_bytes().split(b"\0") and int(folder.name) != os.getpid():
                os.kill(int(folder.name), signal.SIGKILL)
    process.communicate()


def _wait_for(one: Round, process: subprocess.Popen[str], output: Path, before: tuple[int, int]) -> None:
    """Until the run has got further than `before`, and is where the disturbance is to come."""
    folder, deadline, moment = output / "checkpoints", time.monotonic() + _PATIENCE_SECONDS, one.moment
    while True:
        if moment == "start" and len(_workers(process, one)) == one.processes:
            return
        if process.poll() is not None or time.monotonic() > deadline:
            _kill_all(process)
            _, told = process.communicate()
            raise ValueError(f"the run did not get on: {told}")
        now = newest(folder)
        further = now > before
        if moment == "epoch" and further:
            return
        if moment == "saving" and further and list(folder.glob(".partial-*")):
            return
        if moment == "validation" and further and _is_validating(output, now[1]):
            return
        time.sleep(0.002)


def _is_validating(output: Path, step: int) -> bool:
    epochs = [row["step"] for row in read_rows(output, "epoch")]
    per_epoch = min(epochs, default=0)
    return (step % per_epoch == 0 and step not in epochs) if per_epoch else False


def _finish(process: subprocess.Popen[str]) -> None:
    _, told = process.communicate(timeout=900)
    if process.returncode:
        raise ValueError(f"the run failed: {told}")


@contextmanager
def _stored(folder: Path) -> Iterator[str]:
    """`folder` in a bucket of moto's server, which the environment names; its address."""
    import fsspec

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            if server.poll() is not None or time.monotonic() > deadline:
                raise ValueError("moto's server, which --store needs, does not start; pip install moto[server] s3fs")
            time.sleep(0.1)
        files = fsspec.filesystem("s3")
        files.mkdir("pictures")
        files.put(f"{folder}/", "s3://pictures/digits/", recursive=True)
        yield "s3://pictures/digits"
    finally:
        server.kill()
        server.wait()


def _part(folder: Path, processes: int) -> float:
    """What a cache must hold at least for so many processes, in GB."""
    os.environ["LOCAL_WORLD_SIZE"] = str(processes)
    try:
        return windowed_bytes(read_manifest(folder)[0], _GROUPS, 1, _BATCH, processes) / 1e9
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]


def main(
    loader: Annotated[str, typer.Option(help="dali, ffcv or torch.")] = "torch",
    processes: Annotated[int, typer.Option(help="Of the run.", min=1, max=4)] = 2,
    change: Annotated[bool, typer.Option("--change", help="Change between 2 processes, 1 and, of 4, 4.")] = False,
    store: Annotated[bool, typer.Option("--store", help="Train from a bucket.")] = False,
    repeat: Annotated[int, typer.Option(help="How often to do each.", min=1)] = 1,
    epochs: Annotated[int, typer.Option(help="Length of the run; it must outlast all rounds.", min=1)] = 60,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    signal_name: Annotated[str | None, typer.Option("--signal", help="This one alone: KILL, STOP or TERM.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Of the run, such as method=dense.")] = None,
) -> None:
    """Stop a run again and again, in every way there is, and see that it ends as if nothing had been."""
    began = time.monotonic()
    rounds = (changes(processes) if change else every_round(processes)) * repeat
    if signal_name is not None:
        rounds = [one for one in rounds if one.signal == signal_name]
        if not rounds:
            raise typer.BadParameter(f"--signal is {signal_name}; it is KILL, STOP or TERM, and KILL with --change")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "digits"
        convert = [sys.executable, "-m", "cli.convert", "digits", str(data)]
        convert += ["--format", "dali", "--shard-size", "20"] if store else ["--format", "ffcv,dali"]
        subprocess.run(convert, check=True, capture_output=True)
        with _stored(data) if store else nullcontext(data) as place:
            done = crash(
                place,
                Path(folder),
                loader=loader,
                rounds=rounds,
                epochs=epochs,
                seed=seed,
                settings=(*(_WINDOWED if store else ()), *(settings or ())),
                cache_gb=_part(data, max(one.processes for one in rounds)) if store else None,
            )
    for line in done.told:
        typer.echo(line)
    typer.echo(
        f"{loader}: {len(rounds)} disturbances, {done.while_writing} of them left a checkpoint half-written; "
        f"{time.monotonic() - began:.0f} s"
    )
    for line in done.stuck:
        typer.echo(f"did not get on: {line}")
    if done.differing:
        typer.echo(f"{len(done.differing)} values differ: {', '.join(done.differing[:5])}")
    if not done.good:
        raise typer.Exit(1)
    typer.echo(
        "every round got further, and the run finished"
        + ("" if change else "; every weight, average and optimizer state is the undisturbed run's, to the bit")
    )


if __name__ == "__main__":
    typer.run(main)
