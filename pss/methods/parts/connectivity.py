"""What Sparsifiner is made of: predictors of which keys a query sees, and attention that sees no others.

Sections are those of Wei et al., 2023 (https://arxiv.org/abs/2303.13755) and of its supplement.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, Self

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from pss.attention.attend import Attention, attend, logit_bias
from pss.models.flops import linear_macs

Signs = Literal["magnitude", "clamp"]


class Thresholds(NamedTuple):
    """What is left of the predicted scores' two factors."""

    basis: float
    """Entries of the basis that are no larger are zero."""
    coefficient: float
    """As `basis`, of coefficients; unless `top` decides."""
    top: int | None = None
    """So many of a query's largest coefficients are left."""
    signs: Signs = "magnitude"
    """Whether a negative entry of the basis counts as a positive one (as published), or as zero."""

    @classmethod
    def of(cls, basis: float, coefficient: float | None, top: int | None, signs: Signs, num_down: int) -> Self:
        """None for `coefficient` is 1.6 times the mean of `num_down` coefficients, the published 0.05 of 32."""
        return cls(basis, 1.6 / num_down if coefficient is None else coefficient, top, signs)


class Predictor(nn.Module):
    """A low-rank estimate of the attention of a block's patches, the same parameters for all heads (section 3).

    Keys are compressed along the tokens by `down` (N, K); a query's similarities to what is left are coefficients of
    the K rows of the basis, the transpose of `up` (N, K).
    """

    def __init__(self, num_tokens: int, num_down: int, head_dim: int, *, scale: float, thresholds: Thresholds) -> None:
        """`scale` is the factor on the products of reduced queries and keys."""
        super().__init__()
        self.scale, self.thresholds = scale, thresholds
        width = max(1, head_dim // 2)
        self.queries = nn.Linear(head_dim, width)
        self.keys = nn.Linear(head_dim, width)
        self.down = nn.Parameter(torch.empty(num_tokens, num_down))
        self.up = nn.Parameter(torch.empty(num_tokens, num_down))
        for part in (self.queries.weight, self.keys.weight, self.down, self.up):
            trunc_normal_(part, std=0.02)
        for bias in (self.queries.bias, self.keys.bias):
            nn.init.zeros_(bias)

    def coefficients(self, q: Tensor, k: Tensor, rows: Tensor | None = None) -> Tensor:
        """Before any threshold, (B, H, n, K), at least in float32.

        Args:
            q: Queries of the patches as attention has them, before they are scaled, (B, H, n, head width).
            k: Keys of all tokens, (B, H, N, head width).
            rows: Which of the tokens that the predictor was made for are there, (N,); None for all.
        """
        down = self.down if rows is None else self.down[rows]
        with _full_precision(q):
            q, k = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (q, k))
            compressed = self.keys(k).transpose(-2, -1) @ down  # (B, H, c, K)
            products: Tensor = self.queries(q) @ compressed
            return (self.scale * products).softmax(-1)

    def errors(self, q: Tensor, k: Tensor, weights: Tensor, rows: Tensor | None = None) -> Tensor:
        """Squared distances of the estimate from dense attention, summed over heads, patches and keys, (B,).

        Args:
            q: As in `coefficients`.
            k: As in `coefficients`.
            weights: Attention of the patches, (B, H, n, N).
            rows: As in `coefficients`.
        """
        up = self.up if rows is None else self.up[rows]
        with _full_precision(q):
            estimate = self.coefficients(q.detach(), k.detach(), rows) @ up.T
            return (estimate - weights.detach().to(estimate.dtype)).square().sum((1, 2, 3))

    def basis(self, rows: Tensor | None = None) -> Tensor:
        """What the threshold leaves of the basis, (K, N); nothing in it is negative."""
        up = self.up if rows is None else self.up[rows]
        size = up.abs() if self.thresholds.signs == "magnitude" else up
        return torch.where(size > self.thresholds.basis, size, 0).T

    def sparse_coefficients(self, q: Tensor, k: Tensor, rows: Tensor | None = None) -> Tensor:
        """What the threshold leaves of the `coefficients`, (B, H, n, K)."""
        found, top = self.coefficients(q, k, rows), self.thresholds.top
        if top is None:
            return torch.where(found > self.thresholds.coefficient, found, 0)
        return torch.where(strongest(found, min(top, found.shape[-1])), found, 0)

    @torch.no_grad()
    def scores(self, q: Tensor, k: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """How much each patch is to look at each token, (B, H, n, N), and the share of each image's coefficients that
        are zero, (B,)."""
        coefficients = self.sparse_coefficients(q, k, rows)
        with _full_precision(q):
            return coefficients @ self.basis(rows), (coefficients == 0).float().mean((1, 2, 3))

    def macs(self, num_tokens: int, num_heads: int) -> int:
        """Multiply-accumulates of the coefficients of an image's tokens (supplement; biases are not counted)."""
        width = self.queries.out_features
        return linear_macs(self, num_tokens * num_heads) + 2 * num_heads * num_tokens * self.down.shape[1] * width

    def combination_macs(
        self, num_tokens: int, num_heads: int, coefficient_share: float = 1.0, basis_share: float = 1.0
    ) -> int:
        """Multiply-accumulates of coefficients times basis; shares are of what is not zero, where that alone counts."""
        products = num_heads * num_tokens * self.down.shape[1] * num_tokens
        return round(products * coefficient_share * basis_share)


def _full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Without autocast: half precision would leave many equal scores, and other keys in training than at inference."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def strongest(scores: Tensor, count: int) -> Tensor:
    """Where the `count` highest scores of each row are, bool; of equal scores the first ones, on every device."""
    if count >= scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    least = scores.topk(count, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > least, scores == least
    room = count - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))


def places_of_strongest(scores: Tensor, count: int) -> Tensor:
    """The indices of what `strongest` chooses, in the order of their scores, int64 (..., count)."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def attend_where(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """`attend` to the keys that a mask (B, H, N, N) shows, True for those; a query that sees none gets zeros."""
    sees = mask.any(-1, keepdim=True)
    attended = attend(q, k, v, attn_mask=mask | ~sees, **options)
    return attended.masked_fill(~sees, 0)


def attend_gathered(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, *, scale: float, bias: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention that computes no more than each query's own keys; the same as `attend_where`.

    Args:
        q: Queries, (B, H, n, head width).
        k: Keys, (B, H, N, head width).
        v: Values, (B, H, N, width of a value).
        keys: Which keys each query sees, (B, H, n, budget).
        scale: Factor of the products of queries and keys.
        bias: Added to the logits, broadcastable to (B, H, n, N).
        allowed: False where a place of `keys` is to be left out, as it.

    Returns:
        (B, H, n, width of a value).
    """
    offsets = torch.arange(q.shape[0] * q.shape[1], device=q.device).view(*q.shape[:2], 1, 1) * k.shape[2]
    rows = keys + offsets  # of all images and heads
    near = _take(k, rows)  # (B, H, n, budget, head width)
    logits = (near @ q.unsqueeze(-1)).squeeze(-1) * scale
    if bias is not None:
        logits = logits + bias.expand(*keys.shape[:3], -1).gather(-1, keys)
    if allowed is not None:
        sees = allowed.any(-1, keepdim=True)
        logits = logits.masked_fill(~(allowed | ~sees), -torch.inf)
    weights = logits.softmax(-1)
    if allowed is not None:
        weights = weights.masked_fill(~sees, 0)
    return (weights.to(v.dtype).unsqueeze(-2) @ _take(v, rows)).squeeze(-2)


def _take(parts: Tensor, rows: Tensor) -> Tensor:
    flat = parts.flatten(0, 2)
    return flat.index_select(0, rows.flatten()).view(*rows.shape, flat.shape[-1])


class Connection(NamedTuple):
    """What a block's attention is to do with its predictor."""

    predictor: Predictor
    num_prefix: int
    """Tokens before the patches; as queries they see everything."""
    budget: int | None
    """Keys of each patch; None lets all see all, and returns how far the predictor is from that."""
    rows: Tensor | None = None
    """Which of the tokens that the predictor was made for are there, (N,); None for all."""
    gathered: bool = False
    """Whether to compute the keys of each patch alone, instead of all and hiding the others."""


class Connected(NamedTuple):
    """Who sees whom in a block, and how much."""

    mask: Tensor
    """bool, (B, H, N, N)."""
    sparse: Tensor
    """Attention weights under the mask, (B, H, N, N); zero outside, and each row adds up to 1."""
    full: Tensor
    """Those without it."""
    scores: Tensor
    """What the predictor says of the patches, (B, H, n, N)."""


class ConnectedAttention(Attention):
    """Attention whose patches see those keys that a predictor chooses; without one it is what it was made from."""

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        connection: Connection | None = None,
    ) -> Any:
        """Tokens (B, N, D) to tokens (B, N, D).

        With a `connection` also, of each image: if it has a budget, which shares of its coefficients are zero, and of
        its patches have fewer positive scores than keys, (B, 2); if it has none, the predictor's errors, (B,).
        """
        if connection is None:
            return super().forward(x, positions, attn_mask=attn_mask)
        assert attn_mask is None
        q, k, v = self.project_in(x, positions)
        predictor, prefix, budget, rows, gathered = connection
        if budget is None:
            weights = self.logits(q, k, positions).softmax(-1)
            own_q, own_k = self._own(q, k, prefix)
            errors = predictor.errors(own_q, own_k, weights[:, :, prefix:], rows)
            return self.project_out(self.attn_drop(weights).to(v.dtype) @ v), errors
        scores, zeros = predictor.scores(*self._own(q, k, prefix), rows)
        short = ((scores > 0).sum(-1) < budget).float().mean((1, 2))
        if gathered:
            attended = self._gathered(q, k, v, places_of_strongest(scores, budget), positions)
        else:
            attended = self._hidden(q, k, v, _with_prefix(strongest(scores, budget), prefix), positions)
        return self.project_out(attended), torch.stack((zeros, short), dim=1)

    def connected(self, x: Tensor, positions: Tensor | None, connection: Connection) -> Connected:
        """What a connection with a budget makes of the tokens (B, N, D), in plain operations; for pictures."""
        q, k, _ = self.project_in(x, positions)
        assert connection.budget is not None
        scores, _ = connection.predictor.scores(*self._own(q, k, connection.num_prefix), connection.rows)
        mask = _with_prefix(strongest(scores, connection.budget), connection.num_prefix)
        logits = self.logits(q, k, positions)
        return Connected(mask, logits.masked_fill(~mask, -torch.inf).softmax(-1), logits.softmax(-1), scores)

    def _own(self, q: Tensor, k: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
        """Queries of the patches and keys, without the features that a separable position bias adds."""
        return q[:, :, prefix:, : self.head_dim], k[..., : self.head_dim]

    def _hidden(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, positions: Tensor | None) -> Tensor:
        table = self.relative_position_bias_table
        dropout = self.attn_drop.p if self.training else 0.0
        if table is not None:
            return attend_where(q, k, v, mask, table=table, positions=positions, dropout=dropout)
        scale = self.head_dim**-0.5 if self.rel_pos == "separable" else None
        return attend_where(q, k, v, mask, dropout=dropout, scale=scale)

    def _gathered(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, positions: Tensor | None) -> Tensor:
        prefix, scale, table = q.shape[2] - keys.shape[2], self.head_dim**-0.5, self.relative_position_bias_table
        bias = None
        if table is not None:
            assert positions is not None
            bias = logit_bias(table, positions, None, q.dtype).expand(q.shape[0], -1, -1, -1)
        patches = attend_gathered(
            q[:, :, prefix:], k, v, keys, scale=scale, bias=None if bias is None else bias[:, :, prefix:]
        )
        logits = q[:, :, :prefix] @ k.transpose(-2, -1) * scale
        if bias is not None:
            logits = logits + bias[:, :, :prefix]
        return torch.cat((logits.softmax(-1).to(v.dtype) @ v, patches), dim=2)


def _with_prefix(mask: Tensor, prefix: int) -> Tensor:
    """The mask of the patches (B, H, n, N), with rows that see everything before it, (B, H, N, N)."""
    return torch.cat((mask.new_ones(*mask.shape[:2], prefix, mask.shape[-1]), mask), dim=2)
