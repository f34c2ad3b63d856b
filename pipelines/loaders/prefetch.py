"""A queue of finished batches between any loader and a consumer whose steps differ in length.

A patch sampling schedule makes steps alternate between short and long ones. The queue fills during the long ones, so
that only the average rate of the loader has to match the average rate of training.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipelines.base import Batch, DataError, Loader
from pipelines.loaders.waiting import stalled

_JOIN_SECONDS = 5.0


@dataclass(frozen=True)
class _Entry:
    """A batch that waits, or the failure that ended the epoch in its place."""

    batch: Batch | None
    delivered_hash: int  # of the loader, once this batch is delivered
    num_bytes: int = 0
    copied: torch.cuda.Event | None = None
    failure: BaseException | None = None


class _Queue:
    """Batches between the two threads, bounded in bytes. One batch always fits."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.entries: deque[_Entry] = deque()
        self.num_bytes = 0
        self.stopping = False
        self.changed = threading.Condition()

    def put(self, entry: _Entry) -> bool:
        """Wait for room and append; False if the reader has left."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopping or not self.entries or self._fits(entry))
            if not self.stopping:
                self.entries.append(entry)
                self.num_bytes += entry.num_bytes
                self.changed.notify_all()
            return not self.stopping

    def _fits(self, entry: _Entry) -> bool:
        return self.num_bytes + entry.num_bytes <= self.capacity_bytes

    def get(self, timeout: float) -> _Entry | None:
        """The next entry; None if there is none for `timeout` seconds, or the queue has been stopped."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopping or bool(self.entries), timeout)
            if not self.entries:
                return None
            entry = self.entries.popleft()
            self.num_bytes -= entry.num_bytes
            self.changed.notify_all()
            return entry

    def stop(self) -> None:
        with self.changed:
            self.stopping = True
            self.entries.clear()
            self.num_bytes = 0
            self.changed.notify_all()


def _fill(queue: _Queue, loader: Loader, stream: torch.cuda.Stream | None) -> None:
    """The thread: move batches into the queue until the epoch ends, the reader leaves or something fails."""
    try:
        for batch in loader:
            num_bytes, copied = batch.images.nbytes + (0 if batch.maps is None else batch.maps.nbytes), None
            if stream is not None:
                batch, copied = _copy(batch, stream)
            if not queue.put(_Entry(batch, loader.delivered_hash, num_bytes, copied)):
                return
        queue.put(_Entry(None, loader.delivered_hash))
    except BaseException as failure:  # whatever it is, the reader must hear of it
        queue.put(_Entry(None, loader.delivered_hash, failure=failure))


def _copy(batch: Batch, stream: torch.cuda.Stream) -> tuple[Batch, torch.cuda.Event]:
    """`batch` on the device of `stream`, and the event after which it is there."""
    with torch.cuda.stream(stream):
        on_device: dict[str, Any] = {
            name: (tensor if tensor.is_cuda else tensor.pin_memory()).to(stream.device, non_blocking=True)
            for name, tensor in _for_device(batch).items()
        }
        return replace(batch, **on_device), stream.record_event()


def _for_device(batch: Batch) -> dict[str, torch.Tensor]:
    """What a step needs on the device. All else is small, and read on the host."""
    fields = {"images": batch.images, "labels": batch.labels, "maps": batch.maps}
    return {name: tensor for name, tensor in fields.items() if tensor is not None}


def _stop(queue: _Queue, thread: threading.Thread) -> None:
    queue.stop()
    if thread is not threading.current_thread():  # which may be where the garbage collector runs
        thread.join(_JOIN_SECONDS)


class Prefetcher:
    """Runs `loader` ahead of its reader in a thread, by up to `capacity_bytes` of batches; itself a `Loader`.

    On a CUDA `device` the thread also copies: from pinned memory, on a stream of its own, which the reader's stream
    waits for. Order, errors and state are those of `loader`, which belongs to the prefetcher from now on. An error
    comes at the batch it belongs to. A loader that delivers nothing for `timeout` seconds is given up with `DataError`.
    """

    def __init__(
        self, loader: Loader, capacity_bytes: int, device: str | torch.device = "cpu", *, timeout: float = 60.0
    ) -> None:
        if capacity_bytes < 1:
            raise ValueError(f"the prefetch capacity is {capacity_bytes} bytes; it must be at least 1")
        self.loader, self.capacity_bytes, self.timeout = loader, capacity_bytes, timeout
        self.device = torch.device(device)
        self.backend, self.num_classes, self.num_samples = loader.backend, loader.num_classes, loader.num_samples
        self.batch_size, self.steps_per_epoch = loader.batch_size, loader.steps_per_epoch
        self.seconds_waited = 0.0
        """How long readers have waited for batches, in all."""
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._queue = _Queue(capacity_bytes)
        self._stop: Callable[[], object] = self._queue.stop
        self._delivered = loader.delivered_hash
        self._closed = False

    @property
    def buffered_batches(self) -> int:
        """Batches that wait for the reader."""
        return len(self._queue.entries)

    @property
    def buffered_bytes(self) -> int:
        """Their size."""
        return self._queue.num_bytes

    @property
    def delivered_hash(self) -> int:
        """Of what the reader has received; see `Loader`."""
        return self._delivered

    def planned_hash(self, epoch: int) -> int:
        """See `Loader`."""
        return self.loader.planned_hash(epoch)

    def set_parts(self, parts: int) -> None:
        """See `Loader`; ends the present iteration."""
        self._stop()
        self.loader.set_parts(parts)
        self._delivered = self.loader.delivered_hash

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose what the next iteration delivers; ends the present one."""
        self._stop()
        self.loader.set_epoch(epoch, start_step)
        self._delivered = self.loader.delivered_hash

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        if self._closed:
            raise DataError(f"the {self.backend} loader has been closed; build a new one")
        self._stop()
        queue = self._queue = _Queue(self.capacity_bytes)
        # A daemon, so that a loader which hangs cannot keep the process from ending.
        thread = threading.Thread(
            target=_fill, args=(queue, self.loader, self._stream), name="pss-prefetch", daemon=True
        )
        thread.start()
        batches = self._read(queue)
        # Of the iterator, which may be dropped before it has delivered anything; it keeps the prefetcher alive.
        self._stop = weakref.finalize(batches, _stop, queue, thread)
        return batches

    def _read(self, queue: _Queue) -> Generator[Batch]:
        try:
            while (entry := self._next(queue)).batch is not None:
                if entry.copied is not None:
                    stream = torch.cuda.current_stream(self.device)
                    stream.wait_event(entry.copied)
                    for tensor in _for_device(entry.batch).values():
                        tensor.record_stream(stream)
                self._delivered = entry.delivered_hash
                yield entry.batch
            if entry.failure is not None:
                self.close()
                raise entry.failure
        finally:
            queue.stop()
            if queue is self._queue:
                self._stop()

    def _next(self, queue: _Queue) -> _Entry:
        began = time.perf_counter()
        entry = queue.get(self.timeout)
        self.seconds_waited += time.perf_counter() - began
        if entry is None:
            if queue.stopping:
                raise RuntimeError("this loader has been iterated anew; only its latest iterator goes on")
            self.close()
            raise stalled(f"the {self.backend} loader delivered nothing", self.timeout)
        return entry

    def state_dict(self) -> dict[str, Any]:
        """That of the loader; see `Loader`."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Loader`."""
        self.loader.load_state_dict(state)

    def close(self) -> None:
        """Stop the thread, and close the loader."""
        self._closed = True
        self._stop()
        self.loader.close()
