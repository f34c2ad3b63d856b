"""Batches made ready before they are asked for: decoded, brought to the device, augmented, in threads of their own.

A patch sampling schedule makes steps alternate between short and long ones. `Prefetcher` keeps decoded batches, as many
as its memory allows: they gather during long steps, so that only the average rate of the loader has to match that of
training. `Inputs` makes of the next batch what a step takes, on the device, while the present one trains: so nothing
but the model is on the path of a step.

On a GPU each of the two threads has a stream of its own. Whoever takes a batch has its stream wait for the event that
was recorded when the batch was made, and tells the allocator that it uses the batch's memory.
"""

from __future__ import annotations

import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from itertools import count
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from pipelines.base import Batch, DataError, Loader
from pipelines.loaders.planned import with_index
from pipelines.loaders.waiting import Signs, wait_for
from pipelines.storage.reading import join

Item = TypeVar("Item")

Prepare = Callable[[Batch, int, int], Item]
"""Makes of a batch, on the device, what a step takes; given its epoch, and its number in that. A pure function."""


def tensors_of(item: Any) -> Iterator[Tensor]:
    """The tensors that `item`, a tensor or dataclasses and tuples of some, consists of."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, tuple):
        for part in item:
            yield from tensors_of(part)
    elif is_dataclass(item):
        for field in fields(item):
            yield from tensors_of(getattr(item, field.name))


def bytes_of(item: Any) -> int:
    """Of its tensors."""
    return sum(tensor.nbytes for tensor in tensors_of(item))


@dataclass(frozen=True)
class _Entry(Generic[Item]):
    """An item that waits, or the failure that ended the epoch in its place."""

    item: Item | None
    delivered_hash: int  # of the loader, once this item is delivered
    num_bytes: int = 0
    made: torch.cuda.Event | None = None
    failure: BaseException | None = None


class _Queue(Generic[Item]):
    """Items between two threads, bounded in bytes. One always fits."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.entries: deque[_Entry[Item]] = deque()
        self.num_bytes = 0
        self.reserved = 0
        """Of the capacity, what is used elsewhere."""
        self.stopping = False
        self.changed = threading.Condition()

    def put(self, entry: _Entry[Item]) -> bool:
        """Wait for room and append; False if the reader has left."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopping or not self.entries or self._fits(entry))
            if not self.stopping:
                self.entries.append(entry)
                self.num_bytes += entry.num_bytes
                self.changed.notify_all()
            return not self.stopping

    def _fits(self, entry: _Entry[Item]) -> bool:
        return self.reserved + self.num_bytes + entry.num_bytes <= self.capacity_bytes

    def get(self, timeout: float) -> _Entry[Item] | None:
        """The next entry; None if there is none for `timeout` seconds, or the queue has been stopped."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopping or bool(self.entries), timeout)
            if not self.entries:
                return None
            entry = self.entries.popleft()
            self.num_bytes -= entry.num_bytes
            self.changed.notify_all()
            return entry

    def reserve(self, num_bytes: int) -> None:
        with self.changed:
            self.reserved = num_bytes
            self.changed.notify_all()

    def stop(self) -> None:
        with self.changed:
            self.stopping = True
            self.entries.clear()
            self.num_bytes = 0
            self.changed.notify_all()


def _fill(
    queue: _Queue[Item],
    source: Loader,
    batches: Iterator[Batch],
    make: Callable[[Batch, int], Item],
    first_step: int,
    stream: torch.cuda.Stream | None,
) -> None:
    """The thread: move what `make` makes of batches into the queue until the epoch ends, the reader leaves or something
    fails."""
    try:
        with _working_on(stream):
            for step, batch in enumerate(batches, first_step):
                item = make(batch, step)
                del batch
                made = stream.record_event() if stream is not None else None
                if not queue.put(_Entry(item, source.delivered_hash, bytes_of(item), made)):
                    return
                del item
        queue.put(_Entry(None, source.delivered_hash))
    except BaseException as failure:  # whatever it is, the reader must hear of it
        queue.put(_Entry(None, source.delivered_hash, failure=failure))


def _working_on(stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
    """Within, this thread's device is the stream's, and what it launches goes there."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _stop(queue: _Queue[Any], thread: threading.Thread, source: Loader | _Ahead[Any]) -> None:
    queue.stop()
    if isinstance(source, _Ahead):  # which the thread may be waiting for
        source.rest()
    join([thread])


class _Ahead(ABC, Generic[Item]):
    """Runs `source` ahead of its reader in a thread, by up to `capacity_bytes` of items.

    Order, errors and state are those of `source`, which belongs to this object from now on. An error comes at the item
    it belongs to. A source that delivers nothing for `timeout` seconds is given up with `DataError`.
    """

    _name: str

    def __init__(self, source: Loader, capacity_bytes: int, device: str | torch.device, timeout: float) -> None:
        if capacity_bytes < 1:
            raise ValueError(f"the prefetch capacity is {capacity_bytes} bytes; it must be at least 1")
        self.source, self.capacity_bytes, self.timeout = source, capacity_bytes, timeout
        self.device = with_index(device)
        self.backend, self.num_classes, self.num_samples = source.backend, source.num_classes, source.num_samples
        self.batch_size, self.steps_per_epoch = source.batch_size, source.steps_per_epoch
        self.signs: Signs | None = getattr(source, "signs", None)
        """What those who wait for the loader see of its work, if it tells."""
        self.seconds_waited = 0.0
        """How long readers have waited for items, in all, less what it took to make them where the reader does that."""
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._queue: _Queue[Item] = _Queue(capacity_bytes)
        self._stop: Callable[[], object] = source.rest if isinstance(source, _Ahead) else self._queue.stop
        self._delivered = source.delivered_hash
        self._epoch = self._first_step = 0
        self._closed = False

    @abstractmethod
    def _make(self, epoch: int, batch: Batch, step: int) -> Item:
        """What is delivered of a batch."""

    @property
    def buffered_batches(self) -> int:
        """Items that wait for the reader."""
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
        return self.source.planned_hash(epoch)

    def set_parts(self, parts: int) -> None:
        """See `Loader`; ends the present iteration."""
        self.rest()
        self.source.set_parts(parts)
        self._delivered = self.source.delivered_hash

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose what the next iteration delivers; ends the present one."""
        self.rest()
        self.source.set_epoch(epoch, start_step)
        self._epoch, self._first_step = epoch, start_step
        self._delivered = self.source.delivered_hash

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Item]:
        if self._closed:
            raise DataError(f"the {self.backend} loader has been closed; build a new one")
        self.rest()
        queue = self._queue = self._new_queue()
        # A daemon, so that a loader which hangs cannot keep the process from ending.
        make, batches = partial(self._make, self._epoch), iter(self.source)
        arguments = (queue, self.source, batches, make, self._first_step, self._stream)
        thread = threading.Thread(target=_fill, args=arguments, name=f"pss-{self._name}", daemon=True)
        thread.start()
        items = self._read(queue)
        # Of the iterator, which may be dropped before it has delivered anything; it keeps this object alive.
        self._stop = weakref.finalize(items, _stop, queue, thread, self.source)
        return items

    def _new_queue(self) -> _Queue[Item]:
        return _Queue(self.capacity_bytes)

    def _read(self, queue: _Queue[Item]) -> Generator[Item]:
        try:
            while (entry := self._next(queue)).item is not None:
                if entry.made is not None:
                    stream = torch.cuda.current_stream(self.device)
                    stream.wait_event(entry.made)
                    for tensor in tensors_of(entry.item):
                        if tensor.is_cuda:
                            tensor.record_stream(stream)
                self._delivered = entry.delivered_hash
                item = entry.item
                del entry  # the reader's alone, whose memory is free as soon as the reader has done with it
                yield item
                del item
            if entry.failure is not None:
                self.close()
                raise entry.failure
        finally:
            queue.stop()
            if queue is self._queue:
                self._stop()

    def _next(self, queue: _Queue[Item]) -> _Entry[Item]:
        def attempt(timeout: float) -> _Entry[Item] | None:
            entry = queue.get(timeout)
            if entry is None and queue.stopping:
                raise RuntimeError("this loader has been iterated anew; only its latest iterator goes on")
            return entry

        began = time.perf_counter()
        try:
            return wait_for(attempt, f"the {self.backend} loader delivered nothing", self.timeout, signs=self.signs)
        except DataError:
            self.close()
            raise
        finally:
            self.seconds_waited += time.perf_counter() - began

    def state_dict(self) -> dict[str, Any]:
        """That of the loader; see `Loader`."""
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Loader`."""
        self.source.load_state_dict(state)

    def rest(self) -> None:
        """End the present iteration and its thread; the next one starts another."""
        self._stop()

    def close(self) -> None:
        """Stop the thread, and close the loader."""
        self._closed = True
        self.rest()
        self.source.close()


class Prefetcher(_Ahead[Batch]):
    """A `Loader` that keeps batches of another one ready, as they were decoded, wherever that was."""

    _name = "prefetch"

    def __init__(
        self, loader: Loader, capacity_bytes: int, device: str | torch.device = "cpu", *, timeout: float = 60.0
    ) -> None:
        super().__init__(loader, capacity_bytes, device, timeout)
        self._reserved = 0

    def reserve(self, num_bytes: int) -> None:
        """Count so much of the capacity as used by what others made of the batches."""
        self._reserved = num_bytes
        self._queue.reserve(num_bytes)

    def _new_queue(self) -> _Queue[Batch]:
        queue = super()._new_queue()
        queue.reserved = self._reserved
        return queue

    def _make(self, epoch: int, batch: Batch, step: int) -> Batch:
        return batch


class Inputs(_Ahead[Item]):
    """What `prepare` makes of the batches of a loader, in their order: on a GPU of the next one while a step is under
    way, on a CPU, whose cores are the step's, when it is asked for.

    Args:
        loader: Belongs to this object from now on.
        prepare: Pure, and called from another thread. Its batches are on `device`.
        device: Of the steps.
        prefetch_bytes: Most memory that decoded batches take which wait to be prepared, with that of two prepared
            ones; one of each always has room. 0 has the loader decode when it is asked.
        overlap: Whether to prepare in a thread; the same results either way. None decides by the device.
        timeout: Seconds after which a loader that delivers nothing is given up with `DataError`.
    """

    _name = "prepare"

    def __init__(
        self,
        loader: Loader,
        prepare: Prepare[Item],
        device: str | torch.device,
        *,
        prefetch_bytes: int,
        overlap: bool | None = None,
        timeout: float = 60.0,
    ) -> None:
        source = loader
        if prefetch_bytes:
            source = Prefetcher(loader, prefetch_bytes, device, timeout=timeout)
        # The loader's own time limit comes first: it says more.
        super().__init__(source, 1, device, timeout + 10)
        self.overlap = self.device.type == "cuda" if overlap is None else overlap
        self._prepare = prepare
        if self.overlap and isinstance(source, Prefetcher):
            source.reserve(prefetch_bytes)  # until it is known how large prepared batches are

    @property
    def waiting_batches(self) -> int:
        """Decoded ones that wait to be prepared."""
        return self.source.buffered_batches if isinstance(self.source, Prefetcher) else 0

    def _make(self, epoch: int, batch: Batch, step: int) -> Item:
        item = self._prepare(batch.to(self.device), epoch, step)
        if self.overlap and isinstance(self.source, Prefetcher):
            self.source.reserve(2 * bytes_of(item))  # the one that waits, and the next
        return item

    def __iter__(self) -> Iterator[Item]:
        return super().__iter__() if self.overlap else self._one_by_one(self._epoch, self._first_step)

    def _one_by_one(self, epoch: int, first_step: int) -> Generator[Item]:
        batches = iter(self.source)
        for step in count(first_step):
            began = time.perf_counter()
            batch = next(batches, None)
            self.seconds_waited += time.perf_counter() - began
            if batch is None:
                return
            self._delivered = self.source.delivered_hash
            yield self._make(epoch, batch, step)
