"""Randomness as a function of where a run is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_generator(*key: int) -> None:
    """Seed torch's global generators, of the CPU and of this process's GPU, from `key`."""
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64).tolist()
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.manual_seed(seed >> 1)
        return
    # torch would ask after every kind of device there might be, at each step.
    torch.default_generator.manual_seed(seed >> 1)
    torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed >> 1)


@contextmanager
def forked_generator(device: torch.device, *key: int) -> Iterator[None]:
    """Draw the random numbers that belong to `key`, and leave torch's global generators as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_generator(*key)
        yield
