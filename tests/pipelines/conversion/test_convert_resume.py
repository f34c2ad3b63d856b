"""Interrupted, shared or repeated: the files come out the same to the byte."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import Silent, convert_folder, missing, write_folder

from pipelines.base import DataError
from pipelines.conversion import convert as conversion
from pipelines.conversion.options import Options
from pipelines.conversion.processes import map_processes

ROOT = Path(__file__).parents[3]
FORMATS = "dali" if missing("ffcv") else "ffcv,dali"
ARGUMENTS = ("--format", FORMATS, "--max-size", "64", "--shard-size", "20", "--val-fraction", "0.2")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    write_folder(root, {"a": 70, "b": 50})
    return root


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    dest = tmp_path_factory.mktemp("whole") / "set"
    convert_folder(source, dest, FORMATS, max_size=64, val_fraction=0.2)
    return checksums(dest)


def checksums(root: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.iterdir()}


def start(source: Path, dest: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cli.convert", str(source), str(dest), *ARGUMENTS, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def descendants(pid: int) -> list[int]:
    """All processes below `pid`."""
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()
    ]
    return children + [below for child in children for below in descendants(child)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def written(folder: Path) -> int:
    """How many files an unfinished conversion has."""
    return sum(len(files) for _, _, files in os.walk(folder))


@pytest.mark.parametrize("count", [3, pytest.param(10, marks=pytest.mark.exhaustive)])
def test_killed_at_random_moments_and_continued(
    source: Path, whole: dict[str, str], tmp_path: Path, count: int
) -> None:
    """Each after it has written a random number of files more, and a random moment."""
    rng = random.Random(0)
    dest, partial = tmp_path / "set", tmp_path / ".set.partial"
    kills, moments = 0, []
    while kills < count:
        if dest.exists():  # it was quicker than the axe: begin again
            assert checksums(dest) == whole
            shutil.rmtree(dest)
        until = written(partial) + rng.randrange(1, 10)
        process = start(source, dest, "--jobs", "2")
        while process.poll() is None and written(partial) < until:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.05)
        below = descendants(process.pid)
        process.kill()
        end(process)
        if process.returncode == -signal.SIGKILL:
            kills += 1
            moments.append(written(partial))
            assert not dest.exists() or checksums(dest) == whole
        limit = time.monotonic() + 10
        while any(map(alive, below)):
            assert time.monotonic() < limit, "a worker survived"
            time.sleep(0.02)
    print(f"killed when there were {moments} files")
    if not dest.exists():
        code, _, said = end(start(source, dest, "--jobs", "1"))
        assert code == 0
        assert "continuing the unfinished conversion" in said
    assert checksums(dest) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def _interrupt_writing(source: Path, dest: Path) -> None:
    class Interrupting(Silent):
        def start(self, phase: str, total: int) -> None:
            if phase == "writing train tars":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversion.convert(str(source), dest, Options(formats=("dali",), split="train"), Interrupting())


def test_other_options_are_refused_until_restart(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "set"
    _interrupt_writing(source, dest)
    with pytest.raises(DataError, match=r"split was 'train', is 'val'; shard-size was 2000, is 20; .*--restart"):
        convert_folder(source, dest, "dali", split="val")
    assert (tmp_path / ".set.partial" / "journal.json").exists()
    convert_folder(source, dest, "dali", split="val", restart=True)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_source_that_changed_is_refused_until_restart(tmp_path: Path) -> None:
    write_folder(tmp_path / "src", {"a": 4})
    dest = tmp_path / "set"
    _interrupt_writing(tmp_path / "src", dest)
    (tmp_path / "src" / "a" / "003.jpg").unlink()
    options = Options(formats=("dali",), split="train")
    with pytest.raises(DataError, match=r"has changed since.*--restart"):
        conversion.convert(str(tmp_path / "src"), dest, options, Silent())
    convert_folder(tmp_path / "src", dest, "dali", split="train", restart=True)


def test_two_at_once_are_refused(source: Path, tmp_path: Path) -> None:
    class Second(Silent):
        refused = 0

        def advance(self, images: int) -> None:
            with pytest.raises(DataError, match="another pss-convert is writing"):
                convert_folder(source, tmp_path / "set", "dali", split="train")
            self.refused += 1

    progress = Second()
    conversion.convert(str(source), tmp_path / "set", Options(formats=("dali",), split="train"), progress)
    assert progress.refused


def test_three_parts_make_the_same_set(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    dest = tmp_path / "set"
    processes = [start(source, dest, "--jobs", "1", "--part", f"{i}/3") for i in (1, 2, 3)]
    ends = [end(process) for process in processes]
    assert [code for code, _, _ in ends] == [0, 0, 0], ends
    assert any("2 classes" in out for _, out, _ in ends)
    assert checksums(dest) == whole
    code, out, told = end(start(source, dest, "--part", "2/3"))
    assert (code, "2 classes" in out) == (0, True), told
    assert f"part 2/3 finds {dest} finished by the others" in told
    code, _, told = end(start(source, dest, "--part", "2/3", "--seed", "1"))
    assert code == 2
    assert "already exists" in told


def test_a_lost_part_is_made_up_for_by_merging(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    dest = tmp_path / "set"
    options = {"max_size": 64, "val_fraction": 0.2}
    assert convert_folder(source, dest, FORMATS, part=(2, 2), **options) is None
    assert not dest.exists()
    code, out, _ = end(
        subprocess.Popen(
            [sys.executable, "-m", "cli.convert", "--merge", str(dest)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
    )
    assert code == 0
    assert "2 classes" in out
    assert checksums(dest) == whole


def test_parts_are_checked() -> None:
    for part in ((0, 2), (3, 2)):
        with pytest.raises(ValueError, match="--part is"):
            Options(formats=("dali",), part=part)
    with pytest.raises(ValueError, match="--restart would drop"):
        Options(formats=("dali",), part=(1, 2), restart=True)


def test_a_killed_worker_is_noticed_and_its_work_done_later(
    source: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    class Killer(Silent):
        killed = 0

        def advance(self, images: int) -> None:
            if not self.killed:
                for pid in descendants(os.getpid()):
                    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                        command = Path(f"/proc/{pid}/cmdline")
                        if alive(pid) and descendants(pid) == [] and b"forkserver" in command.read_bytes():
                            os.kill(pid, signal.SIGKILL)
                            self.killed += 1

    options = Options(
        formats=tuple(FORMATS.split(",")),  # type: ignore[arg-type]
        max_size=64,
        val_fraction=0.2,
        shard_size=20,
        jobs=2,
    )
    began = time.monotonic()
    with pytest.raises(DataError, match="was killed"):
        conversion.convert(str(source), tmp_path / "set", options, Killer())
    assert time.monotonic() - began < 20
    conversion.convert(str(source), tmp_path / "set", options, Silent())
    assert checksums(tmp_path / "set") == whole


def test_tasks_come_back_in_order() -> None:
    heard: list[int] = []
    assert map_processes(math.factorial, range(10), 3, heard.append) == [math.factorial(n) for n in range(10)]
    assert sorted(heard) == [math.factorial(n) for n in range(10)]


@pytest.mark.exhaustive
@pytest.mark.skipif(missing("ffcv") is not None, reason="FFCV is not installed")
def test_ffcvs_own_loader_reads_our_files(source: Path, tmp_path: Path) -> None:
    """In a process of its own: FFCV warns when it is imported. `mix` has both ways to store an image."""
    shares = {"mix": (0.3, 0.7)}
    for store in shares:
        convert_folder(source, tmp_path / store, "ffcv", split="train", max_size=64, store=store)
    script = """
import sys, numpy as np
from ffcv.loader import Loader, OrderOption
from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
for folder in sys.argv[1:]:
    loader = Loader(folder + "/train.beton", batch_size=16, num_workers=1, order=OrderOption.SEQUENTIAL,
                    drop_last=False, pipelines={"image": [CenterCropRGBImageDecoder((32, 32), 1)],
                                                "label": [IntDecoder()], "index": [IntDecoder()]})
    batches = [[part.copy() for part in batch] for batch in loader]
    images, labels, index = (np.concatenate(parts) for parts in zip(*batches))
    np.savez(folder + "/out.npz", images=images, labels=labels.ravel(), index=index.ravel())
"""
    folders = [tmp_path / store for store in shares]
    subprocess.run([sys.executable, "-c", script, *map(str, folders)], check=True, timeout=100)
    for folder, (low, high) in zip(folders, shares.values(), strict=True):
        with np.load(folder / "out.npz") as out:
            assert out["index"].tolist() == list(range(120))
            assert np.array_equal(out["labels"], np.load(folder / "train.samples.npy")["label"])
            assert len({image.tobytes() for image in out["images"]}) == 120
        assert low <= np.load(folder / "train.beton.npy")["mode"].mean() <= high


@pytest.mark.skipif(missing("ffcv") is not None, reason="FFCV is not installed")
def test_the_file_is_laid_out_as_ffcv_lays_it_out() -> None:
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField

    from pipelines.storage.beton import ALLOCATION, FIELD, HEADER, METADATA

    for ours, theirs in (
        (HEADER, types.HeaderType),
        (FIELD, types.FieldDescType),
        (ALLOCATION, types.ALLOC_TABLE_TYPE),
        (METADATA, types.get_metadata_type([RGBImageField(), IntField(), IntField()])),
    ):
        assert ours.itemsize == theirs.itemsize
        assert [entry[1] for entry in ours.fields.values()] == [entry[1] for entry in theirs.fields.values()]


@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_a_ray_cluster_of_two_nodes_makes_the_same_set(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
import os
os.environ["RAY_ADDRESS"] = cluster.address
from cli.convert import app
code = app(sys.argv[1:], standalone_mode=False)
import ray
assert len([node for node in ray.nodes() if node["Alive"]]) == 2
ray.shutdown()
cluster.shutdown()
"""
    arguments = [str(source), str(tmp_path / "set"), *ARGUMENTS, "--engine", "ray"]
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert checksums(tmp_path / "set") == whole
