"""Attention over images of several lengths in one sequence, each image apart from the others.

Everything else in a block looks at tokens one by one, so that images whose tokens have been taken out need no padding.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from pss.attention.attend import Attention, attend

_SHORT = 96
"""Images with fewer tokens, on average, are padded for attention: a call for each costs more than padding does."""


class Packing(NamedTuple):
    """Images of several lengths one after the other, T tokens in all."""

    lengths: list[int]
    padded: Tensor  # (B, longest): which of the T tokens comes there, any one where there is none
    there: Tensor  # (B, longest), bool
    places: Tensor  # (T,): where in (B * longest) each token comes

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> Self:
        counts, longest = torch.tensor(lengths, device=device), max(lengths)
        number = torch.arange(longest, device=device)
        there = number < counts[:, None]
        padded = (counts.cumsum(0) - counts)[:, None] + number
        return cls(lengths, padded.clamp(max=sum(lengths) - 1), there, there.flatten().nonzero().squeeze(1))


class PackedAttention(Attention):
    """Attention that also takes the tokens of several images as one sequence, each image apart from the others."""

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """As `Attention`; with a `packing`, x is (1, T, D), and positions are of one sequence of that length."""
        if packing is None:
            return super().forward(x, positions, attn_mask=attn_mask)
        q, k, v = self.project_in(x, positions)  # (1, H, T, width)
        table = self.relative_position_bias_table
        scale = self.head_dim**-0.5 if self.rel_pos == "separable" else None
        positions = None if table is None else positions
        lengths = packing.lengths
        if x.is_cuda or x.shape[1] < _SHORT * len(lengths):
            q, k, v = (part[0][:, packing.padded].transpose(0, 1) for part in (q, k, v))  # (B, H, longest, width)
            if positions is not None:
                positions = positions[:, 0, packing.padded]
            mask = packing.there[:, None, None]
            out = attend(q, k, v, table=table, positions=positions, attn_mask=mask, scale=scale)
            return self.project_out(out.transpose(1, 2).flatten(0, 1)[packing.places].transpose(0, 1)[None])
        images = zip(*(torch.split(part, lengths, dim=2) for part in (q, k, v)), strict=True)
        where = [None] * len(lengths) if positions is None else torch.split(positions, lengths, dim=2)
        apart = [
            attend(*image, table=table, positions=some, scale=scale) for image, some in zip(images, where, strict=True)
        ]
        return self.project_out(torch.cat(apart, dim=2))
