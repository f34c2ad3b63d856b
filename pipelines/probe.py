"""Which back end is the fastest here, found out by decoding a little with each."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import count

import pipelines
from pipelines.base import Backend, DataConfig, Loader

_FEWEST = 256  # samples below which any back end is fast enough
_BATCH = 64


@dataclass(frozen=True)
class ProbeResult:
    """What to use, and why."""

    backend: Backend
    rates: dict[Backend, float]
    """Images per second of each back end that was tried; empty if there was nothing to choose between."""
    reason: str


def probe(
    root: pipelines.DataPath,
    split: str,
    *,
    config: DataConfig,
    num_workers: int | None = None,
    device: str = "cpu",
    seconds: float = 1.0,
) -> ProbeResult:
    """Decode training batches of `split` with torch and with DALI for about `seconds` each, and take the faster.

    A small split is not measured, and neither is one that exists only as an FFCV file. FFCV is never chosen over the
    others: it shows other pixels. The outcome depends on the machine and the moment: of several processes one must
    decide for all. Raises `DataError` for data that cannot be used.
    """
    usual = pipelines.choose_backend(root, split)
    if usual == "ffcv":
        return ProbeResult(usual, {}, f"the {split} split holds FFCV data only")
    if usual == "torch":
        return ProbeResult(usual, {}, "DALI is not installed")
    if isinstance(root, pipelines.RemoteSet):
        return ProbeResult(usual, {}, "not measured: the data is elsewhere")
    source = pipelines.open_split(root, split)
    if source.num_samples < _FEWEST:
        return ProbeResult(usual, {}, f"{source.num_samples} images are too few to measure")
    batch_size = max(_BATCH // config.decode_once, 1) * config.decode_once
    rates: dict[Backend, float] = {}
    candidates: tuple[Backend, ...] = ("dali", "torch")
    for backend in candidates:
        loader = pipelines.build(
            root,
            split,
            config=config,
            batch_size=batch_size,
            train=True,
            loader=backend,
            device=device,
            num_workers=num_workers,
        )
        try:
            rates[backend] = images_per_second(loader, seconds)
        finally:
            loader.close()
    fastest = max(rates, key=lambda backend: rates[backend])
    measured = ", ".join(f"{backend} {rate:.0f} images/s" for backend, rate in rates.items())
    return ProbeResult(fastest, rates, f"measured: {measured}")


def images_per_second(loader: Loader, seconds: float) -> float:
    """The steady rate of `loader`, over `seconds` or what is left of its epoch; of a short epoch over whole ones.

    What was decoded before anybody asked for it costs nothing: it is all taken before the clock starts. Near the end of
    an epoch nothing is left to work on ahead, so that the clock stops before, or an epoch's restart is counted too.
    """
    ahead: int = getattr(loader, "batches_ahead", 0)
    before, steps = 2 * ahead + 2, loader.steps_per_epoch
    images, passed = 0, 0.0
    if before + 5 * ahead < steps:
        for step, batch in enumerate(loader, 1):
            if step <= before:
                began = time.perf_counter()
                continue
            images, passed = images + len(batch.labels), time.perf_counter() - began
            if step == steps - ahead or passed > seconds:
                break
        return images / passed
    for epoch in count():
        loader.set_epoch(epoch)
        shown = sum(len(batch.labels) for batch in loader)
        if epoch == 0:
            began = time.perf_counter()
            continue
        images, passed = images + shown, time.perf_counter() - began
        if passed > seconds:
            break
    return images / passed
