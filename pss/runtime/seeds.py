"""Randomness as a function of where a run is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_generator(*key: int) -> None:
    """Seed torch's global generator from `key`."""
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64).tolist()
    torch.manual_seed(seed >> 1)


@contextmanager
def forked_generator(device: torch.device, *key: int) -> Iterator[None]:
    """Draw the random numbers that belong to `key`, and leave torch's global generators as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_generator(*key)
        yield
