"""What a prediction costs in time, with the loader and without, and in memory."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.loaders.prefetch import Inputs
from pss.inference.accuracy import Shown

_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|calculation overflowed")


@dataclass(frozen=True)
class Spread:
    """The median of interleaved rounds, with the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def named(self, name: str, digits: int) -> dict[str, float]:
        """As figures of a row: `name`, `name_low` and `name_high`."""
        ends = {"": self.median, "_low": self.low, "_high": self.high}
        return {f"{name}{end}": round(value, digits) for end, value in ends.items()}


@torch.inference_mode()
def call_seconds(
    calls: Sequence[Callable[[], Any]],
    device: torch.device,
    *,
    rounds: int = 7,
    one_by_one: bool = False,
    round_seconds: float = 0.05,
) -> list[list[float]]:
    """Seconds that one call of each takes, in every round; rounds are interleaved, so all see one machine.

    A round repeats a call for about `round_seconds`, as clock and scheduler then matter little. On a GPU the calls of
    a round overlap, as in a stream of batches, unless they are made `one_by_one`, as requests that come singly. The
    first calls, which set things up, are not counted.
    """

    def seconds(call: Callable[[], Any], repeats: int) -> float:
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(repeats):
            call()
            if one_by_one:
                _synchronize(device)
        _synchronize(device)
        return (time.perf_counter() - began) / repeats

    repeats = []
    for call in calls:
        seconds(call, 2)  # warm-up
        repeats.append(max(1, round(round_seconds / seconds(call, 1))))
    measured: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for times, call, count in zip(measured, calls, repeats, strict=True):
            times.append(seconds(call, count))
    return measured


def rates(
    calls: Sequence[Callable[[], Any]], *, num_images: int, device: torch.device, rounds: int = 7
) -> list[Spread]:
    """Images per second of each call, which predicts `num_images` images."""
    measured = call_seconds(calls, device, rounds=rounds)
    return [Spread.of([num_images / seconds for seconds in times]) for times in measured]


def latencies(calls: Sequence[Callable[[], Any]], *, device: torch.device, rounds: int = 7) -> list[Spread]:
    """Milliseconds from the start of a call to its result, of each call."""
    measured = call_seconds(calls, device, rounds=rounds, one_by_one=True)
    return [Spread.of([1e3 * seconds for seconds in times]) for times in measured]


@torch.inference_mode()
def loader_rates(
    predicts: Sequence[Callable[[Tensor], Any]],
    inputs: Inputs[Shown],
    *,
    device: torch.device,
    rounds: int = 3,
    round_seconds: float = 1.0,
) -> list[Spread]:
    """Images per second of each call with the loader in the path: from files to logits.

    In a round every call gets the batches of one epoch, or as many as come in `round_seconds`; the first one, for which
    the loader starts up, is not counted unless it is the only one.
    """

    def rate(predict: Callable[[Tensor], Any]) -> float:
        inputs.set_epoch(0)
        count, began = 0, time.perf_counter()
        for number, shown in enumerate(inputs):
            predict(shown.images)
            if number == 0 and len(inputs) > 1:
                _synchronize(device)
                began = time.perf_counter()
                continue
            count += len(shown.images)
            if time.perf_counter() - began > round_seconds:
                break
        _synchronize(device)
        return count / (time.perf_counter() - began)

    measured: list[list[float]] = [[] for _ in predicts]
    for _ in range(rounds):
        for values, predict in zip(measured, predicts, strict=True):
            values.append(rate(predict))
    return [Spread.of(values) for values in measured]


@torch.inference_mode()
def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a call needs at most, beyond what was there before it; None where that cannot be told.

    On a GPU those of tensors; on a CPU those of the process, so that they include its libraries' buffers.
    """
    call()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux"):
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator kept back would not be asked for again
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    except (OSError, AttributeError):
        return None
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


@contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """Raise `ValueError`, with `what` is too large, where there is not memory enough."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _NO_MEMORY.search(str(error)):
            raise
        raise ValueError(f"{what} take more memory than there is here; make them smaller") from error


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    match = re.search(rf"{field}:\s+(\d+) kB", status)
    assert match is not None
    return 1024 * int(match[1])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
