"""Attention whose position bias is looked up inside the kernel; see `pss.attention.kernels` for how.

Needs Triton and a CUDA device, or Triton's interpreter (TRITON_INTERPRET=1), which runs the kernels on a CPU, slowly.
"""

import math
from typing import Any

import torch
import triton  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pss.attention import kernels as kernels
from pss.attention import relpos
from pss.attention.materialised import attention_flops
from pss.attention.tables import FUSE, TableReduction, set_stride, spread_table

_LOG2_E = math.log2(math.e)


@torch.library.custom_op("pss::fused_attention", mutates_args=())
def fused_attention(qkv: Tensor, table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with the bias of `table` on the logits.

    Args:
        qkv: Queries, keys and values, (3, B, H, K, head width), in any layout with adjacent features; float32,
            bfloat16 or float16.
        table: (rows, H).
        positions: (2, B, K), or (2, 1, K) if all images keep the same tokens; see `pss.attention.relpos.positions`.

    Returns:
        (B, K, H, head width), and the logarithm to base 2 of every row's sum of exponentials, (B, H, K).
    """
    _, num_images, num_heads, num_tokens, width = qkv.shape
    qkv = _dense(qkv)
    out = qkv.new_empty(num_images, num_tokens, num_heads, width)
    lse = qkv.new_empty(num_images, num_heads, num_tokens, dtype=torch.float32)
    if not num_images:  # there is no launching nothing
        return out, lse
    outer, inner, options = _block_sizes(qkv)
    kernels.attend_forward[(triton.cdiv(num_tokens, outer) * num_images * num_heads,)](
        out=out,
        lse=lse,
        BLOCK_QUERIES=outer,
        BLOCK_KEYS=inner,
        **_operands(qkv, table, positions),
        **options,
    )
    return out, lse


@torch.library.custom_op("pss::fused_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor, qkv: Tensor, table: Tensor, positions: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `qkv`, in its layout, and of `table`."""
    _, num_images, num_heads, num_tokens, width = qkv.shape
    qkv, grad_out = _dense(qkv), grad_out.contiguous()
    grad_qkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    if not num_images:
        return grad_qkv, torch.zeros_like(table)
    outer, inner, options = _block_sizes(qkv)
    operands = _operands(qkv, table, positions) | {
        "grad_out": grad_out,
        "lse": lse,
        "delta": delta,
        "grad_qkv": grad_qkv,
        "scale": width**-0.5,
    }
    kernels.attend_backward_queries[(triton.cdiv(num_tokens, outer) * num_images * num_heads,)](
        out=out, BLOCK_QUERIES=outer, BLOCK_KEYS=inner, **operands, **options
    )
    outer, inner, options = _block_sizes(qkv, of_keys=True)
    reduction = TableReduction(table, num_images, num_tokens, outer)
    kernels.attend_backward_keys[(reduction.num_programs,)](
        histograms=reduction.histograms,
        partial=reduction.partial,
        num_images=num_images,
        images_per_program=reduction.images_per_program,
        BLOCK_QUERIES=inner,
        BLOCK_KEYS=outer,
        BLOCK_ENTRIES=64,
        **operands,
        **options,
    )
    return grad_qkv, reduction.total()


def _operands(qkv: Tensor, table: Tensor, positions: Tensor) -> dict[str, Any]:
    """Arguments that all three kernels take."""
    _, _, num_heads, num_tokens, width = qkv.shape
    positions = positions.contiguous()
    strides = dict(zip(("part", "image", "head", "token"), qkv.stride(), strict=False))
    strides |= {"role": positions.stride(0), "set": set_stride(positions)}
    return {
        "qkv": qkv,
        "spread": spread_table(table, _LOG2_E),
        "positions": positions,
        "factor": _LOG2_E * width**-0.5,
        "num_heads": num_heads,
        "num_tokens": num_tokens,
        "reach": relpos.reach(table.shape[0]),
        **{f"stride_{name}": stride for name, stride in strides.items()},
        "WIDTH": width,
        "BLOCK_WIDTH": max(16, triton.next_power_of_2(width)),
        # float32 is multiplied as torch does it.
        "PRECISION": "tf32" if qkv.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
    }


def _block_sizes(qkv: Tensor, of_keys: bool = False) -> tuple[int, int, dict[str, Any]]:
    """Tokens of the block that a program keeps, of those it runs through, and launch options.

    `of_keys`: for the gradient of the keys and values, which keeps two blocks of sums, and so takes more threads.

    Chosen for Hopper's tensor cores, which take 64 lines at a time, such that nothing spills out of the registers.
    The inner size differs from the head width for the sake of layouts: of memory accesses of equal shape, Triton gives
    all the one that suits the widest, and lookups in the table are best spread one by one over adjacent threads.
    """
    wide = qkv.shape[-1] > 64
    options = FUSE | {"num_warps": 8 if of_keys or wide else 4, "num_stages": 2}
    if qkv.dtype == torch.float32:
        return 32, 16, options | {"num_warps": 8 if of_keys else 4}
    return (32 if of_keys else 64, 16, options) if wide else (64, 32, options)


@fused_attention.register_fake
def _(qkv: Tensor, table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    _, num_images, num_heads, num_tokens, width = qkv.shape
    lse = qkv.new_empty(num_images, num_heads, num_tokens, dtype=torch.float32)
    return qkv.new_empty(num_images, num_tokens, num_heads, width), lse


@_backward.register_fake
def _(
    grad_out: Tensor, qkv: Tensor, table: Tensor, positions: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(_dense(qkv)), table.new_empty(table.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None]:
    if grad_out is None:  # nothing depends on the result
        return None, None, None
    return *_backward(grad_out, *ctx.saved_tensors), None


fused_attention.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.pss.fused_attention)
def _flops(qkv_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return attention_flops(qkv_shape, num_products=2)


@register_flop_formula(torch.ops.pss.fused_attention_backward)
def _backward_flops(_: Any, qkv_shape: tuple[int, ...], *__: Any, **___: Any) -> int:
    return attention_flops(qkv_shape, num_products=5)


def _dense(qkv: Tensor) -> Tensor:
    """`qkv` as it is if its features are adjacent and an empty tensor like it would have its strides, else a copy."""
    dense = qkv.stride(-1) == 1 and torch.empty_like(qkv, device="meta").stride() == qkv.stride()
    return qkv if dense else qkv.contiguous()
