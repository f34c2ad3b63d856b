"""Arrays drawn on the host, brought to the device without waiting for it."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """`array` as a tensor on `device`, copied on its current stream.

    From pinned memory: a copy from pageable memory waits for the device's queue. The pinned memory may be forgotten at
    once: torch's allocator of it notes an event behind every such copy, and gives the memory away only after that.
    """
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def kernels_serve(tensor: Tensor) -> bool:
    """Whether the Triton kernels of this package work on `tensor`; torch's operations do everywhere."""
    return tensor.is_cuda and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def host_index(index: Tensor | NDArray[np.int64]) -> NDArray[np.int64]:
    """Sample numbers as an array; `ValueError` for a tensor on another device, since reading it would wait for that."""
    if isinstance(index, Tensor):
        if index.device.type != "cpu":
            raise ValueError(f"the sample index lies on {index.device}; keep it on the CPU, where the draws are made")
        index = index.numpy()
    return index.astype(np.int64, copy=False)
