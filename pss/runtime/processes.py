"""One process or many: what `torchrun` says, the process group, and the few collectives the trainer needs."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """The processes that train one model together. A plain run is a world of one, without a process group."""

    rank: int
    size: int
    device: torch.device
    timeout_seconds: float = 600.0
    """How long one waits for another before it fails."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """What the device is called: the GPU's name, or the kind of CPU."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{platform.machine()} CPU"

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def broadcast(self, value: str | None) -> str | None:
        """The main process's `value`, on every process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def agreed(self, value: float) -> float:
        """The main process's number, on every process."""
        told = self.broadcast(repr(value))
        assert told is not None
        return float(told)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def mean(values: Tensor) -> Tensor:
    """Over all processes, in place; every process must call it. A world of one has it already."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def share(values: Tensor) -> None:
    """Give all processes those of the main one, in place; every process must call it."""
    if dist.is_initialized():
        dist.broadcast(values, src=0)


class Vote:
    """Whether any process wants each of several things, asked at every step and answered one step later.

    The answer is the same everywhere, and nobody waits for it: it travels between hosts while the next step runs.
    """

    def __init__(self, world: World, num_questions: int = 1) -> None:
        self._world = world
        # Over the hosts' network: asking a GPU would make the host wait for its step.
        self._group: Any = None
        if world.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=world.timeout_seconds))
        self._raised = torch.zeros(num_questions, dtype=torch.int64)
        self._pending: dist.Work | None = None

    def cast(self, *wanted: bool) -> tuple[bool, ...]:
        """Every process must call this at every step, with an answer to each question. A world of one has the outcome
        at once."""
        if self._world.size == 1:
            return wanted
        outcome = self.close()
        self._raised = torch.tensor(wanted, dtype=torch.int64)
        self._pending = dist.all_reduce(self._raised, group=self._group, async_op=True)
        return outcome

    def close(self) -> tuple[bool, ...]:
        """Wait for the outcome that is under way; all False if none is."""
        if self._pending is None:
            return tuple(False for _ in self._raised)
        self._pending.wait()
        self._pending = None
        return tuple(count > 0 for count in self._raised.tolist())


class LostProcess(Exception):
    """Another process of the job has died, or has not answered in time."""

    def __init__(self, rank: int, error: RuntimeError) -> None:
        super().__init__(
            f"process {rank} has lost another one ({str(error).splitlines()[0]}), whose own last words say why; "
            "torchrun --max-restarts begins the job again, and --resume goes on from the newest checkpoint"
        )


def is_lost(error: RuntimeError) -> bool:
    """Whether an error says that another process has died, or has not answered in time."""
    if isinstance(error, dist.DistError):
        return True
    told = str(error)  # gloo's errors have no class of their own
    return any(word in told for word in ("gloo", "Gloo", "NCCL", "Connection closed by peer"))


@contextmanager
def start(timeout_seconds: float = 600.0) -> Iterator[World]:
    """Join the processes that torchrun started, or be the only one. Leaves the process group on exit.

    A process that waits for another for `timeout_seconds` fails, and with it the job.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if size == 1:
        yield World(rank=0, size=1, device=device)
        return
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps the store when it begins its processes again, and with it the addresses of the dead ones. On
        # several nodes the counts may differ; there, who met a dead one's address is begun again.
        count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"restart-{count}", store)  # type: ignore[attr-defined]
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield World(rank=rank, size=size, device=device, timeout_seconds=timeout_seconds)
    finally:
        dist.destroy_process_group()
