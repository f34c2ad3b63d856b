"""One process or many: what `torchrun` says, the process group, and the few collectives the trainer needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """The processes that train one model together. A plain run is a world of one, without a process group."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether any process raises it; the same answer everywhere."""
        if self.size == 1:
            return list(flags)
        raised = self.sum(torch.tensor([int(flag) for flag in flags], device=self.device))
        return [bool(count) for count in raised.tolist()]

    def broadcast(self, value: str | None) -> str | None:
        """The main process's `value`, on every process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def start() -> Iterator[World]:
    """Join the processes that torchrun started, or be the only one. Leaves the process group on exit."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if size == 1:
        yield World(rank=0, size=1, device=device)
        return
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=10))
    try:
        yield World(rank=rank, size=size, device=device)
    finally:
        dist.destroy_process_group()
