"""Small data sets that several test files share."""

from __future__ import annotations

import fcntl
import inspect
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import installed as packaged
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from pipelines.conversion.convert import convert
from pipelines.conversion.options import Options
from pipelines.storage.manifest import Manifest
from pss.inference import timing

# No test measures time, and on a busy machine an example takes as long as it takes.
hypothesis.settings.register_profile("pss", deadline=None)
hypothesis.settings.load_profile("pss")

# The tensors of the tests are too small to share: threads would only wait for each other.
torch.set_num_threads(1)

MAX_SIZE = 128
"""Longest side of the images in the converted data set's FFCV files; some originals are larger, some smaller."""


LONG = {
    "test_a_dry_run_runs_every_part[some]": 20, "test_the_demo_ends_with_rows_and_a_picture[forked]": 25,
    "test_in_tritons_interpreter[1]": 20, "test_a_dead_rank_ends_the_job_and_torchrun_begins_it_again": 20,
    "test_two_nodes_are_two_processes": 15, "test_the_demo_ends_with_rows_and_a_picture[anew]": 50,
    "test_a_ray_cluster_of_two_nodes_makes_the_same_set": 10, "test_the_script_trains": 8,
    "test_the_page_runs_as_it_is_printed": 20, "test_two_processes_evaluate_from_a_store": 10,
    "test_in_tritons_interpreter[8]": 60, "test_a_dry_run_runs_every_part[all]": 60, "test_killed_runs": 40,
}  # fmt: skip
"""Seconds of the longest tests, by name or by file: they come first, so that no process ends long after the others."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, in equal shares of xdist's processes, each of which begins with an equal run of the tests."""
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

    def seconds(item: pytest.Item) -> float:
        return LONG.get(item.name, LONG.get(item.path.stem, 0.0))

    long = sorted((item for item in items if seconds(item)), key=seconds, reverse=True)
    short = [item for item in items if not seconds(item)]
    ordered, begun = [], 0
    for share in range(count):
        first = long[share::count]
        fill = len(items) * (share + 1) // count - len(ordered) - len(first)
        ordered += first + short[begun : begun + fill]
        begun += fill
    items[:] = ordered


def picture(height: int, width: int, seed: int) -> Image.Image:
    """A smooth random image: like a photograph, it has little energy at high frequencies."""
    noise = np.random.default_rng(seed).integers(0, 256, (max(height // 8, 2), max(width // 8, 2), 3), dtype=np.uint8)
    enlarged = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    return enlarged.filter(ImageFilter.GaussianBlur(1))


def write_folder(folder: Path, counts: dict[str, int], seed: int = 0) -> None:
    """Write `counts[class]` JPEGs of various sizes into `<folder>/<class>/`."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            height, width = (int(n) for n in rng.integers(40, 160, 2))
            picture(height, width, int(rng.integers(1 << 31))).save(folder / name / f"{i:03d}.jpg", quality=90)


@pytest.fixture(autouse=True, scope="session")
def brief_measurements() -> None:
    """Speeds are measured in moments: the tests ask that they are measured, and not how precisely."""
    for function in (timing.call_seconds, timing.loader_rates):
        defaults = inspect.unwrap(function).__kwdefaults__
        assert "round_seconds" in defaults
        defaults["round_seconds"] = 1e-3


@contextmanager
def shared(temporary: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Iterator[Path]:
    """A folder that `make` has filled, once for all processes of a test run; no test may change what is in it."""
    base = temporary.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, whole = base / name, base / f"{name}.whole"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            whole.write_text(json.dumps(_state(folder)))
    yield folder
    assert _state(folder) == json.loads(whole.read_text()), f"a test has changed {folder}, which others use too"


def _state(folder: Path) -> dict[str, list[int]]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


@pytest.fixture(scope="session")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A plain folder with 53 training and 23 validation images of three classes."""

    def make(root: Path) -> None:
        write_folder(root / "train", {"cat": 17, "dog": 19, "emu": 17}, seed=1)
        write_folder(root / "val", {"cat": 8, "dog": 9, "emu": 6}, seed=2)

    with shared(tmp_path_factory, "images", make) as root:
        yield root


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[packaged.Installed]:
    """The wheel of this checkout in an environment of its own."""
    with shared(tmp_path_factory, "installed", packaged.install) as folder:
        yield packaged.Installed(folder)


def missing(backend: str) -> str | None:
    """Why a back end cannot be tested here; None if it can."""
    if backend == "dali" and not (find_spec("nvidia") and find_spec("nvidia.dali")):
        return "DALI is not installed"
    if backend == "ffcv" and not find_spec("ffcv"):
        return "FFCV is not installed"
    return None


@pytest.fixture(scope="session")
def converted_root(image_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`image_root` in every format that can be written here."""

    def make(folder: Path) -> None:
        convert_folder(image_root, folder / "set", "dali" if missing("ffcv") else "ffcv,dali", max_size=MAX_SIZE)

    with shared(tmp_path_factory, "converted", make) as folder:
        yield folder / "set"


@pytest.fixture(scope="session")
def tarred(image_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`image_root` in tars of five samples: eleven for training, five for validation."""

    def make(folder: Path) -> None:
        convert_folder(image_root, folder / "set", "dali" if missing("ffcv") else "ffcv,dali", shard_size=5)

    with shared(tmp_path_factory, "tarred", make) as folder:
        yield folder / "set"


def convert_folder(source: Path, dest: Path, formats: str, **options: Any) -> Manifest:
    """`pss-convert` as a function, silently."""
    settings = Options(**{"formats": tuple(formats.split(",")), "shard_size": 20, "jobs": 2} | options)
    return convert(str(source), dest, settings, Silent())


@dataclass(frozen=True)
class Disk:
    """A small file system of its own."""

    path: Path

    def leave(self, free: int) -> None:
        """Fill it so that `free` bytes are left, rounded up to whole pages; what a test wrote stays."""
        filler = self.path / ".filler"
        filler.unlink(missing_ok=True)
        state = os.statvfs(self.path)
        pages = state.f_bavail - -(-free // state.f_bsize)
        assert pages >= 0, f"there are not even {free} bytes on it"
        filler.write_bytes(bytes(pages * state.f_bsize))

    def seal(self) -> None:
        """From now on nothing can be written on it."""
        subprocess.run(["mount", "-o", "remount,ro", str(self.path)], check=True, timeout=60)

    def files(self) -> list[str]:
        """Every file and folder on it, hidden ones too, but for what fills it."""
        return sorted(str(one.relative_to(self.path)) for one in self.path.rglob("*") if one.name != ".filler")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Disk]]:
    """Makes file systems of so many bytes, to be filled; skips, with the reason, where none can be mounted."""
    mounted: list[Path] = []

    def make(size: int) -> Disk:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        except FileNotFoundError:
            pytest.skip("no small file system can be mounted here: there is no mount command")
        if done.returncode:
            pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return Disk(folder)

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=60)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


class Silent:
    """Progress that nobody watches."""

    def start(self, phase: str, total: int) -> None: ...

    def advance(self, images: int) -> None: ...
