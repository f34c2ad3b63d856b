"""The predictors of all blocks, and a model whose attention they observe, or decide."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from pss.methods.parts.connectivity import Connected, ConnectedAttention, Connection, Predictor, Thresholds
from pss.models.flops import attention_macs
from pss.models.vit import VisionTransformer
from pss.runtime.shards import whole

Scale = Literal["heads", "width"]

_ROUNDING = 1e-6  # must not add a key: 100 * 0.07 comes out above 7


class KeepRates(NamedTuple):
    """How many keys a patch sees in each block, at any operating point."""

    keep: float
    """The trained operating point: the mean of the blocks' rates."""
    exponents: tuple[float, ...]
    """The powers of an operating point that the blocks keep: another one moves all, and at 1 all see everything."""
    of_all: bool
    """Whether rates are shares of all tokens, and not of the patches."""

    @classmethod
    def of(cls, rates: Sequence[float], of_all: bool) -> Self:
        keep = rates[0] if len(set(rates)) == 1 else sum(rates) / len(rates)
        return cls(keep, tuple(math.log(rate) / math.log(keep) for rate in rates), of_all)

    def budgets(self, point: float, num_patches: int, num_prefix: int) -> tuple[int, ...]:
        """Keys of a patch in each block; one at least, and at a rate of 1 all tokens."""
        every = num_patches + num_prefix
        base = every if self.of_all else num_patches
        rates = [point**exponent for exponent in self.exponents]
        return tuple(every if rate >= 1 else max(1, math.ceil(base * rate - _ROUNDING)) for rate in rates)

    def steps(self, num_patches: int) -> set[float]:
        """Operating points below 1 with which some block's patches see a whole number of keys."""
        powers = {power for power in self.exponents if power}
        return {(count / num_patches) ** (1 / power) for count in range(1, num_patches) for power in powers}


def usual_num_down(num_tokens: int) -> int:
    """Rows of a basis for images of so many tokens: the published 32, or half the tokens where that is fewer."""
    return min(32, -(-num_tokens // 2))


class Predictors(nn.ModuleList):
    """One for each block of a model, which is handed in where it is needed: it is the method's."""

    def __init__(self, model: VisionTransformer, num_down: int, scale: Scale, thresholds: Thresholds) -> None:
        """Gives the model's blocks an attention that takes a predictor; its weights stay.

        Args:
            model: Whose blocks they are for.
            num_down: Rows of a basis, K.
            scale: Factor on products of reduced queries and keys: one over the root of the heads, or of their width.
            thresholds: What is left of scores' factors.
        """
        super().__init__()
        self.thresholds = thresholds
        for block in cast(Any, model.blocks):
            block.attn = attention = ConnectedAttention(block.attn)
            width = attention.num_heads if scale == "heads" else max(1, attention.head_dim // 2)
            self.append(
                Predictor(model.num_tokens, num_down, attention.head_dim, scale=width**-0.5, thresholds=thresholds)
            )
            self.num_heads, self.product_width = attention.num_heads, attention.product_width

    def each(self) -> list[Predictor]:
        """Them, block by block."""
        return cast(list[Predictor], list(self))

    def observe(self, model: VisionTransformer, tokens: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
        """A dense forward pass, and how far the predictors are from its attention.

        Args:
            model: That of these predictors.
            tokens: As `VisionTransformer.see` returns them, (B, N, D).
            places: As it does.

        Returns:
            All tokens after the last norm, and the mean over the blocks of `Predictor.errors`, (B,).
        """
        errors: list[Tensor] = []
        positions, rows = model.positions(places), _rows(model, places)
        for number, predictor in enumerate(self.each()):
            connection = Connection(predictor, model.num_prefix_tokens, None, rows)
            tokens = _block(model, number, tokens, positions, connection, errors)
        return model.norm(tokens), torch.stack(errors).mean(0)

    def connect(
        self, model: VisionTransformer, tokens: Tensor, places: Tensor | None, budgets: Sequence[int], *, gathered: bool
    ) -> tuple[Tensor, Tensor]:
        """A forward pass in which patches see so many keys in each block; no predictor is asked where that is all.

        Returns:
            All tokens after the last norm, and of each image which shares of its coefficients are zero, and of its
            patches have fewer positive scores than keys, (B, 2): means over the blocks whose predictors are asked.
        """
        figures: list[Tensor] = []
        positions = model.positions(places)
        for number, connection in enumerate(self._connections(model, tokens, places, budgets, gathered)):
            tokens = _block(model, number, tokens, positions, connection, figures)
        told = torch.stack(figures).mean(0) if figures else tokens.new_zeros(tokens.shape[0], 2)
        return model.norm(tokens), told

    def connected(
        self, model: VisionTransformer, tokens: Tensor, budgets: Sequence[int], blocks: Sequence[int] | None
    ) -> list[Connected]:
        """Who sees whom in some blocks, by default in all."""
        positions, found = model.positions(None), {}
        wanted = range(len(self)) if blocks is None else blocks
        for number, connection in enumerate(self._connections(model, tokens, None, budgets, False)):
            block: Any = model.blocks[number]
            if number in wanted:
                full = Connection(self.each()[number], model.num_prefix_tokens, tokens.shape[1])
                found[number] = block.attn.connected(block.norm1(tokens), positions, connection or full)
            tokens = _block(model, number, tokens, positions, connection, [])
        return [found[number] for number in wanted]

    def _connections(
        self, model: VisionTransformer, tokens: Tensor, places: Tensor | None, budgets: Sequence[int], gathered: bool
    ) -> Iterator[Connection | None]:
        rows, num_tokens = _rows(model, places), tokens.shape[1]
        for predictor, budget in zip(self.each(), budgets, strict=True):
            few = budget < num_tokens
            yield Connection(predictor, model.num_prefix_tokens, budget, rows, gathered) if few else None

    # What they cost, and what they have learnt.

    def macs(self, num_tokens: int, budgets: Sequence[int]) -> int:
        """Multiply-accumulates of an image as they are computed, products with zeros too; none where a budget is all
        tokens."""
        return sum(
            predictor.macs(num_tokens, self.num_heads) + predictor.combination_macs(num_tokens, self.num_heads)
            for predictor, budget in zip(self.each(), budgets, strict=True)
            if budget < num_tokens
        )

    def hidden_macs(self, model: VisionTransformer, budgets: Sequence[int]) -> int:
        """Multiply-accumulates of an image's attention to keys that its patches do not see."""
        width, count = self.num_heads * self.product_width, model.num_tokens
        return sum(attention_macs(model.num_patches, count - budget, width) for budget in budgets)

    def needed_macs(
        self, num_tokens: int, budgets: Sequence[int], coefficient_sparsity: float, basis_sparsity: float
    ) -> int:
        """Multiply-accumulates that attention and predictors need at least: no product with a zero, nor with a hidden
        key.

        DeiT-S, 224 px: 177.2 M at budgets of 49 and sparsities of 0.87 and 0.908; dense 357.7 M.
        """
        width, left = self.num_heads * self.product_width, (1 - coefficient_sparsity, 1 - basis_sparsity)
        total = 0
        for predictor, budget in zip(self.each(), budgets, strict=True):
            total += attention_macs(num_tokens, budget, width)
            if budget < num_tokens:
                combination = predictor.combination_macs(num_tokens, self.num_heads, *left)
                total += predictor.macs(num_tokens, self.num_heads) + combination
        return total

    def figures(self, num_tokens: int, budgets: Sequence[int], seen: Tensor | None) -> dict[str, float]:
        """What there is to tell of them.

        Args:
            num_tokens: Of an image.
            budgets: Keys of a patch, block by block.
            seen: Sums over images of the figures that `connect` returns, and the number of images, (3,); None if there
                were none.

        Returns:
            `basis_sparsity`, and `negative_basis`, the share of entries that are below minus the threshold and lose
            their sign; if images were seen, `coefficient_sparsity`, `short_rows` (the share of patches with fewer
            positive scores than keys, which see the first tokens instead) and `attention_needed`, what attention needs
            at least over dense attention.
        """
        left, negative = self.shares()
        found = {"basis_sparsity": 1 - sum(left) / len(left), "negative_basis": sum(negative) / len(negative)}
        if seen is not None:
            zeros, short, images = seen.tolist()
            found |= {"coefficient_sparsity": zeros / images, "short_rows": short / images}
            needed = self.needed_macs(num_tokens, budgets, zeros / images, found["basis_sparsity"])
            found["attention_needed"] = needed / self.needed_macs(num_tokens, [num_tokens] * len(self), 0.0, 0.0)
        return found

    def shares(self) -> tuple[list[float], list[float]]:
        """Of each block's basis: what the threshold leaves of it, and what is below minus the threshold."""
        bases = [whole(predictor.up.detach()) for predictor in self.each()]
        above = [float((up > self.thresholds.basis).float().mean()) for up in bases]
        below = [float((up < -self.thresholds.basis).float().mean()) for up in bases]
        if self.thresholds.signs == "clamp":
            return above, below
        return [sum(both) for both in zip(above, below, strict=True)], below


def _block(
    model: VisionTransformer,
    number: int,
    tokens: Tensor,
    positions: Tensor | None,
    connection: Connection | None,
    found: list[Tensor],
) -> Tensor:
    extras: list[Any] = []
    options = {} if connection is None else {"connection": connection}
    tokens = model.run_blocks(tokens, positions, number, number + 1, extras=extras, **options)
    found += [extra for extra in extras if extra is not None]
    return tokens


def _rows(model: VisionTransformer, places: Tensor | None) -> Tensor | None:
    """Which tokens of whole images are there, prefix included."""
    if places is None:
        return None
    prefix = model.num_prefix_tokens
    return torch.cat((torch.arange(prefix, device=places.device), prefix + places))
