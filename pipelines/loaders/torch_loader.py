"""The reference back end: torchvision decodes, crops and resizes, in this thread or in worker threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import PIL
import torch
import torchvision.io
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipelines.base import DataConfig
from pipelines.loaders.geometry import evaluation_resize, random_crops
from pipelines.loaders.order import EpochPlan, sample_numbers
from pipelines.loaders.planned import Decoded, PlannedLoader
from pipelines.loaders.resize import crop_and_resize, resize_and_crop
from pipelines.loaders.threads import FilledBatch, LatestThreads, Threads
from pipelines.storage.images import open_image
from pipelines.storage.source import Bytes, Source
from pipelines.storage.unreadable import UNREADABLE, unreadable

_JPEG_MAGIC = b"\xff\xd8"
_JPEG_DECODER = torch.ops.image.decode_jpeg.default
_RGB = torchvision.io.ImageReadMode.RGB.value
_BATCHES_AT_ONCE = 3
_IMAGES_AT_ONCE = 8


def decode(encoded: Bytes, name: str) -> Tensor:
    """An image as RGB, uint8 (3, H, W), EXIF orientation ignored; `DataError` naming it if it is damaged."""
    pixels = _decode_jpeg(encoded)
    return _decode_other(encoded, name) if pixels is None else pixels


def _decode_jpeg(encoded: Bytes) -> Tensor | None:
    """torchvision's decoder; None for what is no JPEG, or one that it refuses."""
    if encoded[:2].tobytes() != _JPEG_MAGIC:
        return None
    writable = encoded if encoded.flags.writeable else encoded.copy()
    try:
        # The operator itself: its Python wrapper announces its own retirement on every call.
        pixels: Tensor = _JPEG_DECODER(torch.from_numpy(writable), _RGB, False)
        return pixels
    except (RuntimeError, AttributeError):
        return None  # Pillow reads some that torchvision refuses, and says better what is wrong with the others


def _decode_other(encoded: Bytes, name: str) -> Tensor:
    """Pillow's decoder."""
    try:
        with open_image(encoded.data) as image:
            deep = image.mode.startswith("I;16")  # Pillow's conversion would clip it instead of scaling it
            shallow = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)) if deep else image
            return torch.from_numpy(np.array(shallow.convert("RGB"))).permute(2, 0, 1)
    except UNREADABLE as error:
        raise unreadable(name, len(encoded), error) from error


class DecodedStep(FilledBatch):
    """A batch being decoded."""

    def __init__(self, epoch: int, keys: NDArray[np.int64], images: Tensor, *, crops_per_image: int) -> None:
        self.epoch, self.crops_per_image = epoch, crops_per_image
        self.images_to_decode = sample_numbers(keys[::crops_per_image])
        super().__init__(keys, len(self.images_to_decode), images)
        self.encoded: list[Bytes] = []
        self.geometry: list[list[int]] = []  # per row the crop's box, or the resized size and the crop's corner


class Decoder:
    """Turns sample numbers into a uint8 batch: `open` once, then `decode` for all images, from any threads."""

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

    def decode(self, step: DecodedStep, numbers: range) -> None:
        """Decode these images of the batch and fill their rows."""
        interpolation, crops = self.config.interpolation, step.crops_per_image
        for number in numbers:
            whole = _decode_jpeg(step.encoded[number])
            if whole is None:
                name = self.source.name(int(step.images_to_decode[number]))
                whole = _decode_other(step.encoded[number], name)
            for row in range(number * crops, (number + 1) * crops):
                if self.train:
                    crop_and_resize(whole, step.geometry[row], step.rows[row], interpolation)
                else:
                    height, width, *corner = step.geometry[row]
                    resize_and_crop(whole, (height, width), corner, step.rows[row], interpolation)


class TorchLoader(PlannedLoader):
    """torchvision's decoder in `num_workers` threads, or in the caller's own for 0."""

    backend = "torch"
    batches_ahead = _BATCHES_AT_ONCE - 1

    def __init__(self, source: Source, **settings: Any) -> None:
        super().__init__(source, **settings)
        self.source = source
        self._decoder = Decoder(source, self.config, self.train, self.seed)
        self._threads = LatestThreads(self.num_workers, "decode")

    def _batches(self, epoch: int, steps: EpochPlan) -> Generator[Decoded]:
        if self.num_workers == 0:
            for keys in steps:
                step = self._step(epoch, keys)
                self._decoder.open(step)
                self._decoder.decode(step, range(len(step.images_to_decode)))
                yield step.images, keys
            return
        threads = self._threads.start()
        ahead: deque[DecodedStep] = deque()
        to_submit = iter(steps)
        try:
            for _ in range(len(steps)):
                for keys in islice(to_submit, _BATCHES_AT_ONCE - len(ahead)):
                    ahead.append(self._step(epoch, keys))
                    self._submit(threads, ahead[-1])
                step = ahead.popleft()
                first = self.source.name(int(step.images_to_decode[0]))
                waiting_for = f"one of {len(step.images_to_decode)} images from {first} on"
                yield step.wait(threads, self.stall_seconds, waiting_for, self.signs), step.keys
        finally:
            threads.stop()

    def _submit(self, threads: Threads, step: DecodedStep) -> None:
        count = len(step.images_to_decode)
        # As many at once as leaves every thread several turns at the batch, so that none waits long for the last.
        share = min(_IMAGES_AT_ONCE, max(1, count // (4 * self.num_workers)))

        def open_and_decode() -> None:
            self._decoder.open(step)
            for first in range(0, count, share):
                numbers = range(first, min(first + share, count))
                threads.submit(partial(step.attempt, partial(self._decoder.decode, step, numbers), fills=len(numbers)))

        threads.submit(partial(step.attempt, open_and_decode, fills=0))

    def _step(self, epoch: int, keys: NDArray[np.int64]) -> DecodedStep:
        images = self.memory.images(len(keys), self.side(epoch))
        return DecodedStep(epoch, keys, images, crops_per_image=self.crops_per_image)

    def _rest(self, ended: bool) -> None:
        self.source.close()

    def library_versions(self) -> dict[str, str]:
        return {"torch": str(torch.__version__), "torchvision": torchvision.__version__, "pillow": PIL.__version__}

    def close(self) -> None:
        super().close()
        self._threads.stop()
        self.source.close()
