"""A batch computed in parts, each as another process would compute it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from pss.runtime.processes import share


class Parts:
    """The parts of one step.

    Buffers that a forward pass changes, such as running statistics, are in each part what they were when the step
    began, and in the end what the first part made of them: DDP hands the first process's buffers to all before a step.
    """

    def __init__(self, method: nn.Module, count: int) -> None:
        self._method, self._count = method, count

    def part(self, number: int) -> AbstractContextManager[None]:
        """Part `number` is computed within, forward and backward."""
        return nullcontext() if self._count == 1 else self._one_of_several(number)

    @contextmanager
    def _one_of_several(self, number: int) -> Iterator[None]:
        # Not before the call, as DDP sets buffers in it.
        hook = self._method.register_forward_pre_hook(self._remember) if number == 0 else None
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()
        if number == 0:
            self._first = self._copies()
        self._put(self._first if number + 1 == self._count else self._before)

    def _remember(self, module: nn.Module, arguments: tuple[object, ...]) -> None:
        self._before = self._copies()

    def _copies(self) -> dict[str, Tensor]:
        # Of all of them: batch normalisation, for one, changes its statistics without a trace in their versions.
        return {name: buffer.detach().clone() for name, buffer in self._method.named_buffers()}

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, buffer in self._method.named_buffers():
            buffer.copy_(values[name])


def share_buffers(*modules: nn.Module) -> None:
    """Have all processes evaluate with the buffers, such as running statistics, of the first one, which saves its own.

    Each has seen other images since DDP last did so; shards never do.
    """
    for module in modules:
        for buffer in module.buffers():
            share(buffer)
