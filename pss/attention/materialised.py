"""Attention with a relative position bias that is looked up into a buffer, and not kept.

On a CPU a few images are worked on at a time (`pss.attention.cpu`).

On a GPU the bias is written in the queries' precision, lines padded to what torch's memory-efficient kernel can read
in place, and written again for the backward pass. The gradient of the bias is reduced to that of the table without
atomics (see `pss.attention.kernels`).
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pss.attention import cpu as attention_cpu
from pss.attention import relpos


def materialised_serves(qkv: Tensor) -> bool:
    """Whether there is an implementation for this device, dtype and head width."""
    if qkv.device.type == "cpu":
        return qkv.is_floating_point()
    return (
        qkv.device.type == "cuda"
        and find_spec("triton") is not None
        and qkv.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and qkv.shape[-1] % 8 == 0
    )


@torch.library.custom_op("pss::materialised_attention", mutates_args=())
def materialised_attention(qkv: Tensor, table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with the bias of `table` on the logits.

    Args:
        qkv: Queries, keys and values, (3, B, H, K, head width).
        table: (rows, H).
        positions: (2, B, K), or (2, 1, K) if all images keep the same tokens; see `pss.attention.relpos.positions`.

    Returns:
        (B, K, H, head width), and what the backward pass needs besides: on a GPU the logarithm of every row's sum of
        exponentials, padded; on a CPU the table as `pss.attention.relpos.spread` has it.
    """
    out, spread = attention_cpu.forward(qkv, table, positions)
    return out.transpose(1, 2).contiguous(), spread


@torch.library.custom_op("pss::materialised_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor, qkv: Tensor, table: Tensor, positions: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `qkv`, in its layout, and of `table`."""
    grad_qkv, grad_table = attention_cpu.backward(grad_out.transpose(1, 2), qkv, lse, positions, len(table))
    return grad_qkv, grad_table.to(table.dtype)


@materialised_attention.register_kernel("cuda")
def _(qkv: Tensor, table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    from pss.attention.tables import write_bias

    if not qkv.shape[1]:
        return _no_images(qkv)
    return _memory_efficient(qkv, write_bias(table, positions, qkv.dtype))


@_backward.register_kernel("cuda")
def _(
    grad_out: Tensor, qkv: Tensor, table: Tensor, positions: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    from pss.attention.tables import reduce_bias, write_bias

    if not qkv.shape[1]:
        return torch.empty_like(qkv), torch.zeros_like(table)
    bias = write_bias(table, positions, qkv.dtype)
    grad_qkv, grad_bias = _memory_efficient_backward(grad_out, qkv, bias, out, lse)
    return grad_qkv, reduce_bias(grad_bias, table, positions)


def _no_images(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """The results for an empty batch, which no kernel can be launched for."""
    _, num_images, num_heads, num_tokens, width = qkv.shape
    lse = qkv.new_empty(num_images, num_heads, num_tokens, dtype=torch.float32)
    return qkv.new_empty(num_images, num_tokens, num_heads, width), lse


def _memory_efficient(qkv: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """torch's memory-efficient kernel: results as of `materialised_attention`."""
    q, k, v = qkv
    out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, bias.expand(len(q), -1, -1, -1), True
    )
    return out.transpose(1, 2).contiguous(), lse


def _memory_efficient_backward(
    grad_out: Tensor, qkv: Tensor, bias: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `qkv`, in its layout, and of the bias of each image, (B, H, K, K)."""
    q, k, v = qkv
    no_dropout = torch.empty((), dtype=torch.int64, device=qkv.device)  # stands for the state of a random generator
    *grads, grad_bias = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad_out.contiguous().transpose(1, 2),
        q,
        k,
        v,
        bias.expand(len(q), -1, -1, -1),
        out.transpose(1, 2),
        lse,
        no_dropout,
        no_dropout,
        0.0,
        [True] * 4,
    )
    grad_qkv = torch.empty_like(qkv)
    for target, grad in zip(grad_qkv, grads, strict=True):
        target.copy_(grad)
    return grad_qkv, grad_bias


@materialised_attention.register_fake
def _(qkv: Tensor, table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    _, num_images, num_heads, num_tokens, width = qkv.shape
    if qkv.device.type == "cuda":
        return _memory_efficient(qkv, qkv.new_empty(1, num_heads, num_tokens, num_tokens))
    spread = qkv.new_empty(num_heads, relpos.num_entries(len(table)), dtype=attention_cpu.precision(qkv.dtype))
    return qkv.new_empty(num_images, num_tokens, num_heads, width), spread


@_backward.register_fake
def _(
    grad_out: Tensor, qkv: Tensor, table: Tensor, positions: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv), table.new_empty(table.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None]:
    if grad_out is None:  # nothing depends on the result
        return None, None, None
    return *_backward(grad_out, *ctx.saved_tensors), None


materialised_attention.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.pss.materialised_attention)
def _flops(qkv_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return attention_flops(qkv_shape, num_products=2)


@register_flop_formula(torch.ops.pss.materialised_attention_backward)
def _backward_flops(_: Any, qkv_shape: tuple[int, ...], *__: Any, **___: Any) -> int:
    return attention_flops(qkv_shape, num_products=5)


def attention_flops(qkv_shape: tuple[int, ...], num_products: int) -> int:
    """FLOPs of `num_products` matrix products of attention; a backward pass counts five, as torch counts its own."""
    _, num_images, num_heads, num_tokens, width = qkv_shape
    return 2 * num_products * num_images * num_heads * num_tokens**2 * width
