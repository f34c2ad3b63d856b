"""Attention with a relative position bias that is looked up into a buffer, and not kept.

On a CPU a few images at a time go through plain matrix products, so that their logits stay in the cache; the backward
pass needs the attention weights only, from which the gradient of the bias falls out. (torch's own kernel for the CPU
has no gradient for a bias.)

On a GPU the bias is written in the queries' precision, lines padded to what torch's memory-efficient kernel can read
in place, and written again for the backward pass. The gradient of the bias is reduced to that of the table without
atomics (see `pss.attention_kernels`).
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pss import relpos

# Bytes of logits per thread that are worked on at a time: what fits into a core's cache beside the operands.
_CACHE = 2**20


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
def materialised_attention(qkv: Tensor, table: Tensor, positions: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """Attention with the bias of `table` on the logits.

    Args:
        qkv: Queries, keys and values, (3, B, H, K, head width).
        table: (rows, H).
        positions: (2, B, K), or (2, 1, K) if all images keep the same tokens; see `pss.relpos.positions`.
        needs_grad: Whether there will be a backward pass.

    Returns:
        (B, K, H, head width), and what the backward pass needs besides (nothing if `needs_grad` is false): on a CPU
        the attention weights (B, H, K, K), on a GPU the logarithm of every row's sum of exponentials.
    """
    _, num_images, num_heads, num_tokens, width = qkv.shape
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    spread = relpos.spread(table.to(dtype))
    shared = _look_up(spread, positions) if positions.shape[1] == 1 else None
    chunk = _images_at_a_time(num_images, num_heads * num_tokens**2 * dtype.itemsize)
    weights = qkv.new_empty(num_images if needs_grad else chunk, num_heads, num_tokens, num_tokens, dtype=dtype)
    out = qkv.new_empty(num_images, num_tokens, num_heads, width)
    for images in _chunks(num_images, chunk):
        logits = weights[images] if needs_grad else weights[: images.stop - images.start]
        if shared is None:
            _look_up(spread, positions[:, images], out=logits)
        else:
            logits.copy_(shared)
        q, k, v = qkv[:, images].to(dtype).flatten(1, 2)  # (chunk * H, K, head width) each
        by_head = logits.flatten(0, 1).baddbmm_(q, k.transpose(1, 2), alpha=width**-0.5)
        torch.softmax(by_head, dim=-1, out=by_head)
        attended = out[images].transpose(1, 2)
        attended.copy_(torch.bmm(by_head, v).view(attended.shape))
    return out, weights if needs_grad else weights.new_empty(0)


@torch.library.custom_op("pss::materialised_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor, qkv: Tensor, table: Tensor, positions: Tensor, out: Tensor, saved: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `qkv`, in its layout, and of `table`."""
    _, num_images, num_heads, num_tokens, width = qkv.shape
    dtype = saved.dtype
    scale = width**-0.5
    shared = positions.shape[1] == 1
    chunk = _images_at_a_time(num_images, 2 * num_heads * num_tokens**2 * dtype.itemsize)
    grad_qkv = torch.empty_like(qkv)
    buffer = saved.new_empty(chunk, num_heads, num_tokens, num_tokens)
    grad_bias = saved.new_zeros(num_heads, num_tokens, num_tokens)
    grad_spread = saved.new_zeros(chunk, *relpos.spread(table).shape)
    for images in _chunks(num_images, chunk):
        weights = saved[images].flatten(0, 1)
        q, k, v = qkv[:, images].to(dtype).flatten(1, 2)
        grad = grad_out[images].to(dtype).transpose(1, 2).flatten(0, 1)
        grad_q, grad_k, grad_v = grad_qkv[:, images]
        grad_v.copy_(torch.bmm(weights.transpose(1, 2), grad).view(grad_v.shape))
        by_image = buffer[: len(grad_q)]
        grad_logits = torch.bmm(grad, v.transpose(1, 2), out=by_image.flatten(0, 1))
        torch.ops.aten._softmax_backward_data.out(grad_logits, weights, -1, dtype, grad_input=grad_logits)
        if shared:
            grad_bias += by_image.sum(0)
        else:
            _add_up(grad_spread, by_image, positions[:, images])
        grad_q.copy_(torch.baddbmm(q, grad_logits, k, beta=0, alpha=scale).view(grad_q.shape))
        grad_k.copy_(torch.baddbmm(k, grad_logits.transpose(1, 2), q, beta=0, alpha=scale).view(grad_k.shape))
    if shared:
        _add_up(grad_spread, grad_bias.unsqueeze(0), positions)
    return grad_qkv, relpos.fold(grad_spread.sum(0), table.shape[0]).to(table.dtype).contiguous()


def _look_up(spread: Tensor, positions: Tensor, out: Tensor | None = None) -> Tensor:
    """The bias of every pair of tokens, from `spread` (H, entries) and (2, B, K) to (B, H, K, K)."""
    entries = relpos.pair_entries(positions).unsqueeze(1)  # (B, 1, K, K)
    shape = (entries.shape[0], spread.shape[0], *entries.shape[2:])
    if out is None:
        out = spread.new_empty(shape)
    # On a CPU this lookup is several times faster than an embedding or an advanced index.
    torch.gather(spread.expand(shape[0], -1, -1), 2, entries.expand(shape).flatten(2), out=out.flatten(2))
    return out


def _add_up(grad_spread: Tensor, grad_bias: Tensor, positions: Tensor) -> None:
    """The adjoint of `_look_up`: add (B, H, K, K) to the entries of `grad_spread`, (at least B, H, entries)."""
    entries = relpos.pair_entries(positions).unsqueeze(1).expand(grad_bias.shape)
    grad_spread[: len(grad_bias)].scatter_add_(2, entries.flatten(2), grad_bias.flatten(2))


def _images_at_a_time(num_images: int, bytes_per_image: int) -> int:
    return max(1, min(num_images, torch.get_num_threads() * _CACHE // bytes_per_image))


def _chunks(num_images: int, chunk: int) -> list[slice]:
    return [slice(first, min(first + chunk, num_images)) for first in range(0, num_images, chunk)]


@materialised_attention.register_kernel("cuda")
def _(qkv: Tensor, table: Tensor, positions: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor]:
    from pss.attention_tables import write_bias

    return _memory_efficient(qkv, write_bias(table, positions, qkv.dtype), needs_grad)


@_backward.register_kernel("cuda")
def _(
    grad_out: Tensor, qkv: Tensor, table: Tensor, positions: Tensor, out: Tensor, saved: Tensor
) -> tuple[Tensor, Tensor]:
    from pss.attention_tables import reduce_bias, write_bias

    bias = write_bias(table, positions, qkv.dtype)
    grad_qkv, grad_bias = _memory_efficient_backward(grad_out, qkv, bias, out, saved)
    return grad_qkv, reduce_bias(grad_bias, table, positions)


def _memory_efficient(qkv: Tensor, bias: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """torch's memory-efficient kernel, which a backward pass can follow: results as of `materialised_attention`."""
    q, k, v = qkv
    out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, bias.expand(len(q), -1, -1, -1), needs_grad
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
def _(qkv: Tensor, table: Tensor, positions: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor]:
    _, num_images, num_heads, num_tokens, width = qkv.shape
    if qkv.device.type == "cuda":
        return _memory_efficient(qkv, qkv.new_empty(1, num_heads, num_tokens, num_tokens), needs_grad)
    saved = (num_images, num_heads, num_tokens, num_tokens) if needs_grad else (0,)
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty(num_images, num_tokens, num_heads, width), qkv.new_empty(saved, dtype=dtype)


@_backward.register_fake
def _(
    grad_out: Tensor, qkv: Tensor, table: Tensor, positions: Tensor, out: Tensor, saved: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv), table.new_empty(table.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor, _: None) -> tuple[Tensor, Tensor, None, None]:
    return *_backward(grad_out, *ctx.saved_tensors), None, None


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
