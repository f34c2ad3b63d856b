"""Self-attention with an optional relative position bias, for the whole sequence or any kept part of it.

`attend` is the only place that chooses an implementation; everything that computes attention goes through it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    table: Tensor | None = None,
    bias_index: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention, plus the bias `table[bias_index]` on the logits.

    Args:
        q: Queries, (B, H, K, head width); `k` and `v` alike.
        k: Keys.
        v: Values.
        table: Relative position bias table, (rows, H); None for no bias.
        bias_index: Table row of each pair of tokens, (B, K, K), or (1, K, K) if all images keep the same tokens.
        attn_mask: Broadcastable to (B, H, K, K): added to the logits, or, if boolean, False where a query must not see
            a key.
        dropout: Probability of dropping an attention weight.

    Returns:
        (B, H, K, head width), in the dtype of `q`.
    """
    bias = logit_bias(table, bias_index, attn_mask, q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)


def attend_explicitly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    table: Tensor | None = None,
    bias_index: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """`attend` written out in plain tensor operations: slow, obvious, in any dtype; what `attend` is tested against."""
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, H, K, K)
    bias = logit_bias(table, bias_index, attn_mask, q.dtype)
    if bias is not None:
        logits = logits.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else logits + bias
    attended: Tensor = logits.softmax(dim=-1) @ v
    return attended


def logit_bias(
    table: Tensor | None, bias_index: Tensor | None, attn_mask: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """Position bias and mask as one tensor for the logits, broadcastable to (B, H, K, K), or None if there is neither.

    Raises:
        ValueError: there is a table and no index into it, or the other way round.
    """
    if (table is None) != (bias_index is None):
        raise ValueError("a relative position bias needs its table and its bias_index; pass both or neither")
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(dtype)
    if table is None or bias_index is None:
        return attn_mask
    # Looked up in the table's own precision, as its gradient adds up B * K * K terms. On a CPU this lookup is several
    # times faster, backwards too, than an embedding or an advanced index, and its result is contiguous.
    num_images, num_kept, _ = bias_index.shape
    num_heads = table.shape[1]
    rows = table.t().expand(num_images, -1, -1)  # (1 or B, H, rows)
    pairs = bias_index.flatten(1).unsqueeze(1).expand(-1, num_heads, -1)  # (1 or B, H, K * K)
    bias = rows.gather(2, pairs).view(num_images, num_heads, num_kept, num_kept).to(dtype)
    if attn_mask is None:
        return bias
    return bias.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else bias + attn_mask


class Attention(nn.Module):
    """timm's multi-head self-attention with a relative position bias, built from the parts of an existing module.

    Parameter names are timm's (`qkv`, `q_norm`, `k_norm`, `norm`, `proj`); optional ones are BEiT's (`q_bias`,
    `v_bias`, `relative_position_bias_table`). Without the optional ones the numbers are timm's, bit for bit.
    """

    def __init__(self, source: Any) -> None:
        """Take over the parts of `source`: timm's `Attention`, or one of these (which lets a subclass replace it)."""
        super().__init__()
        self.num_heads: int = source.num_heads
        self.head_dim: int = source.head_dim
        self.qkv: nn.Linear = source.qkv
        self.q_norm: nn.Module = source.q_norm
        self.k_norm: nn.Module = source.k_norm
        self.attn_drop: nn.Dropout = source.attn_drop
        self.norm: nn.Module = source.norm
        self.proj: nn.Linear = source.proj
        self.proj_drop: nn.Module = source.proj_drop
        self.q_bias: nn.Parameter | None = getattr(source, "q_bias", None)
        self.v_bias: nn.Parameter | None = getattr(source, "v_bias", None)
        self.relative_position_bias_table: nn.Parameter | None = getattr(source, "relative_position_bias_table", None)

    def add_bias_table(self, num_rows: int) -> None:
        """Add a relative position bias, zero at first, with one row per kind of token pair (see `pss.relpos`)."""
        self.relative_position_bias_table = nn.Parameter(self.proj.weight.new_zeros(num_rows, self.num_heads))

    def drop_key_bias(self) -> None:
        """Keep the bias of queries and values only, as BEiT does (a bias on keys cancels in the softmax)."""
        assert self.qkv.bias is not None
        q_bias, _, v_bias = self.qkv.bias.detach().chunk(3)
        self.qkv.register_parameter("bias", None)
        self.q_bias, self.v_bias = nn.Parameter(q_bias.clone()), nn.Parameter(v_bias.clone())

    def forward(self, x: Tensor, bias_index: Tensor | None = None, *, attn_mask: Tensor | None = None) -> Tensor:
        """Tokens (B, K, D) to tokens (B, K, D); see `attend` for `bias_index` and `attn_mask`."""
        q, k, v = self.project_in(x)
        x = attend(
            q,
            k,
            v,
            table=self.relative_position_bias_table,
            bias_index=bias_index,
            attn_mask=attn_mask,
            dropout=self.attn_drop.p if self.training else 0.0,
        )
        return self.project_out(x)

    def project_in(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the tokens (B, K, D), each (B, H, K, head width)."""
        if self.q_bias is None or self.v_bias is None:
            qkv = self.qkv(x)  # (B, K, 3 * H * head width)
        else:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
            qkv = F.linear(x, self.qkv.weight, bias)
        qkv = qkv.reshape(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def project_out(self, x: Tensor) -> Tensor:
        """The heads' results (B, H, K, head width) mixed into tokens (B, K, D)."""
        x = x.transpose(1, 2).flatten(2)  # (B, K, H * head width)
        projected: Tensor = self.proj_drop(self.proj(self.norm(x)))
        return projected
