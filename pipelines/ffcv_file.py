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
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

    The writer runs in a session of its own. If any of it fails, or nothing happens for two minutes, all of it is
    ended and a `DataError` says why.
    """
    first = min(betons)
    task = _WriterTask(dict(betons), max_size, quality, jobs, f"{first}.error")
    log = Path(f"{first}.log")
    ours, theirs = os.pipe()  # a byte for every image written
    # Not multiprocessing: its resource tracker, shared with the parent, would report there what a failure leaves over.
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import run_writer; run_writer({theirs})"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=[theirs],
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
        )
    os.close(theirs)
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:  # it has failed already
            pickle.dump(task, process.stdin)
        _follow(process, ours, progress)
        if process.returncode:
            raise DataError(f"FFCV's writer failed: {_last_words(Path(task.error), log)}")
    finally:
        os.close(ours)
        _end(process)
    log.unlink()
    for path in betons:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _follow(process: subprocess.Popen[bytes], finished: int, progress: Callable[[int], None]) -> None:
    """Count the images written until the writer ends."""
    moved = time.monotonic()
    while process.poll() is None:
        if select.select([finished], [], [], 0.2)[0] and (count := len(os.read(finished, 1 << 16))):
            progress(count)
            moved = time.monotonic()
        elif time.monotonic() - moved > _STALLED:
            raise DataError(f"FFCV's writer made no progress for {_STALLED:.0f} s and was stopped")
    if process.returncode == 0:
        while rest := os.read(finished, 1 << 16):
            progress(len(rest))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End whatever is left of the writer's session, first in a way that lets Python remove its shared memory."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
            return


@dataclass(frozen=True)
class _WriterTask:
    betons: dict[Path, Sequence[ImageFile]]
    max_size: int
    quality: int
    jobs: int
    error: str


def _last_words(*files: Path) -> str:
    for file in files:
        with contextlib.suppress(OSError):
            if spoken := [line.strip() for line in file.read_text(errors="replace").split("\n") if line.strip()]:
                return spoken[-1]
    return "its process was killed, perhaps for want of memory"


class _Pictures:
    """The images as the writer wants them: decoded, RGB, with label and number."""

    def __init__(self, images: Sequence[ImageFile], task: _WriterTask, finished: int) -> None:
        self.images, self.task, self.finished = images, task, finished

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
        os.write(self.finished, b".")
        return pixels, image.label, i


def run_writer(finished: int) -> None:
    """The writer process: its task comes from stdin, and `finished` is the pipe to report images on.

    FFCV's writer polls a counter that its workers advance, and never looks at the workers.
    """
    task: _WriterTask = pickle.load(sys.stdin.buffer)
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
        pictures = _Pictures(images, task, finished)
        beton.from_indexed_dataset(pictures, chunksize=max(1, min(100, len(images) // jobs)))


def _watch(workers: Sequence[Any]) -> None:
    """End the process, and with it FFCV's endless wait, when a worker has failed."""
    codes: list[int | None] = [None]
    while None in codes:
        time.sleep(0.1)
        codes = [worker.exitcode for worker in workers]
        if any(codes):
            os._exit(1)
