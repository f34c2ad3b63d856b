"""FFCV as decoder and resizer, for nodes with few cores: it reads re-encoded images from one .beton file.

FFCV's loop runs a decoder of ours, compiled by numba, that takes sample and crop of each place from arrays filled
before the epoch and notes what the JPEG library refuses. Order, crops and labels are those of the other back ends;
pixels differ, because images were scaled down and encoded again, and because FFCV always averages areas.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.base import DataError
from pipelines.ffcv_file import FFCV_VERSION, import_ffcv, open_beton
from pipelines.geometry import evaluation_resize, random_crops, scale_boxes
from pipelines.order import sample_numbers
from pipelines.planned import Decoded, PlannedLoader
from pipelines.source import ConvertedTable

import_ffcv()
import numba  # noqa: E402
from ffcv.fields.decoders import SimpleRGBImageDecoder  # noqa: E402
from ffcv.libffcv import imdecode, resize_crop  # noqa: E402
from ffcv.loader import Loader as BetonLoader  # noqa: E402
from ffcv.loader.epoch_iterator import EpochIterator  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from numba.extending import intrinsic  # noqa: E402

_log = logging.getLogger(__name__)
_POLL = 1.0  # seconds between looks at whether FFCV's thread still lives
_STOP_SECONDS = 10.0  # a thread that has not ended by then is left behind
_BATCHES_AHEAD = 3
_RAW = 1  # how FFCV marks an image stored as pixels
_DONE, _FAILED = 1, 2  # what became of a place

EVALUATION_WARNING = (
    "evaluating on re-encoded, downscaled images: the accuracy is not comparable with that on the original ones"
)


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(typing_context: Any, address: Any) -> Any:
    """An integer as a pointer, so that compiled code sees an array that changes between epochs."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return numba.types.voidptr(address), generate


class _PlannedCrops(SimpleRGBImageDecoder):  # type: ignore[misc]
    """Fills place p of the epoch with box `boxes[p]` of sample `samples[p]`, decoding once per `crops` places.

    `state[p]` becomes `_DONE`, or `_FAILED` if the JPEG library refuses the image.
    """

    def __init__(
        self,
        side: int,
        crops: int,
        samples: NDArray[np.int64],
        boxes: NDArray[np.int32],
        state: NDArray[np.int32],
    ) -> None:
        super().__init__()
        self.side, self.crops, self.samples, self.boxes, self.state = side, crops, samples, boxes, state

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
        pixels, whole = (self.side, self.side, 3), np.dtype(np.uint8)
        largest = int(self.metadata["height"].max()) * int(self.metadata["width"].max()) * 3
        state = previous_state.__class__(jit_mode=True, device=previous_state.device, shape=pixels, dtype=whole)
        return state, (AllocationQuery(pixels, whole), AllocationQuery((largest,), whole))

    def generate_code(self) -> Callable[..., Any]:
        read = self.memory_read
        each = Compiler.get_iterator()
        decode_jpeg, resize = Compiler.compile(imdecode), Compiler.compile(resize_crop)
        places, crops = len(self.boxes), self.crops
        samples_at, boxes_at, state_at = (a.ctypes.data for a in (self.samples, self.boxes, self.state))

        def decode(batch: Any, memory: Any, metadata: Any, storage: Any) -> Any:
            out, scratch = memory
            samples = numba.carray(_pointer(samples_at), (places,), dtype=np.int64)
            boxes = numba.carray(_pointer(boxes_at), (places, 4), dtype=np.int32)
            # not uint8: FFCV declares numba's type of a contiguous uint8 vector read-only, for everyone
            state = numba.carray(_pointer(state_at), (places,), dtype=np.int32)
            for image in each(len(batch) // crops):
                row = image * crops
                field = metadata[samples[batch[row]]]
                encoded = read(field["data_ptr"], storage)
                height, width = np.uint32(field["height"]), np.uint32(field["width"])
                pixels = scratch[row][: 3 * height * width].reshape(height, width, 3)
                outcome = _DONE
                if field["mode"] == _RAW:
                    pixels[:] = encoded.reshape(height, width, 3)
                elif decode_jpeg(encoded, pixels, height, width, height, width, 0, 0, 1, 1, False, False) != 0:
                    outcome = _FAILED
                for crop in range(crops):
                    place = batch[row + crop]
                    top, left = boxes[place, 0], boxes[place, 1]
                    resize(pixels, top, top + boxes[place, 2], left, left + boxes[place, 3], out[row + crop])
                    state[place] = outcome
            return out[: len(batch)]

        decode.is_parallel = True  # type: ignore[attr-defined]
        return decode


class _Epoch(EpochIterator):  # type: ignore[misc]
    """FFCV's thread, which keeps what stopped it instead of printing it and leaving its reader waiting."""

    failure: BaseException | None = None

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:
            self.failure = error

    def next_batch(self, stall_seconds: float) -> tuple[Any, ...]:
        """Views into memory that FFCV will use again. `DataError` if the thread has ended or does nothing."""
        began = time.monotonic()
        while True:
            if time.monotonic() - began > stall_seconds:
                raise DataError(f"FFCV delivered nothing for {stall_seconds:g} s; see if its disk does")
            alive = self.is_alive()  # asked first: what it put before it ended must not be missed
            try:
                _, result = self.output_queue.get(timeout=min(_POLL, stall_seconds) if alive else 0)
                views: tuple[Any, ...] = result
                return views
            except Empty:
                if not alive:
                    reason = str(self.failure).split("\n")[0]
                    raise DataError(f"FFCV stopped in mid-epoch: {reason}") from self.failure

    def stop(self) -> None:
        """End the thread and wait for it. FFCV's own `close` lets it go on while its queue has room."""
        self.iter_ixes = iter(())
        deadline = time.monotonic() + _STOP_SECONDS
        while self.is_alive() and time.monotonic() < deadline:
            while not self.output_queue.empty():
                self.output_queue.get()
            self.join(0.05)
        self.close()


class FfcvLoader(PlannedLoader):
    """FFCV with `num_workers` threads (at least one)."""

    backend = "ffcv"

    def __init__(self, root: Path, split: str, **settings: Any) -> None:
        table = ConvertedTable(root, split)
        if table.entry.beton is None:
            raise DataError(
                f"the {table.split} split of {root} has no FFCV file; use loader='auto', or convert with --format ffcv"
            )
        super().__init__(table, **settings)
        table.check_size(table.entry.beton)
        self._path = root / table.entry.beton
        picture = open_beton(self._path, table.labels).metadata["f0"]
        self._stored = np.stack([picture["height"], picture["width"]], axis=1).astype(np.int64)  # (N, 2)
        places = self.steps_per_epoch * self.batch_size  # of an epoch on this rank
        self._samples = np.zeros(places, dtype=np.int64)
        self._boxes = np.zeros((places, 4), dtype=np.int32)
        self._state = np.zeros(places, dtype=np.int32)
        decoder = _PlannedCrops(self.config.img_size, self.crops_per_image, self._samples, self._boxes, self._state)
        self._threads = min(max(1, self.num_workers), numba.config.NUMBA_NUM_THREADS)
        self._beton = BetonLoader(
            str(self._path),
            batch_size=self.batch_size,
            num_workers=self._threads,
            os_cache=True,
            pipelines={"image": [decoder], "index": None, "label": None},
            batches_ahead=_BATCHES_AHEAD,
        )
        self._running: _Epoch | None = None
        self.warning = None if self.train else EVALUATION_WARNING
        if self.warning:
            _log.warning("%s: %s", self._path, self.warning)

    def _batches(self, epoch: int, steps: list[NDArray[np.int64]]) -> Generator[Decoded]:
        self._stop()  # the crops may change only when nobody reads them
        if not steps:
            return
        keys = np.concatenate(steps)
        self._samples[: len(keys)] = sample_numbers(keys)
        self._boxes[: len(keys)] = self._crops(epoch, keys)
        self._state[:] = 0
        Compiler.set_num_threads(self._threads)
        running = self._running = _Epoch(self._beton, np.arange(len(keys), dtype=np.uint64))
        first = 0
        try:
            for step in steps:
                (pixels,) = running.next_batch(self.stall_seconds)
                state = self._state[first : first + len(step)]
                first += len(step)
                if (bad := sample_numbers(step[state != _DONE])).size:
                    raise DataError(
                        f"{self._path}, sample {bad[0]} cannot be decoded; copy the file again or convert anew"
                    )
                yield self._copy(pixels), step
        finally:
            running.stop()

    def _crops(self, epoch: int, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        samples = sample_numbers(keys)
        heights, widths = self.table.sizes(samples)
        if self.train:
            sizes = np.stack([heights, widths], axis=1)
            boxes = random_crops(heights, widths, keys, seed=self.seed, epoch=epoch, config=self.config)
        else:
            sizes, corners = evaluation_resize(heights, widths, self.config)
            boxes = np.concatenate([corners, np.full_like(corners, self.config.img_size)], axis=1)
        return scale_boxes(boxes, sizes, self._stored[samples])

    def _copy(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        """Out of the memory that FFCV will use again; uint8 (B, 3, S, S), channels last in memory."""
        images = torch.from_numpy(pixels)
        images = images.pin_memory() if self.device.type == "cuda" else images.clone()
        return images.permute(0, 3, 1, 2)

    def library_versions(self) -> dict[str, str]:
        return {"ffcv": FFCV_VERSION}

    def _stop(self) -> None:
        if self._running is not None:
            self._running.stop()
            self._running = None

    def close(self) -> None:
        super().close()
        self._stop()
