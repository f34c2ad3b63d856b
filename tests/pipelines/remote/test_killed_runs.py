"""Runs from a bucket that are killed at random moments, and go on with as many processes as before, or with others."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import warm
from conftest import convert_folder, free_port, shared, write_folder
from ranks import assert_same_to_rounding
from stores import s3_store

import pipelines
from pipelines.base import DataConfig
from pipelines.remote import place
from pipelines.remote.fetching import THREADS
from pipelines.storage.manifest import MANIFEST, read_manifest
from pss.runs.log import read_rows
from tools.crash_runs import differences, newest

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.exhaustive
GROUPS, BATCH, STEPS, EPOCHS, KILLS = 4, 8, 12, 6, 10  # steps of an epoch
SETTINGS = [
    "model.depth=1", "model.embed_dim=24", f"train.batch_size={BATCH}", "optim.warmup_epochs=0",
    f"optim.lr_batch={BATCH}", "data.window=1", f"data.groups={GROUPS}", "train.num_workers=1", "train.ema_decay=0.9",
    "train.log_every_steps=1", "train.checkpoint_every_minutes=0.0001",
]  # fmt: skip
RANDOM = ["model.drop_path_rate=0.1", "loss.mixup=0.8"]  # what each process draws for itself
CLOCKED = ("time", "train_seconds", "images_per_second", "data_wait", "saved_time", "saved_share")
START_SECONDS = 1.0  # of a process, about
LONGEST_SECONDS = 120.0


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """24 tars of four images for training, and four for validation."""

    def make(folder):
        write_folder(folder / "photos" / "train", {"cat": 48, "dog": 48}, seed=6)
        write_folder(folder / "photos" / "val", {"cat": 8, "dog": 8}, seed=7)
        convert_folder(folder / "photos", folder / "set", "dali", shard_size=4)

    with shared(tmp_path_factory, "killed", make) as folder:
        yield folder / "set"


@dataclass
class Run:
    """A run, and what was done to it."""

    url: str
    output: Path
    cache: Path
    gigabytes: float
    settings: list[str]
    sessions: list[int] = field(default_factory=list)
    """Of all processes that were started."""
    trained: int = 0
    """Steps, those included that were trained again."""
    told: list[str] = field(default_factory=list)
    """What each kill came upon."""

    @property
    def newest(self):
        return newest(self.output / "checkpoints")

    def start(self, processes):
        words = ["cifar10", "--data", self.url, "--output", self.output, "--loader", "torch", "--resume"]
        words += ["--cache-dir", self.cache, "--cache-gb", self.gigabytes]
        words += [word for setting in self.settings for word in ("--set", setting)]
        own = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
        started = []
        for rank in range(processes):
            if processes > 1:
                own |= meet | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
            command = [sys.executable, "-m", "cli.train", *map(str, words)]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
            started.append(warm.Popen(command, env=dict(own), start_new_session=True, **quiet))
        self.sessions += [process.pid for process in started]
        return started

    def finish(self, processes):
        before, started = self.newest, self.start(processes)
        try:
            told = [process.communicate(timeout=LONGEST_SECONDS)[1] for process in started]
        finally:
            end(started)
        assert [process.returncode for process in started] == [0] * processes, "\n".join(told)[-4000:]
        self._count(before)

    def kill(self, processes, draw, step):
        """Kill all processes at a random moment: as they start, if `step` is None, or else once they are further than
        the run was, and at least at `step`."""
        before, started, begun = self.newest, self.start(processes), time.monotonic()
        moment = draw.uniform(0, START_SECONDS * processes) if step is None else LONGEST_SECONDS
        try:
            while time.monotonic() - begun < moment and not (self.newest > before and self.newest[1] >= (step or 0)):
                assert all(process.poll() is None for process in started), end(started)
                time.sleep(0.002)
            assert step is None or self.newest[1] >= step, end(started)
            time.sleep(0 if step is None else draw.uniform(0, 0.1))
            assert all(process.poll() is None for process in started), end(started)
        finally:
            end(started)
        coming = len(list(self.cache.rglob("coming/*")))
        self.told.append(
            f"{processes} processes, {time.monotonic() - begun:.1f} s after their start, between {before} and "
            f"{self.newest}, {coming} tars on their way"
        )
        self._count(before)

    def _count(self, before):
        continuation, step = self.newest
        self.trained += step - (before[1] if continuation == before[0] else before[1] // STEPS * STEPS)


def end(processes):
    """Kill the groups of these processes; what they had said."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return [process.communicate(timeout=60)[1] for process in processes]


def rows(output, kind):
    """Of the log, without what the clock decides."""
    found = read_rows(output, kind)
    for row in found:
        for level in row.get("by_rho", {}).values():
            del level["ms_per_step"], level["data_wait"]
    return [{name: value for name, value in row.items() if name not in CLOCKED} for row in found]


def smallest(root, processes, monkeypatch):
    """What a cache must hold at least, in GB, for so many processes on this node."""
    with monkeypatch.context() as patched:
        patched.setenv("LOCAL_WORLD_SIZE", str(processes))
        return place.windowed_bytes(read_manifest(root)[0], GROUPS, 1, BATCH, processes) / 1e9


def killed(root, folder, monkeypatch, worlds, *more, seed):
    """A run that was never interrupted, by the last of `worlds`, and one that is killed as it is trained by each of the
    others, three times as it starts."""
    draw, gigabytes = random.Random(seed), smallest(root, max(worlds), monkeypatch)
    steps = sorted(draw.sample(range(1, STEPS * (EPOCHS - 2)), len(worlds) - 1))
    for number in draw.sample(range(len(steps)), 3):
        steps[number] = None
    settings = [*SETTINGS, f"train.epochs={EPOCHS}", *more]
    with s3_store(root, monkeypatch) as served:
        straight = Run(served.url, folder / "straight", folder / "once", gigabytes, settings)
        straight.finish(worlds[-1])
        once = sum(served.tars("").values())
        served.gets.clear()
        run = Run(served.url, folder / "killed", folder / "cache", gigabytes, settings)
        for processes, step in zip(worlds, steps, strict=False):
            run.kill(processes, draw, step)
        run.finish(worlds[-1])
    print("\n".join(run.told), f"{run.trained} steps instead of {straight.trained},", end=" ")
    print(f"{sum(served.tars('').values())} requests for tars instead of {once}, {served.gets[MANIFEST]} manifests")
    # What a step needs is asked for as often as it is trained, and once more what was on its way to those that were
    # killed, and what the cache held for where they were.
    held = 1e9 * gigabytes / min(path.stat().st_size for path in root.glob("*.tar"))
    lost = THREADS * sum(worlds[:-1]) + held * len(steps)
    assert sum(served.tars("").values()) <= once * run.trained / straight.trained + lost
    assert served.gets[MANIFEST] <= sum(worlds)
    assert_nothing_is_left(run, root)
    return straight, run


def assert_nothing_is_left(run, root):
    """Of those that were killed."""
    for session in run.sessions:
        with pytest.raises(ProcessLookupError):
            os.killpg(session, 0)
    assert list((run.output / "checkpoints").glob(".*")) == []
    (held,) = (path for path in run.cache.iterdir() if path.name != "room.lock")
    assert [path for name in ("coming", "plans") for path in (held / name).iterdir()] == []
    files = [path for path in held.iterdir() if path.is_file()]
    assert {path.name: path.read_bytes() for path in files} == {p.name: (root / p.name).read_bytes() for p in files}
    assert sum(path.stat().st_size for path in files if path.name != MANIFEST) <= 1e9 * run.gigabytes


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_run_that_is_killed_ten_times_is_the_run_that_was_not(pictures, tmp_path, monkeypatch, processes):
    """Weights, averages, states of the optimizer and rows of the log, to the bit."""
    straight, run = killed(pictures, tmp_path, monkeypatch, [processes] * (KILLS + 1), *RANDOM, seed=processes)
    assert differences(straight.output, run.output) == []
    for kind in ("step", "epoch"):
        assert rows(run.output, kind) == rows(straight.output, kind)
    assert len(rows(run.output, "step")) == run.newest[1] == EPOCHS * STEPS


@pytest.mark.parametrize(
    "worlds",
    [
        [1, 2, 1, 4, 1, 4, 2, 1, 2, 4, 1],
        [4, 2, 1, 4, 1, 2, 4, 1, 2, 1, 4],
        [2, 4, 1, 2, 4, 2, 1, 4, 2, 1, 2],
    ],
)
def test_a_run_that_others_go_on_with_learns_the_same(pictures, tmp_path, monkeypatch, worlds):
    """But for the rounding of sums: the same batches at each step, and all samples of each epoch."""
    straight, run = killed(pictures, tmp_path, monkeypatch, worlds, seed=10 * worlds[0])
    assert_same_to_rounding(straight.output, run.output)
    for kind in ("step", "epoch"):
        found, expected = rows(run.output, kind), rows(straight.output, kind)
        assert [row["step"] for row in found] == [row["step"] for row in expected]
        for name in ("loss", "grad_norm", *(("val_loss", "ema_val_loss") if kind == "epoch" else ())):
            assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], abs=1e-5)
    planned = [{fingerprint(pictures, world, epoch) for world in set(worlds)} for epoch in range(EPOCHS)]
    assert all(row["samples_hash"] in some for row, some in zip(rows(run.output, "epoch"), planned, strict=True))


def fingerprint(root, world, epoch):
    """Of the samples that the first of so many processes is to see in an epoch."""
    config = DataConfig(img_size=32, window=1, groups=GROUPS)
    options = {"batch_size": BATCH // world, "train": True, "seed": 0, "rank": 0, "world_size": world}
    loader = pipelines.build(root, "train", config=config, loader="torch", num_workers=1, **options)
    loader.close()
    return f"{loader.planned_hash(epoch):08x}"
