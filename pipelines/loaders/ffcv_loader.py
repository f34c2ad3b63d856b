"""FFCV as decoder and resizer, for nodes with few cores: it reads re-encoded images from one .beton file.

FFCV's loop runs a decoder of ours, compiled by numba, that takes image, crop and destination of each place of a batch
from an array filled before, and notes there what became of it. It writes into the tensor that is delivered. Order,
crops and labels are those of the other back ends; pixels differ, because images were scaled down and encoded again,
and because FFCV always averages areas.

FFCV 1.0.2 reads damaged files without complaint, shows another sample's picture, or crashes. So whatever it reads is
compared with what the conversion noted of it: pointers and sizes before it opens the file, each image when first used.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.base import DataError, choose_loader
from pipelines.loaders.geometry import scale_boxes
from pipelines.loaders.order import EpochPlan, sample_numbers
from pipelines.loaders.planned import Decoded, PlannedLoader
from pipelines.loaders.threads import PixelMemory
from pipelines.loaders.waiting import LONG_SECONDS, Signs, WatchedThread, wait_for
from pipelines.storage.beton import RAW, STORED, damaged_frame, stored_path
from pipelines.storage.ffcv_file import FFCV_VERSION, import_ffcv
from pipelines.storage.manifest import take_rows
from pipelines.storage.reading import Unchecked, join
from pipelines.storage.source import ConvertedTable
from pipelines.storage.unlocked import crc32_at

import_ffcv()
import numba  # noqa: E402
from ffcv.fields.decoders import SimpleRGBImageDecoder  # noqa: E402
from ffcv.libffcv import imdecode, resize_crop  # noqa: E402
from ffcv.loader import Loader as BetonLoader  # noqa: E402
from ffcv.loader.epoch_iterator import EpochIterator  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.utils import cast_int_to_byte_ptr  # noqa: E402
from numba.np.ufunc.parallel import get_thread_id  # noqa: E402

_log = logging.getLogger(__name__)
_BATCHES_AHEAD = 3
_COMPILATION = "the compilation of FFCV's decoder"
_DONE, _FAILED, _CHANGED, _LEFT = 1, 2, 3, 4  # what became of a place

EVALUATION_WARNING = (
    "evaluating on re-encoded, downscaled images: the accuracy is not comparable with that on the original ones"
)


_PLACE = np.dtype(
    [
        ("ptr", "<u8"),  # of the stored image, in the file
        ("size", "<u8"),
        ("into", "<u8"),  # the address of the pixels that the place is filled with
        ("crc32", "<u4"),
        ("unchecked", "<i4"),  # whether the stored image is to be compared with that
        ("mode", "<i4"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("box", "<i4", 4),  # top, left, height, width of the crop in it
        ("side", "<i4"),  # of the result
        ("outcome", "<i4"),  # written by the decoder, which passes by what has one
    ]
)
"""What the decoder is told about one place of a batch."""


class _PlannedCrops(SimpleRGBImageDecoder):  # type: ignore[misc]
    """Fills the places of a batch as their rows of `_PLACE` say, decoding once per `crops` places.

    FFCV hands compiled code a field's metadata, one row per sample. It gets the plan of the batch in their stead.
    """

    def __init__(self, crops: int) -> None:
        super().__init__()
        self.crops = crops

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
        """FFCV insists on giving memory for the result, and would use it again for later batches: it is not used."""
        shape, dtype = (1,), np.dtype(np.uint8)
        state = previous_state.__class__(jit_mode=True, device=previous_state.device, shape=shape, dtype=dtype)
        return state, AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable[..., Any]:
        return _decoder(Compiler.num_threads > 1, self.crops)


@functools.cache
def _decoder(parallel: bool, crops: int) -> Callable[..., Any]:
    """To be compiled, once for all loaders."""
    each = numba.prange if parallel else range
    crc32 = crc32_at()
    decode_jpeg, resize = Compiler.compile(imdecode), Compiler.compile(resize_crop)

    def decode(batch: Any, memory: Any, plan: Any, storage: Any) -> Any:
        largest = 0
        for row in range(len(batch)):
            if plan[row]["mode"] != RAW:
                largest = max(largest, 3 * plan[row]["height"] * plan[row]["width"])
        scratch = np.empty((numba.get_num_threads(), largest), dtype=np.uint8)
        for image in each(len(batch) // crops):
            first = image * crops
            place = plan[first]
            if place["outcome"] != 0:
                continue
            encoded = storage[0][place["ptr"] : place["ptr"] + place["size"]]
            height, width = np.uint32(place["height"]), np.uint32(place["width"])
            outcome, address = _DONE, encoded.ctypes.data
            if place["unchecked"] != 0 and crc32(0, address, place["size"]) != place["crc32"]:
                outcome = _CHANGED
            elif place["mode"] != RAW:
                pixels = scratch[get_thread_id()]
                address = pixels.ctypes.data
                if decode_jpeg(encoded, pixels, height, width, height, width, 0, 0, 1, 1, False, False) != 0:
                    outcome = _FAILED
            if outcome == _DONE:
                whole = numba.carray(cast_int_to_byte_ptr(address), (height, width, 3))
                for row in range(first, first + crops):
                    top, left, crop_height, crop_width = plan[row]["box"]
                    side = plan[row]["side"]
                    into = numba.carray(cast_int_to_byte_ptr(plan[row]["into"]), (side, side, 3))
                    resize(whole, top, top + crop_height, left, left + crop_width, into)
            for row in range(first, first + crops):
                plan[row]["outcome"] = outcome
        return memory[: len(batch)]

    decode.is_parallel = True  # type: ignore[attr-defined]
    return decode


@dataclass
class _Batch:
    """A batch on its way through FFCV."""

    keys: NDArray[np.int64]
    plan: NDArray[Any]  # (B,), whose field f0, which is FFCV's name for the first field, is of _PLACE
    side: int
    images: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # uint8 (B, 3, S, S), channels last in memory

    @property
    def places(self) -> NDArray[Any]:
        """The rows of _PLACE."""
        places: NDArray[Any] = self.plan["f0"]
        return places

    def allocate(self, memory: PixelMemory) -> None:
        """Make the tensor, and have the plan fill it."""
        self.images = memory.images(len(self.keys), self.side)
        self.places["into"] = self.images.data_ptr() + 3 * self.side**2 * np.arange(len(self.keys), dtype=np.uint64)


class _Epoch(EpochIterator):  # type: ignore[misc]
    """FFCV's thread, which fills the batches put into `planned` and owns what it writes into while it does.

    It keeps what stopped it instead of printing it and leaving its reader waiting.
    """

    failure: BaseException | None = None

    def __init__(self, loader: BetonLoader, num_batches: int, memory: PixelMemory) -> None:
        self.planned: SimpleQueue[_Batch | None] = SimpleQueue()
        self._memory = memory
        self._filling: _Batch | None = None
        self._stopping = False
        super().__init__(loader, range(num_batches * loader.batch_size))  # of which FFCV makes one piece a batch

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:
            self.failure = error

    def run_pipeline(self, number: int, places: range, slot: int, event: Any) -> _Batch:
        if (batch := self.planned.get()) is None:
            raise StopIteration
        self.fill(batch, slot)
        return batch

    def fill(self, batch: _Batch, slot: int = 0) -> None:
        """Run the decoder on `batch`."""
        batch.allocate(self._memory)
        self._filling, self.metadata = batch, batch.plan
        if self._stopping:
            raise StopIteration
        super().run_pipeline(0, np.arange(len(batch.keys), dtype=np.uint64), slot, None)

    def next_batch(self, stall_seconds: float, signs: Signs) -> _Batch:
        """`DataError` if the thread has ended or does nothing."""

        def arrived(timeout: float) -> _Batch | None:
            alive = self.is_alive()  # asked first: what it put before it ended must not be missed
            try:
                _, batch = self.output_queue.get(timeout=timeout if alive else 0)
                filled: _Batch = batch
                return filled
            except Empty:
                if alive:
                    return None
            reason = str(self.failure).split("\n")[0]
            raise DataError(f"FFCV stopped in mid-epoch: {reason}") from self.failure

        return wait_for(arrived, "FFCV delivered nothing", stall_seconds, signs=signs, progress=self._filled)

    def _filled(self) -> tuple[int, int]:
        """Which batch is being filled, and how many of its places are."""
        batch = self._filling
        return id(batch), 0 if batch is None else int(np.count_nonzero(batch.places["outcome"]))

    def stop(self) -> None:
        """End the thread and wait for it. FFCV's own `close` lets it go on while its queue has room."""
        self._stopping = True
        self.iter_ixes = iter(())
        self.planned.put(None)
        if self._filling is not None:
            self._filling.places["outcome"] = _LEFT
        with self.output_queue.mutex:  # in which the thread may wait for room
            self.output_queue.maxsize = sys.maxsize
            self.output_queue.not_full.notify()
        join([self])
        self.close()


class FfcvLoader(PlannedLoader):
    """FFCV with `num_workers` threads (at least one).

    With `check_bytes` each stored image is compared with its checksum when it is first used.
    """

    backend = "ffcv"
    batches_ahead = _BATCHES_AHEAD + 1  # with the one that waits for room in the queue
    compile_seconds = LONG_SECONDS
    """How long its decoder may be compiled before the loader gives up with a `DataError`."""

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
        rows = table.load_table(stored_path(self._path).name, STORED)
        if part := damaged_frame(self._path, rows, table.labels, table.manifest.made["options"]["max_size"]):
            raise DataError(f"{self._path}, {part}: it is damaged or belongs to another data set; copy it again")
        self._rows: NDArray[Any] = np.asarray(rows)
        self._unchecked = Unchecked(self.num_samples if check_bytes else 0)
        self._threads = min(max(1, self.num_workers), numba.config.NUMBA_NUM_THREADS)
        self._beton = self._compiled()
        self._running: _Epoch | None = None
        self.warning = None if self.train else EVALUATION_WARNING
        if self.warning:
            _log.warning("%s: %s", self._path, self.warning)

    def _compiled(self) -> BetonLoader:
        """FFCV's loader, with all code compiled that an epoch runs, whatever its images' size, by running it on no
        places.

        numba compiles what is first called: half a minute and more where the cores are busy, which is no stall. So it
        happens here, under a limit of its own, and leaves no files, which an unprivileged user may have no folder for.
        """

        def compile_all() -> BetonLoader:
            loader = BetonLoader(
                str(self._path),
                batch_size=self.batch_size,
                num_workers=self._threads,
                os_cache=True,
                pipelines={"image": [_PlannedCrops(self.crops_per_image)], "index": None, "label": None},
                batches_ahead=_BATCHES_AHEAD,
            )
            epoch = _Epoch(loader, 0, self.memory)
            join([epoch])
            epoch.fill(self._planned(0, np.zeros(0, dtype=np.int64)))
            epoch.close()
            return loader

        thread = WatchedThread("FFCV")
        try:
            with self.signs.long_part(_COMPILATION, self.compile_seconds):
                return thread.call(compile_all, self.stall_seconds, self.signs)
        finally:
            thread.stop()

    def _batches(self, epoch: int, steps: EpochPlan) -> Generator[Decoded]:
        self._stop()
        if not len(steps):
            return
        running = self._running = _Epoch(self._beton, len(steps), self.memory)
        to_plan = iter(steps)
        wanted = self.batches_ahead + 2  # with the one that is being filled, and one for the thread to take next
        try:
            for _ in range(len(steps)):
                # While FFCV works, and no more than it may soon need: a whole epoch would be 66 MB for ImageNet.
                for keys in islice(to_plan, wanted):
                    running.planned.put(self._planned(epoch, keys))
                wanted = 1
                batch = running.next_batch(self.stall_seconds, self.signs)
                self._examine(batch)
                yield batch.images, batch.keys
        finally:
            running.stop()

    def _planned(self, epoch: int, keys: NDArray[np.int64]) -> _Batch:
        """What FFCV's thread is told of a batch."""
        samples = sample_numbers(keys)
        batch = _Batch(keys, np.zeros(len(keys), dtype=[("f0", _PLACE)]), self.side(epoch))
        places, rows = batch.places, take_rows(self._rows, samples)
        for name in ("ptr", "size", "crc32", "mode", "height", "width"):
            places[name] = rows[name]
        places["unchecked"], places["side"] = self._unchecked.of(samples), batch.side
        boxes, sizes = self._crop_boxes(epoch, keys)
        stored = np.stack([rows["height"], rows["width"]], axis=1).astype(np.int64)
        places["box"] = scale_boxes(boxes, sizes, stored)
        return batch

    def _examine(self, batch: _Batch) -> None:
        """Raise `DataError` if one of the images was not to be had."""
        outcomes, samples = batch.places["outcome"], sample_numbers(batch.keys)
        for place in np.flatnonzero(outcomes != _DONE):
            name = f"{self._path}, sample {samples[place]}"
            if outcomes[place] == _CHANGED:
                raise DataError(f"{name} has been damaged since the conversion; copy the file again")
            raise DataError(f"{name} cannot be decoded; copy the file again or convert anew")
        self._unchecked.clear(samples)

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
