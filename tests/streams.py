"""A stand-in for a GPU's streams, events and memory, over tensors on the CPU: it keeps account of who may use what.

Within `watched()`, "cuda" tensors hold their values on the host, and every operation on one is looked at:

- what it reads was written on its own stream, or before an event that its stream has waited for;
- a thread other than the one that began never uses the default stream;
- a copy from the host to the device comes from pinned memory, and waits for nothing;
- memory that another stream than its own has used was marked for it (`record_stream`) before it is freed.

What is against that is in `violations`.
"""

from __future__ import annotations

import threading
import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map


class Stream:
    """A stream: how many operations it was given, and up to which one of the others it has waited."""

    def __init__(self, device: Any = None, name: str = "") -> None:
        self.device, self.name = device, name or f"stream {id(self):x}"
        self.done: dict[Stream, int] = {self: 0}

    def record_event(self) -> Event:
        return Event(self)

    def wait_event(self, event: Event) -> None:
        for stream, number in event.done.items():
            self.done[stream] = max(self.done.get(stream, 0), number)

    def synchronize(self) -> None:
        raise AssertionError("the host waits for a stream")


class Event:
    """All that had been given to a stream, and what that had waited for."""

    def __init__(self, stream: Stream) -> None:
        self.done = dict(stream.done)


class _Memory:
    """What was done to the memory of a tensor on the device."""

    def __init__(self, stream: Stream) -> None:
        self.owner, self.written, self.used, self.marked = stream, (stream, 0), {stream}, {stream}


class Watch:
    """The account."""

    def __init__(self) -> None:
        self.violations: list[str] = []
        self.operations: dict[str, int] = {}
        self.default = Stream(name="the default stream")
        self._main, self._here = threading.get_ident(), threading.local()

    @property
    def stream(self) -> Stream:
        return getattr(self._here, "stream", self.default)

    def complain(self, what: str) -> None:
        place = next(
            (
                f"{frame.filename}:{frame.lineno}"
                for frame in reversed(traceback.extract_stack())
                if "/pipelines/" in frame.filename
            ),
            "",
        )
        self.violations.append(f"{what} (in {threading.current_thread().name}, {place})")

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before = self.stream
        self._here.stream = stream
        try:
            yield
        finally:
            self._here.stream = before

    def launch(self, what: str, reads: list[_Memory], writes: list[_Memory]) -> None:
        stream = self.stream
        self.operations[stream.name] = self.operations.get(stream.name, 0) + 1
        if stream is self.default and threading.get_ident() != self._main:
            self.complain(f"{what} goes to the default stream from another thread")
        for memory in (*reads, *writes):
            written_on, number = memory.written
            if stream.done.get(written_on, 0) < number:
                self.complain(f"{what} uses what {written_on.name} writes, without waiting for it")
            memory.used.add(stream)
        stream.done[stream] += 1
        for memory in writes:
            memory.written = stream, stream.done[stream]

    def freed(self, memory: _Memory) -> None:
        for stream in memory.used - memory.marked:
            self.violations.append(f"memory of {memory.owner.name} is freed while {stream.name} may use it")


_watch: Watch | None = None


class OnDevice(torch.Tensor):
    """A tensor on the device; `values` has what is in it."""

    values: torch.Tensor
    memory: _Memory

    @staticmethod
    def of(values: torch.Tensor, memory: _Memory | None = None) -> OnDevice:
        assert _watch is not None
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            OnDevice, values.shape, strides=values.stride(), dtype=values.dtype, device="cuda:0"
        )
        made.values = values
        if memory is None:
            memory = _Memory(_watch.stream)
            weakref.finalize(values.untyped_storage(), _watch.freed, memory)
        made.memory = memory
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert _watch is not None
        kwargs = dict(kwargs or {})
        given: list[OnDevice] = []

        def inner(value: Any) -> Any:
            if isinstance(value, OnDevice):
                given.append(value)
                return value.values
            return value

        inner_args, inner_kwargs = tree_map(inner, args), tree_map(inner, kwargs)
        if (to := kwargs.get("device")) is not None:
            if torch.device(to).type != "cuda":
                _watch.complain(f"{func} copies to the host")
            inner_kwargs["device"] = "cpu"
        by_storage = {one.values.untyped_storage().data_ptr(): one.memory for one in given}
        result = func(*inner_args, **inner_kwargs)
        made: list[_Memory] = []

        def outer(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            shared = by_storage.get(value.untyped_storage().data_ptr())
            wrapped = OnDevice.of(value, shared)
            if shared is None:
                made.append(wrapped.memory)
            return wrapped

        wrapped = tree_map(outer, result)
        changed = func._schema.is_mutable
        written = made + ([given[0].memory] if changed else [])
        if made or changed:  # else a view, which launches nothing
            _watch.launch(str(func), [one.memory for one in given], written)
        return args[0] if changed and isinstance(args[0], OnDevice) else wrapped

    def record_stream(self, stream: Any) -> None:
        self.memory.marked.add(stream)


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Within, "cuda" devices are watched ones; afterwards there must be no violation."""
    global _watch
    watch = _watch = Watch()
    if not torch.cuda.is_available():
        torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]  # which does nothing, and asks no driver
    to = torch.Tensor.to

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        copy.page_locked = True  # type: ignore[attr-defined]
        return copy

    def is_pinned(tensor: torch.Tensor) -> bool:
        return getattr(tensor, "page_locked", False)

    def moved(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        device = next((one for one in (*args, kwargs.get("device")) if isinstance(one, torch.device | str)), None)
        if device is None or torch.device(device).type != "cuda":
            return to(tensor, *args, **kwargs)
        if isinstance(tensor, OnDevice):
            others = [one for one in args if one is not device]
            kwargs = {name: value for name, value in kwargs.items() if name != "device"}
            return to(tensor, *others, **kwargs) if others or kwargs.keys() - {"non_blocking"} else tensor
        if not is_pinned(tensor) or not kwargs.get("non_blocking"):
            watch.complain("a copy to the device waits, as it is not from pinned memory or not non_blocking")
        copy = OnDevice.of(tensor.clone())
        watch.launch("copy to the device", [], [copy.memory])
        return copy

    def made_there(make: Any) -> Any:
        def on_device(*args: Any, **kwargs: Any) -> Any:
            if (device := kwargs.get("device")) is None or torch.device(device).type != "cuda":
                return make(*args, **kwargs)
            made = OnDevice.of(make(*args, **{**kwargs, "device": "cpu"}))
            watch.launch(make.__name__, [], [made.memory])
            return made

        return on_device

    for name in ("arange", "empty", "full", "ones", "zeros"):
        monkeypatch.setattr(torch, name, made_there(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "is_pinned", is_pinned)
    monkeypatch.setattr(torch.Tensor, "to", moved)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", watch.on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: watch.stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    try:
        yield watch
    finally:
        monkeypatch.undo()
    _watch = None
