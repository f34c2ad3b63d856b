"""NVIDIA DALI as decoder: of the cropped region alone on the CPU, of JPEG files on the GPU, or of both at once.

DALI gets encoded bytes and crop boxes from a callback that is a pure function of the step, so it keeps no order and
no random state of its own: resuming at any step, or with another number of ranks, gives the same images. What it
decodes on the GPU, it also crops and resizes there; what it decodes on the CPU is resized by threads.
"""

from __future__ import annotations

import contextlib
import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import nvidia.dali
import torch
import torch.utils.dlpack
import torchvision
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from pipelines.base import DataError
from pipelines.loaders.dali_formats import ForDali, dali_decodes, undecodable
from pipelines.loaders.dali_memory import AddressReader, address_reader
from pipelines.loaders.geometry import evaluation_resize, random_crops
from pipelines.loaders.order import EpochPlan, sample_numbers
from pipelines.loaders.planned import Decoded, PlannedLoader
from pipelines.loaders.resize import crop_and_resize, resize_and_crop
from pipelines.loaders.threads import FilledBatch, LatestThreads, Threads
from pipelines.loaders.waiting import LONG_SECONDS, WatchedThread
from pipelines.storage.source import Source

_PREFETCH = 2
_FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}

Keys = NDArray[np.int64]
Fill = Callable[[torch.Tensor, int, torch.Tensor], None]
"""Makes row (an int) of a batch from decoded pixels, (3, H, W), and writes it, (1, 3, S, S)."""


@dataclass(frozen=True)
class Fed:
    """A batch that DALI is working on, and the memory it reads without having copied it."""

    keys: Keys
    memory: tuple[Any, ...]


class DaliPipeline(ABC):
    """One DALI pipeline and what it is fed: batches given as keys, each decoded whole, in their order."""

    _reader: AddressReader | None = None  # without one, encoded images are handed over as arrays

    def __init__(self, loader: DaliLoader, max_images: int, device_id: int | None) -> None:
        self.loader = loader
        self._epoch = 0
        self._to_feed: Iterator[Keys] = iter(())
        self._in_flight: deque[Fed] = deque()
        self._finishing: deque[tuple[Fed, list[Any]]] = deque()  # a GPU may still be at those
        self._unreadable: DataError | None = None  # what ended the feeding
        self._thread = WatchedThread("DALI")
        self._max_images, self._device_id = max_images, device_id
        self._pipe: Any = self._defined()
        self._running = False

    def _defined(self) -> Any:
        pipe = Pipeline(
            batch_size=self._max_images,
            num_threads=max(1, self.loader.num_workers),
            device_id=self._device_id,
            prefetch_queue_depth=_PREFETCH,
        )
        with pipe:
            pipe.set_outputs(*self._graph())
        return pipe

    @abstractmethod
    def _graph(self) -> list[Any]:
        """Define DALI's operators; returns its outputs."""

    @abstractmethod
    def _numbers(self, keys: Keys) -> Keys | None:
        """What the graph is fed for the batch `keys` besides its images, (images, 2 x pairs); None for no pairs."""

    @abstractmethod
    def next(self) -> torch.Tensor:
        """The next batch, uint8 (B, 3, S, S), channels last in memory."""

    def begin(self, epoch: int, batches: Iterator[Keys]) -> None:
        """Decode `batches` from now on, and forget those before, which may have been left early."""
        self._to_feed, self._unreadable = iter(()), None
        if self._running:
            with contextlib.suppress(StopIteration):
                while True:
                    self._run()
            self._pipe.reset()
        else:
            self._pipe = self._pipe or self._defined()
            with self.loader.signs.long_part("the building of DALI's pipeline", LONG_SECONDS):
                self._pipe.build()  # which starts threads
            self._running = True
        self._in_flight.clear()
        self._epoch, self._to_feed = epoch, batches

    def _external(self, pairs: int) -> tuple[Any, list[Any]]:
        """The graph's inputs: encoded images, and so many pairs of numbers, int32.

        All numbers are one array: each that DALI is fed costs it 0.1 us an image, with the interpreter's lock.
        """
        kinds = [types.UINT8 if self._reader is None else types.INT64, *[types.INT32] * (pairs > 0)]
        encoded, *numbers = fn.external_source(
            source=self._feed, num_outputs=len(kinds), batch=True, no_copy=True, dtype=kinds, ndim=1
        )
        if self._reader is not None:
            encoded = self._reader(encoded)
        return encoded, [numbers[0][2 * pair : 2 * pair + 2] for pair in range(pairs)]

    def _feed(self) -> tuple[Any, ...]:
        """DALI's callback, run in the watched thread: the inputs of the next batch; StopIteration ends the epoch."""
        keys = next(self._to_feed)
        samples = sample_numbers(keys)[:: self.loader.crops_per_image]
        try:
            encoded, kept = self.loader.files.input(samples, self._reader)
            numbers = self._numbers(keys)
            inputs = (encoded,) if numbers is None else (encoded, numbers.astype(np.int32))
        except DataError as failure:  # not DALI's to know, which has batches before this one to deliver
            self._unreadable, self._to_feed = failure, iter(())
            raise StopIteration from failure
        self._in_flight.append(Fed(keys, (inputs, kept)))
        return inputs

    def _streams(self) -> list[Any]:
        """Those that wait for DALI's outputs."""
        return []

    def _run(self) -> tuple[Keys, Any]:
        """What DALI makes of the next batch."""
        streams = self._streams()
        try:
            outputs = self._thread.call(partial(self._pipe.run, *streams), self.loader.stall_seconds, self.loader.signs)
        except RuntimeError as error:
            suspects = np.concatenate([fed.keys[:: self.loader.crops_per_image] for fed in self._in_flight])
            raise undecodable(self.loader.source, sample_numbers(suspects), error) from error
        except StopIteration:
            if self._unreadable is not None:
                raise self._unreadable from None
            raise
        fed = self._in_flight.popleft()
        # A GPU's outputs are handed out before they are there: until then it may read what it was fed.
        self._finishing.append((fed, [stream.record_event() for stream in streams]))
        while self._finishing and all(event.query() for event in self._finishing[0][1]):
            self._finishing.popleft()
        return fed.keys, outputs

    def _boxes(self, keys: Keys) -> tuple[Keys, Keys]:
        """Training: what to decode of each image, (images, 4), and the crops within that, (images, crops, 4)."""
        heights, widths = self.loader.source.sizes(sample_numbers(keys))
        drawn = random_crops(
            heights, widths, keys, seed=self.loader.seed, epoch=self._epoch, config=self.loader.config
        ).reshape(-1, self.loader.crops_per_image, 4)
        corner = drawn[..., :2].min(axis=1)  # of the crops' common bounds
        extent = (drawn[..., :2] + drawn[..., 2:]).max(axis=1) - corner
        drawn[..., :2] -= corner[:, None]
        return np.concatenate([corner, extent], axis=1), drawn

    def _evaluation(self, keys: Keys) -> tuple[Keys, Keys]:
        """Evaluation: the size of the whole image resized, and the crop's corner in it, both (images, 2)."""
        return evaluation_resize(*self.loader.source.sizes(sample_numbers(keys)), self.loader.config)

    def rest(self) -> None:
        """Stop all threads until `begin`."""
        self._thread.stop()
        self._pipe, self._running = None, False
        self._in_flight.clear()
        self._finishing.clear()


class OnCpu(DaliPipeline):
    """DALI decodes; threads cut and resize, as the torch loader does, while DALI decodes the next batch."""

    def __init__(self, loader: DaliLoader, max_images: int) -> None:
        self._latest = LatestThreads(max(1, loader.num_workers), "resize")
        self._threads: Threads | None = None
        self._ahead: deque[FilledBatch] = deque()
        super().__init__(loader, max_images, None)

    def _graph(self) -> list[Any]:
        decoding = {"device": "cpu", "output_type": types.RGB, "adjust_orientation": False}
        if not self.loader.train:
            return [fn.decoders.image(self._external(0)[0], **decoding)]
        encoded, (corner, extent) = self._external(2)
        return [fn.decoders.image_slice(encoded, corner, extent, axes=[0, 1], **decoding)]

    def _numbers(self, keys: Keys) -> Keys | None:
        return self._boxes(keys)[0] if self.loader.train else None

    def begin(self, epoch: int, batches: Iterator[Keys]) -> None:
        self._latest.stop()
        super().begin(epoch, batches)
        self._ahead.clear()
        self._threads = self._latest.start()
        self._begin_next()

    def next(self) -> torch.Tensor:
        batch = self._ahead.popleft()
        self._begin_next()
        assert self._threads is not None
        return batch.wait(self._threads, self.loader.stall_seconds, "the resizing of a batch", self.loader.signs)

    def _begin_next(self) -> None:
        """Hand another decoded batch to the threads. A failure is for the reader of that batch."""
        try:
            keys, (decoded,) = self._run()
        except StopIteration:
            return
        except DataError as failure:
            self._ahead.append(FilledBatch(np.zeros(0, np.int64), 1, self.loader.memory.images(0, 0)))
            self._ahead[-1].fail(failure)
            return
        loader, crops = self.loader, self.loader.crops_per_image
        batch = FilledBatch(keys, len(decoded), loader.memory.images(len(keys), loader.side(self._epoch)))
        self._ahead.append(batch)
        # The tensors keep DALI's memory, which it does not use again while they live.
        pixels = [torch.utils.dlpack.from_dlpack(image).permute(2, 0, 1) for image in decoded]
        fill = self._fill_training(keys) if loader.train else self._fill_evaluation(keys)

        def fill_rows(number: int) -> None:
            for row in range(number * crops, (number + 1) * crops):
                fill(pixels[number], row, batch.rows[row])

        assert self._threads is not None
        for number in range(len(decoded)):
            self._threads.submit(partial(batch.attempt, partial(fill_rows, number)))

    def _fill_training(self, keys: Keys) -> Fill:
        boxes, interpolation = self._boxes(keys)[1].reshape(-1, 4).tolist(), self.loader.config.interpolation
        return lambda pixels, row, into: crop_and_resize(pixels, boxes[row], into, interpolation)

    def _fill_evaluation(self, keys: Keys) -> Fill:
        sizes, corners = (numbers.tolist() for numbers in self._evaluation(keys))
        interpolation = self.loader.config.interpolation
        return lambda pixels, row, into: resize_and_crop(pixels, sizes[row], corners[row], into, interpolation)

    def rest(self) -> None:
        self._latest.stop()
        super().rest()
        self._ahead.clear()


class InGraph(DaliPipeline):
    """DALI does everything, on `device`; on a GPU the images never visit the host."""

    def __init__(self, loader: DaliLoader, max_images: int, device: torch.device) -> None:
        self.device = device
        self._reader = address_reader(dali_decodes)
        super().__init__(loader, max_images, device.index)

    def _streams(self) -> list[Any]:
        return [torch.cuda.current_stream(self.device)] if self.device.type == "cuda" else []

    def _graph(self) -> list[Any]:
        config, crops = self.loader.config, self.loader.crops_per_image
        decoding: dict[str, Any] = {"device": "cpu", "output_type": types.RGB, "adjust_orientation": False}
        if self.device.type == "cuda":
            height, width = config.gpu_decoding.preallocate
            decoding |= {
                "device": "mixed",
                "hw_decoder_load": config.gpu_decoding.hardware_load,
                "preallocate_height_hint": height,
                "preallocate_width_hint": width,
                # Evaluation owes torchvision's pixels; training would pay for them with part of the decoder's rate.
                "jpeg_fancy_upsampling": not self.loader.train,
            }
        resizing = {"interp_type": _FILTERS[config.interpolation], "antialias": True}
        if not self.loader.train:
            encoded, (size, corner) = self._external(2)
            whole = fn.resize(fn.decoders.image(encoded, **decoding), size=fn.cast(size, dtype=types.FLOAT), **resizing)
            square = np.array([config.img_size, config.img_size], dtype=np.int32)
            return [fn.slice(whole, corner, square, axes=[0, 1])]
        encoded, (side, corner, extent, *boxes) = self._external(3 + (2 * crops if crops > 1 else 0))
        decoded = fn.decoders.image_slice(encoded, corner, extent, axes=[0, 1], **decoding)
        cut = [fn.slice(decoded, *box, axes=[0, 1]) for box in zip(boxes[::2], boxes[1::2], strict=True)]
        return [fn.resize(crop, size=fn.cast(side, dtype=types.FLOAT), **resizing) for crop in cut or [decoded]]

    def _numbers(self, keys: Keys) -> Keys | None:
        if not self.loader.train:
            return np.concatenate(self._evaluation(keys), axis=1)
        bounds, crops = self._boxes(keys)
        side = np.full((len(bounds), 2), self.loader.side(self._epoch))
        further = [crops.reshape(len(crops), -1)] if self.loader.crops_per_image > 1 else []
        return np.concatenate([side, bounds, *further], axis=1)

    def next(self) -> torch.Tensor:
        # DALI frees its memory in the order of torch's stream; without it, perhaps before torch has read it.
        _, outputs = self._run()
        crops = [torch.utils.dlpack.from_dlpack(output.as_tensor()) for output in outputs]  # each (images, S, S, 3)
        images: torch.Tensor = crops[0] if len(crops) == 1 else torch.stack(crops, dim=1).flatten(0, 1)
        if self.device.type == "cuda" and len(crops) == 1:
            images = images.clone()
        return images.permute(0, 3, 1, 2)


class DaliLoader(PlannedLoader):
    """DALI with `num_workers` threads (at least one); decodes on the GPU if `device` is one.

    There, `data.gpu_decoding` may have several pipelines take turns with the batches, and may give a share of every
    batch's images, its first ones, to the CPU.
    """

    backend = "dali"

    def __init__(self, source: Source, **settings: Any) -> None:
        super().__init__(source, **settings)
        self.source, self.files = source, ForDali(source, self.num_workers)
        wanted = self.config.gpu_decoding
        in_graph = self._decodes_in_graph()
        self._cpu_share = wanted.cpu_share if in_graph else 1.0
        images = self.batch_size // self.crops_per_image
        on_cpu = len(self._shares(np.zeros(self.batch_size, np.int64))[0]) // self.crops_per_image
        self._lanes: list[list[DaliPipeline | None]] = [
            [
                OnCpu(self, on_cpu) if on_cpu else None,
                InGraph(self, images, self.device) if on_cpu < images else None,
            ]
            for _ in range(wanted.pipelines if in_graph else 1)
        ]

    @property
    def batches_ahead(self) -> int:
        """See `PlannedLoader`; on the CPU, DALI is at one of them and the resizing at another."""
        return len(self._lanes) * _PREFETCH

    def _decodes_in_graph(self) -> bool:
        return self.device.type == "cuda"

    def _shares(self, keys: Keys) -> list[Keys]:
        """The rows of a batch that are decoded on the CPU, and those that are not."""
        images = len(keys) // self.crops_per_image
        return np.split(keys, [round(images * self._cpu_share) * self.crops_per_image])

    def _share_of_lane(self, steps: EpochPlan, lane: int, share: int) -> Iterator[Keys]:
        """What the pipeline of a lane that decodes this share of a batch is fed, made as it asks for it."""
        for number in range(lane, len(steps), len(self._lanes)):
            if len(keys := self._shares(steps[number])[share]):
                yield keys

    def _batches(self, epoch: int, steps: EpochPlan) -> Generator[Decoded]:
        for number, lane in enumerate(self._lanes):
            for share, pipeline in enumerate(lane):
                if pipeline is not None:
                    pipeline.begin(epoch, self._share_of_lane(steps, number, share))
        for number, keys in enumerate(steps):
            lane = self._lanes[number % len(self._lanes)]
            parts = [
                pipeline.next().to(self.device, non_blocking=True)
                for share, pipeline in zip(self._shares(keys), lane, strict=True)
                if pipeline is not None and len(share)
            ]
            yield parts[0] if len(parts) == 1 else torch.cat(parts), keys

    def library_versions(self) -> dict[str, str]:
        versions = {"dali": nvidia.dali.__version__}
        if self._decodes_in_graph():
            versions["decoding"] = f"on a GPU, {self.config.gpu_decoding}"
        if self._cpu_share:
            versions["torchvision"] = torchvision.__version__
        return versions

    def _rest(self, ended: bool) -> None:
        self.source.close()
        self.files.stop()
        if ended and self._decodes_in_graph():
            return  # the next epoch goes on with it: on a GPU a pipeline takes long to build
        for pipeline in itertools.chain(*self._lanes):
            if pipeline is not None:
                pipeline.rest()

    def close(self) -> None:
        super().close()
        self._rest(ended=False)
