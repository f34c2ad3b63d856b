"""What a step takes is made ready in a thread, on a stream of its own: the same pixels, in the right order."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import missing
from memory_loader import MemoryLoader
from streams import OnDevice, Watch, watched

from pipelines import Batch, DataConfig, DataError, build
from pipelines.augment import Mixing, MixingConfig
from pipelines.augment.device import DeviceTransform
from pipelines.augment.transfer import to_device
from pipelines.loaders.prefetch import Inputs, Prefetcher, bytes_of, tensors_of

CONFIG = DataConfig(img_size=32, rand_augment="rand-m9-mstd0.5-inc1-n2", erasing=0.5)
MIXING = MixingConfig(mixup_alpha=0.8, cutmix_alpha=1.0)


class Prepare:
    """Augmentation and mixing, as training has them."""

    def __init__(self) -> None:
        self.transform = DeviceTransform(CONFIG, seed=3, train=True)
        self.mixing = Mixing(MIXING, 4, seed=3, rank=0)

    def __call__(self, batch: Batch, epoch: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.mixing(self.transform(batch, epoch), batch.labels, 100 * epoch + step)


def no_threads() -> bool:
    return not any(thread.name in ("pss-prefetch", "pss-prepare") for thread in threading.enumerate())


def shown(
    loader: Any, prepare: Any = None, *, epoch: int = 0, step: int = 0, **settings: Any
) -> list[tuple[torch.Tensor, ...]]:
    inputs = Inputs(loader, prepare or Prepare(), "cpu", **settings)
    inputs.set_epoch(epoch, step)
    found = [tuple(inputs_of_step) for inputs_of_step in inputs]
    assert inputs.delivered_hash == inputs.planned_hash(epoch)
    inputs.rest()
    assert no_threads()
    return found


def equal(ours: list[tuple[torch.Tensor, ...]], theirs: list[tuple[torch.Tensor, ...]]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) for mine, their in zip(ours, theirs, strict=True) for a, b in zip(mine, their, strict=True)
    )


@pytest.mark.parametrize("backend", ["torch", "dali", "ffcv"])
def test_overlap_changes_nothing(backend: str, converted_root: Path) -> None:
    if reason := missing(backend):
        pytest.skip(reason)
    loader = build(converted_root, "train", config=CONFIG, batch_size=4, train=True, loader=backend)  # type: ignore[arg-type]
    for epoch, step in ((0, 0), (1, 5)):
        plain = shown(loader, epoch=epoch, step=step, prefetch_bytes=0)
        assert len(plain) == loader.steps_per_epoch - step
        for settings in ({"overlap": True, "prefetch_bytes": 0}, {"overlap": True, "prefetch_bytes": 1 << 16}):
            assert equal(shown(loader, epoch=epoch, step=step, **settings), plain)  # type: ignore[arg-type]
        assert equal(shown(loader, epoch=epoch, step=step, prefetch_bytes=1 << 16), plain)
    loader.close()


def test_the_next_step_is_ready_before_it_is_asked_for() -> None:
    made: list[int] = []

    def prepare(batch: Batch, epoch: int, step: int) -> Batch:
        made.append(step)
        return batch

    inputs = Inputs(MemoryLoader(80), prepare, "cpu", prefetch_bytes=0, overlap=True)
    steps = iter(inputs)
    for taken in range(1, 4):
        next(steps)
        deadline = time.monotonic() + 20
        while len(made) < taken + 2:  # one waits, and one is in the thread's hands
            assert time.monotonic() < deadline
            time.sleep(0.001)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3, 4]
    inputs.rest()
    assert no_threads()


def test_what_a_step_prepares_itself_is_no_waiting() -> None:
    clock = [0.0]

    def decode(step: int) -> None:
        clock[0] += 1

    def prepare(batch: Batch, epoch: int, step: int) -> Batch:
        clock[0] += 100
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.loaders.prefetch.time.perf_counter", lambda: clock[0])
        inputs = Inputs(MemoryLoader(80, on_batch=decode), prepare, "cpu", prefetch_bytes=0)
        assert len(list(inputs)) == 10
    assert inputs.seconds_waited == 10


def test_prepared_batches_count_among_those_that_wait() -> None:
    decoded: list[int] = []
    loader = MemoryLoader(8 * 40, on_batch=decoded.append)
    raw = bytes_of(next(iter(MemoryLoader())))

    def prepare(batch: Batch, epoch: int, step: int) -> torch.Tensor:
        return torch.zeros(raw // 4 * 3)  # thrice as large

    inputs = Inputs(loader, prepare, "cpu", prefetch_bytes=10 * raw, overlap=True)
    steps = iter(inputs)
    source = inputs.source
    assert isinstance(source, Prefetcher)
    for _ in range(4):
        next(steps)
    deadline = time.monotonic() + 20
    while source.buffered_batches < 4 or inputs.buffered_batches < 1:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(0.05)
    assert source.buffered_bytes + 2 * 3 * (raw // 4 * 4) <= 10 * raw
    assert source.buffered_batches == 4
    inputs.rest()


def test_an_error_of_either_thread_comes_at_its_step() -> None:
    def fail(step: int) -> None:
        if step == 3:
            raise DataError("sample 24 is damaged")

    for overlap in (False, True):
        steps = iter(Inputs(MemoryLoader(80, on_batch=fail), Prepare(), "cpu", prefetch_bytes=1 << 20, overlap=overlap))
        assert len([next(steps) for _ in range(3)]) == 3
        with pytest.raises(DataError, match="sample 24"):
            next(steps)

        def fail_in_prepare(batch: Batch, epoch: int, step: int) -> Batch:
            fail(step)
            return batch

        steps = iter(Inputs(MemoryLoader(80), fail_in_prepare, "cpu", prefetch_bytes=1 << 20, overlap=overlap))
        assert len([next(steps) for _ in range(3)]) == 3
        with pytest.raises(DataError, match="sample 24"):
            next(steps)
        del steps
        gc.collect()
        assert no_threads()


def test_a_loader_that_hangs_is_given_up_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.storage.reading._JOIN_SECONDS", 0.1)
    go_on = threading.Event()

    def hang(step: int) -> None:
        if step == 2:
            go_on.wait(20)

    loader = MemoryLoader(80, on_batch=hang)
    inputs = Inputs(loader, Prepare(), "cpu", prefetch_bytes=1 << 20, overlap=True, timeout=0.3)
    with pytest.raises(DataError, match=r"the memory loader delivered nothing for 0\.3 s"):
        list(inputs)
    go_on.set()


def test_a_step_that_is_left_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.storage.reading._JOIN_SECONDS", 1000)  # threads that wait for each other would show
    gate = threading.Event()
    inputs = Inputs(
        MemoryLoader(80, on_batch=lambda step: gate.wait(0.05)), Prepare(), "cpu", prefetch_bytes=1 << 20, overlap=True
    )
    for _ in range(5):
        for _ in inputs:
            break
        gc.collect()
        assert no_threads()
    gate.set()
    assert equal([tuple(one) for one in inputs], shown(MemoryLoader(80), prefetch_bytes=0))


class PrepareOnCard:
    """Operations of several kinds, with numbers drawn on the host: what is wanted of it is a thread's order alone."""

    def __init__(self) -> None:
        self.mixing = Mixing(MIXING, 4, seed=3, rank=0)

    def __call__(self, batch: Batch, epoch: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        factors = np.random.default_rng([epoch, step]).random(len(batch.index), np.float32)
        images = batch.images.to(torch.float32) * to_device(factors, batch.images.device).view(-1, 1, 1, 1)
        images[:, 0] += images[:, 1].flip(-1)
        return self.mixing(images, batch.labels, 100 * epoch + step)


class OnCard(MemoryLoader):
    """A loader that decodes on the device, as DALI does: in whatever stream its thread is on."""

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            yield batch.to(torch.device("cuda", 0))


def read(watch: Watch, steps: Iterator[Any]) -> Iterator[tuple[torch.Tensor, ...]]:
    """As a step does: on the default stream."""
    for inputs_of_step in steps:
        for tensor in tensors_of(inputs_of_step):
            tensor + 0
        yield tuple(tensor.values if isinstance(tensor, OnDevice) else tensor for tensor in inputs_of_step)


@pytest.mark.parametrize("prefetch_bytes", [0, 1 << 20])
@pytest.mark.parametrize("kind", [MemoryLoader, OnCard])
def test_on_a_gpu_everything_waits_for_what_it_uses(
    kind: type[MemoryLoader], prefetch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {start: shown(MemoryLoader(80), PrepareOnCard(), epoch=1, step=start, prefetch_bytes=0) for start in (0, 4)}
    with watched(monkeypatch) as watch:
        monkeypatch.setattr("pipelines.augment.mixing.kernels_serve", lambda images: False)  # no GPU would run them
        inputs = Inputs(kind(80), PrepareOnCard(), "cuda", prefetch_bytes=prefetch_bytes)
        assert inputs.device == torch.device("cuda", 0)
        for start in (0, 4):
            inputs.set_epoch(1, start)
            assert equal(list(read(watch, iter(inputs))), plain[start])
        inputs.set_epoch(1)
        for number, _ in enumerate(read(watch, iter(inputs))):
            if number == 2:
                break  # left early
        inputs.set_epoch(1)
        assert equal(list(read(watch, iter(inputs))), plain[0])
        inputs.close()
        gc.collect()
        assert no_threads()
        busy = {name for name, count in watch.operations.items() if count}
    assert watch.violations == []
    assert len(busy) == 2 + (kind is OnCard and prefetch_bytes > 0)  # the step's, and those of the threads


def test_the_account_of_streams_notices_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda", 0)
    with watched(monkeypatch) as watch:
        side = torch.cuda.Stream(card)  # type: ignore[no-untyped-call]

        def noticed(what: str) -> bool:
            found, watch.violations = watch.violations, []
            return any(what in one for one in found)

        with torch.cuda.stream(side):
            made = torch.zeros(4).pin_memory().to(card, non_blocking=True) + 1
        made + 1
        assert noticed("without waiting for it")
        torch.cuda.current_stream().wait_event(side.record_event())
        made + 1
        assert not watch.violations
        del made
        gc.collect()
        assert noticed("is freed while the default stream may use it")
        torch.zeros(4).to(card)
        assert noticed("not from pinned memory")
        thread = threading.Thread(target=lambda: torch.zeros(4).pin_memory().to(card, non_blocking=True))
        thread.start()
        thread.join()
        assert noticed("the default stream from another thread")
        torch.zeros(4).pin_memory().to(card, non_blocking=True).cpu()
        assert noticed("copies to the host")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_inputs_on_a_gpu_are_those_of_the_step_itself() -> None:
    maps = np.arange(80)

    def prepare(batch: Batch, epoch: int, step: int) -> tuple[torch.Tensor, ...]:
        assert batch.maps is not None
        assert torch.cuda.current_stream() != torch.cuda.default_stream()
        return *Prepare()(batch, epoch, step), batch.maps

    ahead = [tuple(one) for one in Inputs(MemoryLoader(80, maps=maps), prepare, "cuda", prefetch_bytes=1 << 20)]
    for batch, (images, targets, kept) in zip(MemoryLoader(80, maps=maps), ahead, strict=True):
        assert images.is_cuda
        assert torch.equal(kept.cpu(), batch.index)
        assert targets.shape == (8, 4)
    torch.cuda.synchronize()
