"""The reference back end: torchvision decodes, crops and resizes, in this process or in worker processes."""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import PIL
import torch
import torchvision.io
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from pipelines.base import Batch, DataConfig, DataError
from pipelines.geometry import evaluation_resize, random_crops
from pipelines.planned import PlannedLoader
from pipelines.source import Bytes, Source

_JPEG_MAGIC = b"\xff\xd8"


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
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{name} cannot be decoded: {error}") from error


class Decoder:
    """Turns sample numbers into a uint8 batch; the part that runs in the workers."""

    def __init__(self, source: Source, config: DataConfig, train: bool, seed: int) -> None:
        self.source, self.config, self.train, self.seed = source, config, train, seed

    def __call__(self, epoch: int, index: NDArray[np.int64]) -> Tensor:
        """Images of `index`, uint8 (B, 3, S, S)."""
        side = self.config.img_size
        encoded = self.source.read_many(index)
        heights, widths = self.source.sizes(index)
        out = torch.empty((len(index), 3, side, side), dtype=torch.uint8)
        if self.train:
            boxes = random_crops(heights, widths, index, seed=self.seed, epoch=epoch, config=self.config).tolist()
            for image, data, i, (top, left, height, width) in zip(out, encoded, index, boxes, strict=True):
                pixels = decode(data, self.source.name(int(i)))[:, top : top + height, left : left + width]
                image.copy_(self._resize(pixels, [side, side]))
        else:
            sizes, corners = evaluation_resize(heights, widths, self.config)
            rows = zip(out, encoded, index, sizes.tolist(), corners.tolist(), strict=True)
            for image, data, i, size, (top, left) in rows:
                pixels = self._resize(decode(data, self.source.name(int(i))), size)
                image.copy_(pixels[:, top : top + side, left : left + side])
        return out

    def _resize(self, pixels: Tensor, size: list[int]) -> Tensor:
        mode = InterpolationMode(self.config.interpolation)
        resized: Tensor = resize(pixels, size, interpolation=mode, antialias=True)
        return resized


class _DecodedSteps(Dataset[Tensor | str]):
    """What a worker holds. A failure comes back as its message: exceptions would arrive wrapped in a traceback."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def __getitem__(self, step: tuple[int, NDArray[np.int64]]) -> Tensor | str:
        try:
            return self.decoder(*step)
        except DataError as error:
            return str(error)


class _Steps:
    """The sampler: (epoch, sample numbers) of each batch to come."""

    def __init__(self) -> None:
        self.epoch = 0
        self.steps: list[NDArray[np.int64]] = []

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        return ((self.epoch, index) for index in self.steps)

    def __len__(self) -> int:
        return len(self.steps)


class TorchLoader(PlannedLoader):
    """torchvision's decoder; `num_workers` processes, or none for 0."""

    backend = "torch"

    def __init__(self, source: Source, **settings: Any) -> None:
        super().__init__(source, **settings)
        self.source = source
        self._decoder = Decoder(source, self.config, self.train, self.seed)
        self._steps = _Steps()
        self._workers: DataLoader[Tensor | str] | None = None
        self._results: Iterator[Tensor | str] = iter(())

    def _batches(self, epoch: int, steps: list[NDArray[np.int64]]) -> Generator[Batch]:
        if self.num_workers == 0:
            for index in steps:
                yield self.batch(self._decoder(epoch, index), index)
            return
        self._steps.epoch, self._steps.steps = epoch, steps
        self._results = iter(self._start_workers())
        for index in steps:
            try:
                images = next(self._results)
            except (RuntimeError, OSError, EOFError) as error:
                raise DataError(f"a loader process died ({error}); is there too little memory?") from error
            if isinstance(images, str):
                raise DataError(images)
            yield self.batch(images, index)

    def _start_workers(self) -> DataLoader[Tensor | str]:
        if self._workers is None:
            # Not fork: this process runs threads (torch's, CUDA's), whose locks a forked child may inherit held.
            # A fork server has none, and imports this module once for all workers.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            self._workers = DataLoader(
                _DecodedSteps(self._decoder),
                batch_size=None,
                sampler=self._steps,
                num_workers=self.num_workers,
                multiprocessing_context=context,
                persistent_workers=True,
                pin_memory=self.device.type == "cuda",
            )
        return self._workers

    def library_versions(self) -> dict[str, str]:
        return {"torch": str(torch.__version__), "torchvision": torchvision.__version__, "pillow": PIL.__version__}

    def close(self) -> None:
        super().close()
        self._results = iter(())
        self._workers = None  # the last reference: its destructor joins the workers
        self.source.close()
