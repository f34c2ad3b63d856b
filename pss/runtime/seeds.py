"""Randomness as a function of where a run is."""

from __future__ import annotations

import numpy as np
import torch


def seed_generator(*key: int) -> None:
    """Seed torch's global generator from `key`."""
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64).tolist()
    torch.manual_seed(seed >> 1)
