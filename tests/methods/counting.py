"""Sparse methods that look at their masks after every step: `counting:SViTE` and `counting:S2ViTE`."""

from __future__ import annotations

from typing import Any

import torch

from pss.methods import Progress, Step, s2vite, svite


class Counting:
    """Ends the run where a count is not what it was, and counts the updates in a buffer."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.register_buffer("updates_made", torch.zeros((), dtype=torch.int64))

    def counted(self) -> list[int]:
        raise NotImplementedError

    def expected(self) -> list[int]:
        raise NotImplementedError

    def end_step(self, at: Progress, step: Step) -> None:
        self.updates_made += self.moves(at)
        super().end_step(at, step)
        if self.counted() != self.expected():
            raise AssertionError(f"step {at.step} left other counts: {self.counted()}, not {self.expected()}")


class SViTE(Counting, svite.SViTE):
    name = "counting-svite"

    def counted(self) -> list[int]:
        return [int(mask.sum()) for _, _, mask in self.masked()]

    def expected(self) -> list[int]:
        return list(self.counts.values())


class S2ViTE(Counting, s2vite.S2ViTE):
    name = "counting-s2vite"

    def counted(self) -> list[int]:
        return [int(mask.sum()) for number in range(len(self.blocks)) for mask in self.masks_of(number)]

    def expected(self) -> list[int]:
        return [count for pair in zip(self.num_heads, self.num_neurons, strict=True) for count in pair]
