"""FFCV as decoder and resizer, for nodes with few cores: it reads re-encoded images from one .beton file.

FFCV's loop runs a decoder of ours, compiled by numba, that takes image and crop of each place from an array filled
before the epoch and notes there what the JPEG library refuses. Order, crops and labels are those of the other back
ends; pixels differ, because images were scaled down and encoded again, and because FFCV always averages areas.

FFCV 1.0.2 reads damaged files without complaint, shows another sample's picture, or crashes. So whatever it reads is
compared with what the conversion noted of it: pointers and sizes before it opens the file, each image when first used.
"""

from __future__ import annotations

import functools
import logging
import time
import zlib
from collections.abc import Callable, Generator
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.base import DataError, choose_loader
from pipelines.loaders.geometry import scale_boxes
from pipelines.loaders.order import sample_numbers
from pipelines.loaders.planned import Decoded, PlannedLoader
from pipelines.loaders.watched import stalled
from pipelines.storage.beton import RAW, damaged_frame, stored_path
from pipelines.storage.ffcv_file import FFCV_VERSION, import_ffcv
from pipelines.storage.source import ConvertedTable

import_ffcv()
import numba  # noqa: E402
from ffcv.fields.decoders import SimpleRGBImageDecoder  # noqa: E402
from ffcv.libffcv import imdecode, resize_crop  # noqa: E402
from ffcv.loader import Loader as BetonLoader  # noqa: E402
from ffcv.loader.epoch_iterator import EpochIterator  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402

_log = logging.getLogger(__name__)
_POLL = 1.0  # seconds between looks at whether FFCV's thread still lives
_STOP_SECONDS = 10.0  # a thread that has not ended by then is left behind
_BATCHES_AHEAD = 3
_DONE, _FAILED = 1, 2  # what became of a place

EVALUATION_WARNING = (
    "evaluating on re-encoded, downscaled images: the accuracy is not comparable with that on the original ones"
)


_PLACE = np.dtype(
    [
        ("ptr", "<u8"),  # of the stored image, in the file
        ("size", "<u8"),
        ("mode", "<i4"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("box", "<i4", 4),  # top, left, height, width of the crop in it
        ("side", "<i4"),  # of the result, at most that of the loader's memory
        ("outcome", "<i4"),  # written by the decoder
    ]
)
"""What the decoder is told about one place of the epoch."""


class _PlannedCrops(SimpleRGBImageDecoder):  # type: ignore[misc]
    """Fills the places of an epoch as their rows of `_PLACE` say, decoding once per `crops` places.

    FFCV hands compiled code a field's metadata, one row per sample. It gets the plan in their stead, which may change
    between epochs, and whose `outcome` becomes `_DONE`, or `_FAILED` if the JPEG library refuses the image.
    """

    def __init__(self, side: int, crops: int) -> None:
        super().__init__()
        self.side, self.crops = side, crops

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
        pixels, whole = (self.side, self.side, 3), np.dtype(np.uint8)
        largest = int(self.metadata["height"].max()) * int(self.metadata["width"].max()) * 3
        state = previous_state.__class__(jit_mode=True, device=previous_state.device, shape=pixels, dtype=whole)
        return state, (AllocationQuery(pixels, whole), AllocationQuery((largest,), whole))

    def generate_code(self) -> Callable[..., Any]:
        return _decoder(Compiler.num_threads > 1, self.crops)


@functools.cache
def _decoder(parallel: bool, crops: int) -> Callable[..., Any]:
    """To be compiled, once for all loaders."""
    each = numba.prange if parallel else range
    decode_jpeg, resize = Compiler.compile(imdecode), Compiler.compile(resize_crop)

    def decode(batch: Any, memory: Any, plan: Any, storage: Any) -> Any:
        out, scratch = memory
        for image in each(len(batch) // crops):
            row = image * crops
            place = plan[batch[row]]
            encoded = storage[0][place["ptr"] : place["ptr"] + place["size"]]
            height, width = np.uint32(place["height"]), np.uint32(place["width"])
            pixels = scratch[row][: 3 * height * width].reshape(height, width, 3)
            outcome = _DONE
            if place["mode"] == RAW:
                pixels[:] = encoded.reshape(height, width, 3)
            elif decode_jpeg(encoded, pixels, height, width, height, width, 0, 0, 1, 1, False, False) != 0:
                outcome = _FAILED
            for crop in range(crops):
                place = plan[batch[row + crop]]
                top, left, crop_height, crop_width = place["box"]
                side = place["side"]
                small = out[row + crop].reshape(-1)[: side * side * 3].reshape(side, side, 3)
                resize(pixels, top, top + crop_height, left, left + crop_width, small)
                place["outcome"] = outcome
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
                raise stalled("FFCV delivered nothing", stall_seconds)
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
    """FFCV with `num_workers` threads (at least one).

    With `check_bytes` each stored image is compared with its checksum when it is first used.
    """

    backend = "ffcv"
    batches_ahead = _BATCHES_AHEAD + 1  # with the one that waits for room in the queue

    def __init__(self, root: Path, split: str, *, check_bytes: bool = True, **settings: Any) -> None:
        table = ConvertedTable(root, split)
        if table.entry.beton is None:
            raise DataError(
                f"the {table.split} split of {root} has no FFCV file; use {choose_loader('auto')}, or convert "
                "it with --format ffcv"
            )
        super().__init__(table, **settings)
        table.check_size(table.entry.beton)
        self._path = root / table.entry.beton
        self._rows = table.load_table(stored_path(self._path).name)
        if part := damaged_frame(self._path, self._rows, table.labels, table.manifest.made["options"]["max_size"]):
            raise DataError(f"{self._path}, {part}: it is damaged or belongs to another data set; copy it again")
        self._stored = np.stack([self._rows["height"], self._rows["width"]], axis=1).astype(np.int64)  # (N, 2)
        self._content = np.memmap(self._path, dtype=np.uint8, mode="r")
        self._unchecked = np.full(self.num_samples, check_bytes)
        places = self.steps_per_epoch * self.batch_size  # of an epoch on this rank
        self._plan = np.zeros(places, dtype=[("f0", _PLACE)])  # f0: FFCV's name of the first field, the image
        decoder = _PlannedCrops(self.config.img_size, self.crops_per_image)
        self._threads = min(max(1, self.num_workers), numba.config.NUMBA_NUM_THREADS)
        self._beton = BetonLoader(
            str(self._path),
            batch_size=self.batch_size,
            num_workers=self._threads,
            os_cache=True,
            pipelines={"image": [decoder], "index": None, "label": None},
            batches_ahead=_BATCHES_AHEAD,
        )
        self._beton.reader.metadata = self._plan
        self._running: _Epoch | None = None
        self._compile()
        self.warning = None if self.train else EVALUATION_WARNING
        if self.warning:
            _log.warning("%s: %s", self._path, self.warning)

    def _compile(self) -> None:
        """Have all code compiled that an epoch runs, by running it on no places.

        numba compiles what is first called: half a minute and more where the cores are busy, which is no stall. So it
        happens here, where nobody watches, and leaves no files, which an unprivileged user may have no folder for.
        """
        Compiler.set_num_threads(self._threads)
        nothing = np.zeros(0, dtype=np.uint64)
        epoch = _Epoch(self._beton, nothing)
        epoch.join()
        epoch.run_pipeline(0, nothing, 0, None)
        epoch.close()

    def _batches(self, epoch: int, steps: list[NDArray[np.int64]]) -> Generator[Decoded]:
        self._stop()  # the crops may change only when nobody reads them
        if not steps:
            return
        keys = np.concatenate(steps)
        plan = self._plan["f0"][: len(keys)]
        for name in ("ptr", "size", "mode", "height", "width"):
            plan[name] = self._rows[name][sample_numbers(keys)]
        side = self.side(epoch)
        plan["box"], plan["side"], plan["outcome"] = self._crops(epoch, keys), side, 0
        Compiler.set_num_threads(self._threads)
        running = self._running = _Epoch(self._beton, np.arange(len(keys), dtype=np.uint64))
        first = 0
        try:
            for step in steps:
                self._check(sample_numbers(step))  # meanwhile FFCV works ahead
                (pixels,) = running.next_batch(self.stall_seconds)
                outcome = plan["outcome"][first : first + len(step)]
                first += len(step)
                if (bad := sample_numbers(step[outcome != _DONE])).size:
                    raise DataError(
                        f"{self._path}, sample {bad[0]} cannot be decoded; copy the file again or convert anew"
                    )
                yield self._copy(pixels, side), step
        finally:
            running.stop()

    def _check(self, samples: NDArray[np.int64]) -> None:
        """Raise `DataError` if the stored bytes of one of `samples` have changed since the conversion."""
        new = np.unique(samples[self._unchecked[samples]])
        for i, (ptr, size, crc32) in zip(new.tolist(), self._rows[new][["ptr", "size", "crc32"]].tolist(), strict=True):
            if zlib.crc32(self._content[ptr : ptr + size].data) != crc32:
                raise DataError(f"{self._path}, sample {i} has been damaged since the conversion; copy the file again")
        self._unchecked[new] = False

    def _crops(self, epoch: int, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """Boxes in the stored copies; (len(keys), 4)."""
        boxes, sizes = self._crop_boxes(epoch, keys)
        return scale_boxes(boxes, sizes, self._stored[sample_numbers(keys)])

    def _copy(self, pixels: NDArray[np.uint8], side: int) -> torch.Tensor:
        """Out of the memory that FFCV will use again; uint8 (B, 3, S, S), channels last in memory.

        Smaller images than the loader's largest fill the beginning of their place.
        """
        places = torch.from_numpy(pixels).flatten(1)
        images = places[:, : 3 * side**2].view(len(places), side, side, 3)
        on_gpu = self.device.type == "cuda"
        images = images.contiguous().pin_memory() if on_gpu else images.clone(memory_format=torch.contiguous_format)
        return images.permute(0, 3, 1, 2)

    def library_versions(self) -> dict[str, str]:
        return {"ffcv": FFCV_VERSION}

    def _rest(self, ended: bool) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._running is not None:
            self._running.stop()
            self._running = None

    def close(self) -> None:
        super().close()
        self._stop()
