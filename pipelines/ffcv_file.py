"""FFCV itself, kept at arm's length, and its .beton files: written under supervision, checked before they are read.

FFCV 1.0.2 waits for ever when one of its processes fails, and reads damaged files without complaint or crashes on
them. Nothing else in this project imports it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import multiprocessing
import os
import signal
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.base import DataError
from pipelines.scan import ImageFile

FFCV_VERSION = "1.0.2"
_STALLED = 120.0  # seconds without a new image after which writing counts as stuck
_MODES = 2  # of storing an image: 0 JPEG, 1 raw pixels


def import_ffcv() -> None:
    """Import FFCV; raises `DataError` where it is missing or of another version.

    It sets torch's thread count when it is imported, and again with every loader. Only numba's is meant to change.
    """
    try:
        found = importlib.metadata.version("ffcv")
    except importlib.metadata.PackageNotFoundError:
        raise DataError("FFCV is not installed; install the headers it needs, then run `make setup`") from None
    if found != FFCV_VERSION:
        raise DataError(f"FFCV {found} is installed; the loader is written for {FFCV_VERSION}: run `make setup`")
    import numba
    import torch

    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it imports distutils
            from ffcv.pipeline.compiler import Compiler
    except ImportError as error:
        raise DataError(f"FFCV cannot be imported ({error}); run `make setup`") from error
    torch.set_num_threads(threads)

    def set_num_threads(count: int) -> None:
        Compiler.num_threads = count
        numba.set_num_threads(count)

    Compiler.set_num_threads = set_num_threads


def open_beton(path: Path, labels: NDArray[np.int64]) -> Any:
    """FFCV's reader of `path`, after checking that following its pointers stays inside the file."""
    from ffcv.reader import Reader

    damaged = DataError(f"{path} is damaged or belongs to another data set; copy it again or convert anew")
    try:
        reader = Reader(str(path))
    except (AssertionError, ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
        raise damaged from error
    images, (ptr, size) = reader.metadata, (reader.alloc_table["ptr"], reader.alloc_table["size"])
    if list(reader.handlers) != ["image", "label", "index"] or len(images) != len(labels):
        raise damaged
    picture, end = images["f0"], reader.header["alloc_table_ptr"]
    order = np.argsort(ptr)
    sound = (
        end + reader.alloc_table.nbytes == path.stat().st_size
        and len(ptr) == len(labels)
        and bool((ptr + size <= end).all())
        and bool((picture["width"] > 0).all() and (picture["height"] > 0).all())
        and bool((picture["mode"] < _MODES).all())
        and np.array_equal(np.sort(picture["data_ptr"]), ptr[order])
        and np.array_equal(images["f1"], labels)
        and np.array_equal(images["f2"], np.arange(len(labels)))
    )
    if not sound:
        raise damaged
    return reader


def write_betons(
    betons: Mapping[Path, Sequence[ImageFile]],
    *,
    max_size: int,
    quality: int,
    jobs: int,
    progress: Callable[[int], None],
) -> None:
    """Write each file with its images in order, by FFCV's own writer; `progress` hears how many more are done.

    The writer runs in a process group of its own. If any of it fails, or nothing happens for two minutes, the group
    is killed and a `DataError` says why.
    """
    first = min(betons)
    task = _WriterTask(dict(betons), max_size, quality, jobs, f"{first}.log", f"{first}.error")
    context = multiprocessing.get_context("spawn")
    done = context.Value("Q", 0)
    process = context.Process(target=_write, args=(task, done), name="pss-ffcv-writer")
    process.start()
    try:
        told, moved = 0, time.monotonic()
        while process.is_alive():
            process.join(0.2)
            if (count := done.value) != told:
                progress(count - told)
                told, moved = count, time.monotonic()
            elif time.monotonic() - moved > _STALLED:
                raise DataError(f"FFCV's writer made no progress for {_STALLED:.0f} s and was stopped")
        if process.exitcode:
            raise DataError(f"FFCV's writer failed: {_last_words(task)}")
    finally:
        assert process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # it may not have made itself a group yet
        process.join()
    for name in (task.log, task.error):
        Path(name).unlink(missing_ok=True)
    for path in betons:
        with path.open("rb") as file:
            os.fsync(file.fileno())


@dataclass(frozen=True)
class _WriterTask:
    betons: dict[Path, Sequence[ImageFile]]
    max_size: int
    quality: int
    jobs: int
    log: str
    error: str


def _last_words(task: _WriterTask) -> str:
    for name in (task.error, task.log):
        with contextlib.suppress(OSError):
            lines = Path(name).read_text(errors="replace").split("\n")
            if spoken := [line.strip() for line in lines if line.strip()]:
                return spoken[-1]
    return "its process was killed, perhaps for want of memory"


class _Pictures:
    """The images as the writer wants them: decoded, RGB, with label and number."""

    def __init__(self, images: Sequence[ImageFile], task: _WriterTask, done: Synchronized[int]) -> None:
        self.images, self.task, self.done = images, task, done

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[NDArray[np.uint8], int, int]:
        image = self.images[i]
        try:
            encoded = Path(image.path).read_bytes()
            if zlib.crc32(encoded) != image.crc32:
                raise DataError("it changed while it was being converted")
            if min(image.height, image.width) * self.task.max_size < max(image.height, image.width):
                raise DataError(f"it is too narrow to be scaled down to {self.task.max_size} pixels")
            with Image.open(io.BytesIO(encoded)) as picture:
                pixels = np.array(picture.convert("RGB"))
        except Exception as error:
            Path(self.task.error).write_text(f"{image.path}: {error}")
            raise
        with self.done.get_lock():
            self.done.value += 1
        return pixels, image.label, i


def _write(task: _WriterTask, done: Synchronized[int]) -> None:
    """The writer process. FFCV's writer polls a counter that its workers advance, and never looks at the workers."""
    os.setsid()
    log = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import_ffcv()
    from ffcv import writer
    from ffcv.fields import IntField, RGBImageField

    workers: list[Any] = []

    class Worker(multiprocessing.get_context("fork").Process):  # type: ignore[misc]
        def start(self) -> None:
            super().start()
            workers.append(self)

    def sleep(seconds: float) -> None:
        """Called by the writer once all workers run, and then over and over."""
        if not any(thread.name == "watch" for thread in threading.enumerate()):
            threading.Thread(target=_watch, args=(list(workers),), name="watch", daemon=True).start()
            workers.clear()
        time.sleep(seconds)

    writer.Process, writer.sleep = Worker, sleep
    page = writer.MIN_PAGE_SIZE
    while page < 3 * task.max_size**2:  # no sample may be larger than a page
        page *= 2
    for path, images in task.betons.items():
        fields = {
            "image": RGBImageField("jpg", max_resolution=task.max_size, jpeg_quality=task.quality),
            "label": IntField(),
            "index": IntField(),
        }
        jobs = min(task.jobs, len(images))
        beton = writer.DatasetWriter(str(path), fields, page_size=page, num_workers=jobs)
        pictures = _Pictures(images, task, done)
        beton.from_indexed_dataset(pictures, chunksize=max(1, min(100, len(images) // jobs)))


def _watch(workers: Sequence[Any]) -> None:
    """End the process, and with it FFCV's endless wait, when a worker has failed."""
    while any(worker.exitcode is None for worker in workers):
        time.sleep(0.1)
        if any(worker.exitcode for worker in workers):
            os._exit(1)
