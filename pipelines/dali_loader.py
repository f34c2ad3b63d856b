"""NVIDIA DALI as decoder and resizer, on the CPU or on the GPU.

DALI gets encoded bytes and crop boxes from a callback that is a pure function of the step, so it keeps no order and
no random state of its own: resuming at any step, or with another number of ranks, gives the same images.
"""

from __future__ import annotations

import contextlib
import io
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import nvidia.dali
import torch
import torch.utils.dlpack
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from pipelines.base import DataError
from pipelines.geometry import evaluation_resize, random_crops
from pipelines.order import sample_numbers
from pipelines.planned import Decoded, PlannedLoader
from pipelines.source import Source
from pipelines.unreadable import UNREADABLE, unreadable
from pipelines.watched import WatchedThread

_PREFETCH = 2
_DECODED = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF")
_REMEDY = "use loader='torch', or convert the data set with pss-convert"
_FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


@dataclass(frozen=True)
class _Step:
    """A batch that DALI is working on, and the memory it reads without having copied it."""

    keys: NDArray[np.int64]
    inputs: tuple[Any, ...]


class DaliLoader(PlannedLoader):
    """DALI with `num_workers` threads (at least one); decodes on the GPU if `device` is one."""

    backend = "dali"

    def __init__(self, source: Source, **settings: Any) -> None:
        super().__init__(source, **settings)
        self.source = source
        self._decoder = "mixed" if self.device.type == "cuda" else "cpu"
        self._epoch = 0
        self._to_feed: Iterator[NDArray[np.int64]] = iter(())
        self._in_flight: deque[_Step] = deque()
        self._thread = WatchedThread("DALI")
        self._pipe: Any = self._build()

    def _build(self) -> Any:
        device_id = None
        if self.device.type == "cuda":
            device_id = torch.cuda.current_device() if self.device.index is None else self.device.index
        pipe = Pipeline(
            batch_size=self.batch_size // self.crops_per_image,
            num_threads=max(1, self.num_workers),
            device_id=device_id,
            prefetch_queue_depth=_PREFETCH,
        )
        side = self.config.img_size
        decoding = {"device": self._decoder, "output_type": types.RGB, "adjust_orientation": False}
        resizing = {"interp_type": _FILTERS[self.config.interpolation], "antialias": True}
        geometry = types.INT32 if self.train else types.FLOAT
        crops = self.crops_per_image
        more = 2 * crops if crops > 1 else 0  # corners and extents of the crops within what is decoded
        with pipe:
            encoded, first, second, *boxes = fn.external_source(
                source=self._feed,
                num_outputs=3 + more,
                batch=True,
                no_copy=True,
                dtype=[types.UINT8, geometry] + [types.INT32] * (1 + more),
                ndim=1,
            )
            if self.train:
                decoded = fn.decoders.image_slice(encoded, first, second, axes=[0, 1], **decoding)
                cut = [fn.slice(decoded, boxes[i], boxes[crops + i], axes=[0, 1]) for i in range(crops) if more]
                images = [fn.resize(crop, size=[side, side], **resizing) for crop in cut or [decoded]]
            else:
                whole = fn.resize(fn.decoders.image(encoded, **decoding), size=first, **resizing)
                images = [fn.slice(whole, second, np.array([side, side], dtype=np.int32), axes=[0, 1])]
            pipe.set_outputs(*images)
        pipe.build()
        return pipe

    def _feed(self) -> tuple[Any, ...]:
        """DALI's callback, run in the watched thread: the inputs of the next step; StopIteration ends the epoch."""
        keys = next(self._to_feed)
        index, crops = sample_numbers(keys), self.crops_per_image
        encoded = self.source.read_many(index[::crops])
        heights, widths = self.source.sizes(index)
        geometry: list[NDArray[Any]]
        if self.train:
            drawn = random_crops(heights, widths, keys, seed=self.seed, epoch=self._epoch, config=self.config)
            boxes = drawn.astype(np.int32).reshape(-1, crops, 4)
            # One crop per image is decoded as such; of several, their common bounds.
            corner = boxes[..., :2].min(axis=1)
            extent = (boxes[..., :2] + boxes[..., 2:]).max(axis=1) - corner
            geometry = [corner, extent]
            if crops > 1:
                geometry += [*(boxes[..., :2] - corner[:, None]).swapaxes(0, 1), *boxes[..., 2:].swapaxes(0, 1)]
        else:
            sizes, corners = evaluation_resize(heights, widths, self.config)
            geometry = [sizes.astype(np.float32), corners.astype(np.int32)]
        inputs = (encoded, *map(np.ascontiguousarray, geometry))
        self._in_flight.append(_Step(keys, inputs))
        return inputs

    def _batches(self, epoch: int, steps: list[NDArray[np.int64]]) -> Generator[Decoded]:
        self._rewind()
        self._epoch, self._to_feed = epoch, iter(steps)
        for _ in steps:
            images = self._run()
            yield images, self._in_flight.popleft().keys

    def _run(self) -> torch.Tensor:
        """The next decoded batch, uint8 (B, 3, S, S), channels last in memory."""
        # DALI frees its memory in the order of this stream; without it, perhaps before torch has read it.
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        try:
            outputs = self._thread.call(partial(self._pipe.run, stream), self.stall_seconds)
        except RuntimeError as error:
            raise self._explain(error) from error
        crops = [torch.utils.dlpack.from_dlpack(output.as_tensor()) for output in outputs]  # each (images, S, S, 3)
        images: torch.Tensor = crops[0] if len(crops) == 1 else torch.stack(crops, dim=1).flatten(0, 1)
        if stream is not None and len(crops) == 1:
            images = images.clone()
        return images.permute(0, 3, 1, 2)  # on the CPU a view, which keeps memory alive that DALI never reuses

    def _rewind(self) -> None:
        """Drop what an iteration that was left early had in flight, and make DALI forget the end of the epoch."""
        self._to_feed = iter(())
        with contextlib.suppress(StopIteration):
            while True:
                self._run()
        self._in_flight.clear()
        self._pipe.reset()

    def _explain(self, error: RuntimeError) -> DataError:
        """DALI seldom says which image it could not decode: Pillow tries those it may have been."""
        suspects = [int(i) for step in self._in_flight for i in sample_numbers(step.keys[:: self.crops_per_image])]
        for i in suspects:
            encoded = self.source.read(i)
            try:
                with Image.open(io.BytesIO(encoded.data)) as image:
                    image.load()
                    if image.format not in _DECODED:
                        return DataError(
                            f"{self.source.name(i)} is a {image.format} image, which DALI cannot decode; {_REMEDY}"
                        )
            except UNREADABLE as reason:
                return unreadable(self.source.name(i), len(encoded), reason)
        names = ", ".join(self.source.name(i) for i in suspects[:3])
        return DataError(f"DALI cannot decode one of {len(suspects)} images ({names}, ...): {error}")

    def library_versions(self) -> dict[str, str]:
        return {"dali": f"{nvidia.dali.__version__}, {self._decoder} decoder"}

    def close(self) -> None:
        super().close()
        self._thread.stop()
        self._pipe = None
        self.source.close()
