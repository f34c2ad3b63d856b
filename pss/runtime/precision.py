"""The arithmetic of a forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from pss.sections import RunSettings


def autocast(config: RunSettings, device: torch.device, *, keep_copies: bool = True) -> AbstractContextManager[Any]:
    """The arithmetic that `train.precision` asks for on this device; `keep_copies` of the weights until its end."""
    precision = config.train.precision
    if precision == "bf16" or (precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=keep_copies)
    return nullcontext()
