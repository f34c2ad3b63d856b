"""The reference back end: torchvision decodes, crops and resizes, in this thread or in worker threads.

Threads suffice, because decoding and resizing release the interpreter's lock. They end with the process however it
dies, start at once, and share the source's memory.
"""

from __future__ import annotations

import io
import threading
import weakref
from collections import deque
from collections.abc import Generator
from queue import SimpleQueue
from typing import Any

import numpy as np
import PIL
import torch
import torchvision.io
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from pipelines.base import DataConfig, DataError
from pipelines.geometry import evaluation_resize, random_crops
from pipelines.order import sample_numbers
from pipelines.planned import Decoded, PlannedLoader
from pipelines.source import Bytes, Source
from pipelines.unreadable import UNREADABLE, unreadable

_JPEG_MAGIC = b"\xff\xd8"
_BATCHES_AHEAD = 3
_JOIN_SECONDS = 5.0


def decode(encoded: Bytes, name: str) -> Tensor:
    """An image as RGB, uint8 (3, H, W), EXIF orientation ignored; `DataError` naming it if it is damaged."""
    if encoded[:2].tobytes() == _JPEG_MAGIC:
        writable = encoded if encoded.flags.writeable else encoded.copy()
        try:
            # The operator itself: its Python wrapper announces its own retirement on every call.
            pixels: Tensor = torch.ops.image.decode_jpeg(
                torch.from_numpy(writable), torchvision.io.ImageReadMode.RGB.value, False
            )
            return pixels
        except (RuntimeError, AttributeError):
            pass  # Pillow reads some that torchvision refuses, and says better what is wrong with the others
    try:
        with Image.open(io.BytesIO(encoded.data)) as image:
            deep = image.mode.startswith("I;16")  # Pillow's conversion would clip it instead of scaling it
            shallow = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)) if deep else image
            return torch.from_numpy(np.array(shallow.convert("RGB"))).permute(2, 0, 1)
    except UNREADABLE as error:
        raise unreadable(name, len(encoded), error) from error


class Decoder:
    """Turns sample numbers into a uint8 batch: `open` once, then `decode` for every image, from any thread."""

    def __init__(self, source: Source, config: DataConfig, train: bool, seed: int) -> None:
        self.source, self.config, self.train, self.seed = source, config, train, seed

    def open(self, step: DecodedStep) -> None:
        """Read the batch's files and decide its crops."""
        step.encoded = self.source.read_many(step.images_to_decode)
        heights, widths = self.source.sizes(sample_numbers(step.keys))
        if self.train:
            boxes = random_crops(heights, widths, step.keys, seed=self.seed, epoch=step.epoch, config=self.config)
            step.geometry = boxes.tolist()
        else:
            sizes, corners = evaluation_resize(heights, widths, self.config)
            step.geometry = np.concatenate([sizes, corners], axis=1).tolist()

    def decode(self, step: DecodedStep, number: int) -> None:
        """Decode image `number` of the batch and fill its rows."""
        side = self.config.img_size
        whole = decode(step.encoded[number], self.source.name(int(step.images_to_decode[number])))
        for row in range(number * step.crops_per_image, (number + 1) * step.crops_per_image):
            if self.train:
                top, left, height, width = step.geometry[row]
                pixels = self._resize(whole[:, top : top + height, left : left + width], [side, side])
            else:
                *size, top, left = step.geometry[row]
                pixels = self._resize(whole, size)[:, top : top + side, left : left + side]
            step.images[row].copy_(pixels)

    def _resize(self, pixels: Tensor, size: list[int]) -> Tensor:
        mode = InterpolationMode(self.config.interpolation)
        resized: Tensor = resize(pixels, size, interpolation=mode, antialias=True)
        return resized


class DecodedStep:
    """A batch being decoded, each image by whichever thread comes to it."""

    def __init__(
        self, epoch: int, keys: NDArray[np.int64], *, side: int, crops_per_image: int, pin_memory: bool
    ) -> None:
        self.epoch, self.keys, self.crops_per_image = epoch, keys, crops_per_image
        self.images_to_decode = sample_numbers(keys[::crops_per_image])
        with torch.inference_mode(False):  # the caller's mode: threads outside it could not write into the batch
            stored = torch.empty((len(keys), side, side, 3), dtype=torch.uint8, pin_memory=pin_memory)
        self.images = stored.permute(0, 3, 1, 2)  # (B, 3, S, S), channels last in memory like what decoders return
        self.encoded: list[Bytes] = []
        self.geometry: list[list[int]] = []  # per row the crop's box, or the resized size and the crop's corner
        self.num_decoded = 0
        self.done = threading.Event()
        self.failure: BaseException | None = None
        self._lock = threading.Lock()

    def finish_image(self) -> None:
        with self._lock:
            self.num_decoded += 1
            if self.num_decoded == len(self.images_to_decode):
                self.done.set()

    def fail(self, failure: BaseException) -> None:
        self.failure = failure
        self.done.set()


class _Workers:
    """Threads that decode images in the order of submission; ended by `stop`, at the latest when Python exits."""

    def __init__(self, decoder: Decoder, count: int) -> None:
        # a batch and the number of the image to decode, or -1: open it
        self._tasks: SimpleQueue[tuple[DecodedStep, int] | None] = SimpleQueue()
        stopping, begun = threading.Event(), threading.Barrier(count + 1)
        arguments = (decoder, self._tasks, stopping, begun)
        threads = [
            # Daemons, so that a read which never returns cannot keep the process from ending.
            threading.Thread(target=_work, args=arguments, name=f"pss-decode-{i}", daemon=True)
            for i in range(count)
        ]
        intra_op = torch.get_num_threads()
        for thread in threads:
            thread.start()
        begun.wait()
        torch.set_num_threads(intra_op)  # a worker's setting is also what threads started later would begin with
        self.stop = weakref.finalize(self, _stop, self._tasks, threads, stopping)

    def submit(self, step: DecodedStep) -> None:
        self._tasks.put((step, -1))


def _work(decoder: Decoder, tasks: SimpleQueue[Any], stopping: threading.Event, begun: threading.Barrier) -> None:
    torch.get_num_threads()  # torch sets up a thread at its first use; later, that would undo the next line
    torch.set_num_threads(1)
    begun.wait()
    while (task := tasks.get()) is not None:
        step, number = task
        if stopping.is_set() or step.failure is not None:
            continue
        try:
            if number >= 0:
                decoder.decode(step, number)
                step.finish_image()
            else:
                decoder.open(step)
                for i in range(len(step.images_to_decode)):
                    tasks.put((step, i))
        except BaseException as error:  # whatever it is, the reader of this batch must hear of it
            step.fail(error)


def _stop(tasks: SimpleQueue[Any], threads: list[threading.Thread], stopping: threading.Event) -> None:
    stopping.set()
    for _ in threads:
        tasks.put(None)
    for thread in threads:
        thread.join(_JOIN_SECONDS)


class TorchLoader(PlannedLoader):
    """torchvision's decoder in `num_workers` threads, or in the caller's own for 0."""

    backend = "torch"

    def __init__(self, source: Source, **settings: Any) -> None:
        super().__init__(source, **settings)
        self.source = source
        self._decoder = Decoder(source, self.config, self.train, self.seed)
        self._workers: _Workers | None = None

    def _batches(self, epoch: int, steps: list[NDArray[np.int64]]) -> Generator[Decoded]:
        self._stop_workers()
        if self.num_workers == 0:
            for keys in steps:
                step = self._step(epoch, keys)
                self._decoder.open(step)
                for number in range(len(step.images_to_decode)):
                    self._decoder.decode(step, number)
                yield step.images, keys
            return
        workers = self._workers = _Workers(self._decoder, self.num_workers)
        ahead: deque[DecodedStep] = deque()
        to_submit = deque(steps)
        try:
            for _ in steps:
                while to_submit and len(ahead) < _BATCHES_AHEAD:
                    ahead.append(self._step(epoch, to_submit.popleft()))
                    workers.submit(ahead[-1])
                step = ahead.popleft()
                self._wait(step)
                yield step.images, step.keys
        finally:
            workers.stop()

    def _step(self, epoch: int, keys: NDArray[np.int64]) -> DecodedStep:
        return DecodedStep(
            epoch,
            keys,
            side=self.config.img_size,
            crops_per_image=self.crops_per_image,
            pin_memory=self.device.type == "cuda",
        )

    def _wait(self, step: DecodedStep) -> None:
        """Until `step` is decoded; raises what its decoding raised, and `DataError` if it makes no progress."""
        before = -1
        while not step.done.wait(self.stall_seconds):
            if step.num_decoded == before:
                raise DataError(
                    f"no image was decoded for {self.stall_seconds:g} s; the threads wait for one of "
                    f"{len(step.images_to_decode)} images from {self.source.name(int(step.images_to_decode[0]))} on"
                )
            before = step.num_decoded
        if step.failure is not None:
            raise step.failure

    def _stop_workers(self) -> None:
        if self._workers is not None:
            self._workers.stop()
            self._workers = None

    def library_versions(self) -> dict[str, str]:
        return {"torch": str(torch.__version__), "torchvision": torchvision.__version__, "pillow": PIL.__version__}

    def close(self) -> None:
        super().close()
        self._stop_workers()
        self.source.close()
