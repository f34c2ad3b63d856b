"""Self-attention that knows the relative positions of its tokens, for the whole sequence or any kept part of it.

`attend` and `attend_packed` are the only place that chooses an implementation; everything that computes attention goes
through them. With a bias table there are three, which agree:
* reference: plain tensor operations, in any dtype, on any device (`attend_explicitly`);
* materialised: the bias looked up into a buffer (`pss.attention.materialised`); the choice on a CPU;
* fused: the bias looked up inside a Triton kernel (`pss.attention.fused`); the choice on a CUDA device.

The environment variable PSS_ATTENTION forces one of them. Masks, attention dropout and `torch.export` get the bias as
part of the mask of torch's own attention, and so does whatever no other implementation serves.
"""

import functools
import os
import warnings
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pss.attention import relpos
from pss.attention.materialised import materialised_attention, materialised_serves
from pss.attention.relpos import Grid

RelPos = Literal["none", "bias", "separable", "rope"]
Implementation = Literal["reference", "materialised", "fused"]

_MAX_FUSED_WIDTH = 128  # of a head; more does not fit into the fused kernels' registers


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    table: Tensor | None = None,
    positions: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention, with or without a relative position bias on the logits.

    Args:
        q: Queries, (B, H, K, head width).
        k: Keys, as `q`.
        v: Values, as `q`, or narrower.
        table: Relative position bias table, (rows, H); None for no bias.
        positions: Where the tokens are, (2, B, K), or (2, 1, K) if all images keep the same ones; see
            `pss.attention.relpos.positions`.
        attn_mask: Broadcastable to (B, H, K, K): added to the logits, or, if boolean, False where a query must not see
            a key.
        dropout: Probability of dropping an attention weight.
        scale: Factor of the products of queries and keys, without a table; by default 1 / sqrt(head width).

    Returns:
        (B, H, K, width of `v`), in its dtype.

    Raises:
        ValueError: there is a table and no positions, or the other way round, or PSS_ATTENTION names no
            implementation that can be used here.
    """
    if table is None and positions is None:
        return _torch_attention(q, k, v, attn_mask, dropout, scale)
    assert scale is None
    # Under autocast a norm of queries or keys returns float32; the values are in the dtype that attention is to have.
    qkv = torch.stack((q.to(v.dtype), k.to(v.dtype), v))
    return attend_packed(qkv, table=table, positions=positions, attn_mask=attn_mask, dropout=dropout)


def attend_packed(
    qkv: Tensor,
    *,
    table: Tensor | None,
    positions: Tensor | None,
    attn_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`attend` with a bias, for queries, keys and values in one tensor (3, B, H, K, head width) of any layout.

    Their gradients come back in one tensor of the same layout, which saves copying them together.
    """
    if table is None or positions is None:
        raise ValueError("a position bias (model.rel_pos) needs its table and the tokens' positions; give both or none")
    choice = _choose(qkv, table, plain=attn_mask is None and dropout == 0)
    if choice == "fused":
        from pss.attention.fused import fused_attention

        out: Tensor = fused_attention(qkv, table, positions)[0]
        return out.transpose(1, 2)
    if choice == "materialised":
        out = materialised_attention(qkv, table, positions)[0]
        return out.transpose(1, 2)
    q, k, v = qkv
    if choice == "reference":
        return attend_explicitly(q, k, v, table=table, positions=positions, attn_mask=attn_mask, dropout=dropout)
    return _torch_attention(q, k, v, logit_bias(table, positions, attn_mask, q.dtype), dropout)


def attend_explicitly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    table: Tensor | None = None,
    positions: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`attend` written out in plain tensor operations: slow, obvious, in any dtype; what the others are tested by."""
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, H, K, K)
    if table is not None:
        assert positions is not None
        bias = table[relpos.pair_rows(positions, table.shape[0])]  # (B or 1, K, K, H)
        logits = logits + bias.permute(0, 3, 1, 2).to(logits.dtype)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        logits = logits + attn_mask.to(logits.dtype)
    return F.dropout(logits.softmax(dim=-1), dropout) @ v


def logit_bias(table: Tensor, positions: Tensor, attn_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Position bias and mask as one tensor for the logits, broadcastable to (B, H, K, K); for `attend`'s arguments."""
    entries = relpos.pair_entries(positions)  # (B or 1, K, K)
    shape = (entries.shape[0], table.shape[1], *entries.shape[1:])
    # Looked up in the table's own precision, as its gradient adds up B * K * K terms.
    rows = relpos.spread(table).expand(shape[0], -1, -1)
    bias = rows.gather(2, entries.unsqueeze(1).expand(shape).flatten(2)).view(shape).to(dtype)
    if attn_mask is None:
        return bias
    return bias.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else bias + attn_mask.to(dtype)


def _choose(qkv: Tensor, table: Tensor, plain: bool) -> Implementation | None:
    """Who computes attention with a bias; None for torch. `plain` attention has no mask and no dropout."""
    forced: Implementation | None = _forced()
    if forced == "reference" or _is_transformed(qkv, table):
        return "reference"
    if torch.compiler.is_exporting() or not plain:
        return None
    if forced == "fused":
        if not _fused_serves(qkv):
            raise ValueError(
                f"PSS_ATTENTION=fused cannot serve {qkv.dtype} queries {qkv.shape[-1]} wide on a {qkv.device.type} "
                f"device: it takes half precision or float32, up to {_MAX_FUSED_WIDTH} wide, on a CUDA device with "
                "Triton; unset PSS_ATTENTION"
            )
        return forced
    if forced is None and qkv.is_cuda and _fused_serves(qkv):
        return "fused"
    return "materialised" if materialised_serves(qkv) else None


def _is_transformed(*tensors: Tensor) -> bool:
    """Whether a transform of `torch.func` is at work, such as `jvp` or `vmap`.

    The kernels have a backward pass, and no other derivative: under `jvp` their tangents would be zero without a word.
    """
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    return any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)


def _fused_serves(qkv: Tensor) -> bool:
    return (
        _triton_runs_on(qkv.device.type)
        and qkv.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and qkv.shape[-1] <= _MAX_FUSED_WIDTH
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _triton_runs_on(device_type: str) -> bool:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return find_spec("triton") is not None and (device_type == "cuda" or interpreted)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _forced() -> Implementation | None:
    """The implementation that the environment asks for."""
    wanted = os.environ.get("PSS_ATTENTION")
    if not wanted:
        return None
    choices: tuple[Implementation, ...] = get_args(Implementation)
    for choice in choices:
        if choice == wanted:
            return choice
    raise ValueError(f"PSS_ATTENTION must be one of {', '.join(choices)}, got {wanted!r}; correct or unset it")


# torch's own attention.


def _torch_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout: float, scale: float | None = None
) -> Tensor:
    width = v.shape[-1]
    if width < q.shape[-1]:  # the fast kernels want all three alike
        v = F.pad(v, (0, q.shape[-1] - width))
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(q.dtype)  # cuDNN misreads another dtype without a word
    if attn_mask is not None and q.is_cuda and not _cudnn_gets_masks_right():
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, scale=scale)
    else:
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, scale=scale)
    return attended[..., :width]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cudnn_gets_masks_right() -> bool:
    return gets_masks_right(SDPBackend.CUDNN_ATTENTION, "cuda")


@functools.cache
def gets_masks_right(backend: SDPBackend, device: str) -> bool:
    """Whether a backend of torch's attention, if given a mask, agrees with plain arithmetic; tried once per process.

    cuDNN has been wrong with masks at some lengths, and for rows whose logits are all very negative, without an error.
    A backend that refuses the task counts as wrong.
    """
    generator = torch.Generator(device).manual_seed(0)
    for num_tokens in (39, 64, 192, 197):
        q, k, v, direction = torch.randn(4, 2, 2, num_tokens, 64, generator=generator, device=device).bfloat16()
        mask = torch.randn(2, 2, num_tokens, num_tokens, generator=generator, device=device).bfloat16()
        mask[:, :, ::3] -= 100
        results = []
        for kernel, dtype in ((backend, torch.bfloat16), (SDPBackend.MATH, torch.float32)):
            inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
            try:
                with warnings.catch_warnings(action="ignore"), sdpa_kernel(kernel), torch.enable_grad():
                    out = F.scaled_dot_product_attention(inputs[0], inputs[1], inputs[2], mask.to(dtype))
                    results.append([out, *torch.autograd.grad(out, inputs, direction.to(dtype))])
            except RuntimeError:
                return False
        for ours, exact in zip(*results, strict=True):
            if not (ours - exact).norm() <= 0.02 * exact.norm():  # false for NaN too
                return False
    return True


class Attention(nn.Module):
    """timm's multi-head self-attention with relative positions, built from the parts of an existing module.

    Parameter names are timm's (`qkv`, `q_norm`, `k_norm`, `norm`, `proj`); optional ones are BEiT's (`q_bias`,
    `v_bias`, `relative_position_bias_table`) or, for the separable bias, our own. Without the optional ones the
    numbers are timm's, bit for bit.
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
        self.rel_pos: RelPos = getattr(source, "rel_pos", "none")
        self.grid: Grid | None = getattr(source, "grid", None)
        self.relative_position_bias_table: nn.Parameter | None = getattr(source, "relative_position_bias_table", None)
        self.separable_relative_position_bias_table: nn.Parameter | None = getattr(
            source, "separable_relative_position_bias_table", None
        )

    @property
    def product_width(self) -> int:
        """Features of a head in both products of attention, queries times keys and weights times values.

        What a separable bias adds to queries and keys, the values get too, as zeros.
        """
        if self.rel_pos != "separable":
            return self.head_dim
        assert self.grid is not None
        return self.head_dim + relpos.num_separable_features(self.grid)

    def add_positions(self, rel_pos: RelPos, grid: Grid) -> None:
        """Make attention depend on the tokens' positions on an (h, w) grid; a learned bias is zero at first.

        `bias` has one number per head and offset, `separable` the sum of one for the vertical and one for the
        horizontal offset, `rope` turns queries and keys by angles that grow with row and column.

        Raises:
            ValueError: `rope` with a head width that is not a multiple of 4.
        """
        self.rel_pos, self.grid = rel_pos, grid
        if rel_pos == "bias":
            rows = self.proj.weight.new_zeros(relpos.num_table_rows(grid), self.num_heads)
            self.relative_position_bias_table = nn.Parameter(rows)
        elif rel_pos == "separable":
            rows = self.proj.weight.new_zeros(relpos.num_separable_rows(grid), self.num_heads)
            self.separable_relative_position_bias_table = nn.Parameter(rows)
        elif rel_pos == "rope" and self.head_dim % 4:
            raise ValueError(
                f"model.rel_pos rope needs heads of a multiple of 4 wide, got {self.head_dim}; change model.num_heads"
            )

    def drop_key_bias(self) -> None:
        """Keep the bias of queries and values only, as BEiT does (a bias on keys cancels in the softmax)."""
        assert self.qkv.bias is not None
        q_bias, _, v_bias = self.qkv.bias.detach().chunk(3)
        self.qkv.register_parameter("bias", None)
        self.q_bias, self.v_bias = nn.Parameter(q_bias.clone()), nn.Parameter(v_bias.clone())

    def forward(self, x: Tensor, positions: Tensor | None = None, *, attn_mask: Tensor | None = None) -> Tensor:
        """Tokens (B, K, D) to tokens (B, K, D).

        Args:
            x: Tokens.
            positions: Where they are: `VisionTransformer.positions`.
            attn_mask: See `attend`.
        """
        dropout = self.attn_drop.p if self.training else 0.0
        table = self.relative_position_bias_table
        if table is not None and isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            x = attend_packed(self._project(x), table=table, positions=positions, attn_mask=attn_mask, dropout=dropout)
            return self.project_out(x)
        q, k, v = self.project_in(x, positions)
        if table is not None:
            x = attend(q, k, v, table=table, positions=positions, attn_mask=attn_mask, dropout=dropout)
        else:
            scale = self.head_dim**-0.5 if self.rel_pos == "separable" else None
            x = attend(q, k, v, attn_mask=attn_mask, dropout=dropout, scale=scale)
        return self.project_out(x)

    def weights(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """How much each token of (B, K, D) looks at each other one in evaluation, (B, H, K, K); rows add up to 1.

        Written out in plain operations: for pictures, and for methods that learn from attention.
        """
        q, k, _ = self.project_in(x, positions)
        weights: Tensor = self.logits(q, k, positions).softmax(dim=-1)
        return weights

    def logits(self, q: Tensor, k: Tensor, positions: Tensor | None = None) -> Tensor:
        """What `forward` takes the softmax of, (B, H, K, K), for queries and keys as `project_in` returns them."""
        table = self.relative_position_bias_table
        logits: Tensor = (
            q @ k.transpose(-2, -1) * self.head_dim**-0.5
        )  # separable features widen both, and count in full
        if table is None:
            return logits
        assert positions is not None
        return logits + logit_bias(table, positions, None, logits.dtype)

    def project_in(self, x: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the tokens (B, K, D), each (B, H, K, head width).

        Queries and keys express the positions, unless there is a bias table to do it: turned for `rope`, and with
        extra features whose products are the bias for `separable` (logits are scaled by the width of the values).

        Raises:
            ValueError: no positions where they are needed.
        """
        q, k, v = self._project(x).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rel_pos in ("rope", "separable") and positions is None:
            raise ValueError(f"attention with rel_pos={self.rel_pos!r} needs the positions of the tokens")
        if self.rel_pos == "rope":
            assert positions is not None
            turns = positions.unsqueeze(1)  # (B or 1, 1, K, 2 * head width)
            q, k = apply_rot_embed_cat(q, turns), apply_rot_embed_cat(k, turns)
        elif self.rel_pos == "separable":
            assert positions is not None
            assert self.grid is not None
            assert self.separable_relative_position_bias_table is not None
            extra_q, extra_k = relpos.separable_features(
                self.separable_relative_position_bias_table, positions, self.grid
            )
            extra_q = (extra_q * self.head_dim**0.5).to(q.dtype)
            q = torch.cat((q, extra_q.expand(*q.shape[:3], -1)), dim=-1)
            k = torch.cat((k, extra_k.to(k.dtype).expand(*k.shape[:3], -1)), dim=-1)
        return q, k, v

    def _project(self, x: Tensor) -> Tensor:
        """Queries, keys and values before their norms, (3, B, H, K, head width), features and heads adjacent."""
        if self.q_bias is None or self.v_bias is None:
            qkv = self.qkv(x)  # (B, K, 3 * H * head width)
        else:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
            qkv = F.linear(x, self.qkv.weight, bias)
        qkv = qkv.reshape(*x.shape[:2], 3, self.num_heads, self.head_dim)
        by_role: Tensor = qkv.permute(2, 0, 3, 1, 4)
        return by_role

    def project_out(self, x: Tensor) -> Tensor:
        """The heads' results (B, H, K, head width) mixed into tokens (B, K, D)."""
        x = x.transpose(1, 2).flatten(2)  # (B, K, H * head width)
        projected: Tensor = self.proj_drop(self.proj(self.norm(x)))
        return projected
