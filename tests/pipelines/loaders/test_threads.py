"""What a loader starts ends with the iterator that needed it, however that is left, and Python can always exit."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
import warm
from test_loaders import BACKENDS

from pipelines import DataConfig, Loader, build
from pipelines.loaders.prefetch import Prefetcher
from pipelines.loaders.threads import PixelMemory
from pipelines.loaders.waiting import WatchedThread

ROOT = Path(__file__).parents[3]


def counts() -> tuple[int, int, int]:
    """Threads that Python knows of, all threads, and open files, without those that only garbage holds."""
    gc.collect()
    return now()


def now() -> tuple[int, int, int]:
    return (len(threading.enumerate()), *(len(list(Path(f"/proc/self/{kind}").iterdir())) for kind in ("task", "fd")))


def settled(before: tuple[int, int, int]) -> bool:
    """Whether there are no more than before; a thread that has been joined leaves the system a moment later."""
    gc.collect()  # takes long in a process that has run many tests
    deadline = time.monotonic() + 5
    while not (fits := all(one <= then for one, then in zip(now(), before, strict=True))):
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return fits


def broken_off(loader: Loader) -> None:
    for _ in loader:
        break


def failed(loader: Loader) -> None:
    try:
        for _ in loader:
            raise KeyError
    except KeyError:
        pass


def dropped(loader: Loader) -> None:
    next(iter(loader))


def never_begun(loader: Loader) -> None:
    iter(loader)


def two_at_once(loader: Loader) -> None:
    first, second = iter(loader), iter(loader)
    next(second)
    with pytest.raises(RuntimeError, match="iterated anew"):
        list(first)


def exhausted(loader: Loader) -> None:
    for _ in loader:
        pass


LEFT = [broken_off, failed, dropped, never_begun, two_at_once, exhausted]


@pytest.mark.parametrize("prefetch", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", ["folder", pytest.param("converted", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_end_with_the_iterator(
    backend: str, kind: str, prefetch: bool, image_root: Path, converted_root: Path
) -> None:
    if (backend, kind) == ("ffcv", "folder"):
        pytest.skip("FFCV reads no folders")
    root = image_root if kind == "folder" else converted_root
    loader = build(
        root, "train", train=True, config=DataConfig(img_size=32), batch_size=4, loader=backend, num_workers=2
    )
    if backend == "ffcv":
        list(loader)  # numba's threads are the process's
    for thread in threading.enumerate():
        if thread.name == "pss-plan":  # which ends by itself
            thread.join()
    before = counts()[:2]
    if prefetch:
        loader = Prefetcher(loader, 1)  # has room for one batch, so that its thread lives as long as it is read
    broken_off(loader)  # opens the files of a converted set, which stay open
    before = (*before, counts()[2])
    for leave in LEFT:
        leave(loader)
        assert settled(before), leave
    left = iter(loader)
    next(left)
    assert counts()[0] > before[0]
    del left
    assert settled(before)
    loader.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loader_that_is_dropped_leaves_nothing(backend: str, converted_root: Path) -> None:
    def use() -> None:
        broken_off(
            build(converted_root, "val", train=False, config=DataConfig(img_size=32), batch_size=4, loader=backend)
        )

    use()
    before = counts()
    for _ in range(5):
        use()
    assert settled(before)


_LEAVE = """
import sys, threading
import numpy as np
from pipelines import DataConfig, build
from pipelines.loaders import prefetch
from pipelines.storage import reading

_, root, backend, ahead, stuck = sys.argv
reading._JOIN_SECONDS = 0.5 if stuck == "1" else 1000  # a wait for one another would show
loader = build(root, "train", train=True, config=DataConfig(img_size=32), batch_size=4, loader=backend, num_workers=2)
if stuck == "1":
    loader.stall_seconds = 2
if ahead == "1":
    loader = prefetch.Prefetcher(loader, 1 << 20)
batches = iter(loader)
next(batches)
if stuck == "1":
    np.fromfile = lambda *_, **__: threading.Event().wait()
    list(batches)
print("leaving", flush=True)
"""


@pytest.mark.parametrize(
    ("backend", "ahead", "stuck"),
    [("torch", 1, 0), ("torch", 0, 1), ("dali", 1, 0), ("dali", 1, 1)],
)
def test_python_exits_while_a_loader_is_read(backend: str, ahead: int, stuck: int, image_root: Path) -> None:
    """And while a read never returns, as on a disk that is gone."""
    words = [sys.executable, "-c", _LEAVE, str(image_root), backend, str(ahead), str(stuck)]
    with warm.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, told = process.communicate(timeout=60)
    assert (out, process.returncode) == (("", 1) if stuck else ("leaving\n", 0)), told
    if stuck:
        assert told.rstrip().splitlines()[-1].startswith("pipelines.base.DataError: ")


def test_what_is_called_does_not_outlive_its_failure() -> None:
    """A pipeline that ended an epoch with StopIteration must not be kept by that."""

    class Owner:
        def end(self) -> None:
            raise StopIteration

    thread, owner = WatchedThread("test"), Owner()
    kept = weakref.ref(owner)
    gc.disable()
    try:
        with pytest.raises(StopIteration):
            thread.call(owner.end, 5)
        thread.stop()
        del owner
        assert kept() is None
    finally:
        gc.enable()


def test_memory_is_filled_again_once_nobody_holds_any_of_it():
    memory = PixelMemory()
    first = memory.images(4, 8)
    assert first.shape == (4, 3, 8, 8)
    assert first.is_contiguous(memory_format=torch.channels_last)
    place = first.data_ptr()
    part, array = first[1:2], first.numpy()
    others = [memory.images(4, 8)]
    del first
    others.append(memory.images(4, 8))
    del part
    others.append(memory.images(3, 8))
    assert place not in {other.data_ptr() for other in others}
    assert len({other.data_ptr() for other in others}) == 3
    del array
    smaller = memory.images(2, 8)
    assert smaller.data_ptr() == place
    del smaller, others
    larger = memory.images(4, 9)  # takes the place of the smaller ones
    assert len(memory._arrays) == 1
    larger.fill_(7)
    memory.clear()
    assert (larger == 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_that_is_held_keeps_its_pixels(backend: str, converted_root: Path) -> None:
    loader = build(converted_root, "train", train=True, config=DataConfig(img_size=32), batch_size=4, loader=backend)
    held = [(batch.images[2:], batch.images[2:].clone()) for _ in range(2) for batch in loader]
    used: set[int] = set()
    for batch in loader:
        used.add(batch.images.data_ptr())
        del batch
    loader.close()
    assert all(torch.equal(part, copy) for part, copy in held)
    assert len(used) < len(loader)  # memory that was given back is used again
