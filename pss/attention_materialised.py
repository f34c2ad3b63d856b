"""Attention with a relative position bias that is looked up into a buffer, and not kept.

On a CPU a few images are worked on at a time, so that what there is for all pairs of their tokens stays in the cache.
Forward, torch's flash attention takes the bias as a mask. It has no gradient for one, so the backward pass is written
out in plain matrix products; it computes the weights once more, and leaves the gradient of the bias on its way.

On a GPU the bias is written in the queries' precision, lines padded to what torch's memory-efficient kernel can read
in place, and written again for the backward pass. The gradient of the bias is reduced to that of the table without
atomics (see `pss.attention_kernels`).
"""

import math
import threading
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pss import relpos

# Bytes of matrices of all pairs of tokens that are worked on at a time, for each thread: a share of the processor's
# last cache. Less costs more in waking the threads, once for every operation, than it saves in reading memory.
_CACHE = 2**23
_memory = threading.local()


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
        positions: (2, B, K), or (2, 1, K) if all images keep the same tokens; see `pss.relpos.positions`.

    Returns:
        (B, K, H, head width), and what the backward pass needs besides: on a GPU the logarithm of every row's sum of
        exponentials, padded; on a CPU nothing.
    """
    _, num_images, num_heads, num_tokens, _ = qkv.shape
    bias = _Bias(table.to(_precision(qkv)), positions)
    at_a_time = num_images
    if not bias.is_shared:
        at_a_time = _images_at_a_time(num_images, bias.spread.itemsize * num_heads * num_tokens**2)
        pairs, entries = _scratch(
            ((at_a_time, num_heads, num_tokens, num_tokens), bias.spread.dtype),
            ((at_a_time, num_tokens, num_tokens), torch.int64),
        )
    parts = []
    for first in range(0, num_images, at_a_time):
        images = slice(first, first + at_a_time)
        q, k, v = qkv[:, images]
        mask = bias.shared.expand(len(q), -1, -1, -1) if bias.is_shared else pairs[: len(q)]
        if not bias.is_shared:
            bias.write(bias.entries(images, entries[: len(q)]), mask)
        with torch.autocast("cpu", enabled=False):  # it would round the bias to half precision
            parts.append(F.scaled_dot_product_attention(q, k, v, mask))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.transpose(1, 2).contiguous(), out.new_empty(0)


@torch.library.custom_op("pss::materialised_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor, qkv: Tensor, table: Tensor, positions: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `qkv`, in its layout, and of `table`."""
    work = _Workspace(qkv, table, positions)
    grad_qkv, grad_bias = torch.empty_like(qkv), _BiasGradient(work.bias, len(work.pairs[0]))
    for images, here in work.parts:
        operands = work.operands[:, here]
        operands[:3, :, :, : work.num_tokens] = qkv[:, images]
        operands[3, :, :, : work.num_tokens] = grad_out[images].transpose(1, 2)
        operands[:, :, :, work.num_tokens :] = 0
        q, k, v, grad = operands.flatten(1, 2)  # (images * H, padded, head width)
        grad_q, grad_k, grad_v = work.products[:, here].flatten(1, 2)
        logits, weights = work.pairs[:, here].flatten(1, 2)  # (images * H, padded, padded)
        entries = work.bias.entries(images, work.entries[here])
        work.bias.write(entries, work.pairs[0, here])
        logits.baddbmm_(q, k.transpose(1, 2), alpha=work.scale)
        logits[:, :, work.num_tokens :] = float("-inf")
        torch.softmax(logits, -1, out=weights)

        torch.bmm(weights.transpose(1, 2), grad, out=grad_v)
        grad_logits = torch.bmm(grad, v.transpose(1, 2), out=logits)
        torch.ops.aten._softmax_backward_data.out(grad_logits, weights, -1, weights.dtype, grad_input=grad_logits)
        grad_bias.add(entries, work.pairs[0, here])
        grad_q.baddbmm_(grad_logits, k, beta=0, alpha=work.scale)
        grad_k.baddbmm_(grad_logits.transpose(1, 2), q, beta=0, alpha=work.scale)
        grad_qkv[:, images] = work.products[:, here, :, : work.num_tokens]
    return grad_qkv, grad_bias.of_table().to(table.dtype)


def _precision(qkv: Tensor) -> torch.dtype:
    """Of the bias, and of all arithmetic of the backward pass."""
    return torch.promote_types(qkv.dtype, torch.float32)


def _images_at_a_time(num_images: int, bytes_per_image: int) -> int:
    return max(1, min(num_images, torch.get_num_threads() * _CACHE // bytes_per_image))


def _scratch(*wanted: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
    """Tensors of these shapes and dtypes, holding anything, in memory that this thread keeps for its next call.

    Memory that is given back and taken anew is mapped page by page when it is first written, which would take as long
    as the products. What is kept is for as many images as are worked on at a time.
    """
    lines = [-(-math.prod(shape) * dtype.itemsize // 64) for shape, dtype in wanted]  # of the cache
    kept: Tensor | None = getattr(_memory, "kept", None)
    if kept is None or len(kept) < sum(lines):
        with torch.inference_mode(False):  # else it could not be written outside of that mode
            kept = _memory.kept = torch.empty(sum(lines), 64, dtype=torch.uint8)
    parts = torch.split(kept[: sum(lines)], lines)
    return [
        part.view(-1).view(dtype)[: math.prod(shape)].view(shape)
        for part, (shape, dtype) in zip(parts, wanted, strict=True)
    ]


class _Workspace:
    """Buffers on a CPU for the backward pass of a few images at a time, whose tokens are padded to a multiple of 8.

    Products with matrices of all pairs are up to half as fast again if each of their rows begins at a multiple of 8.
    Operands of the padding are zero, so that nothing is learnt from it.
    """

    def __init__(self, qkv: Tensor, table: Tensor, positions: Tensor) -> None:
        _, num_images, num_heads, self.num_tokens, width = qkv.shape
        dtype = _precision(qkv)
        padded = -(-self.num_tokens // 8) * 8
        self.scale = width**-0.5
        last = positions[:, :, -1:].expand(-1, -1, padded - self.num_tokens)
        self.bias = _Bias(table.to(dtype), torch.cat((positions, last), dim=2))
        step = _images_at_a_time(num_images, 2 * num_heads * padded**2 * dtype.itemsize)
        images = (step, num_heads, padded)
        self.pairs, both, self.entries = _scratch(
            ((2, *images, padded), dtype),
            ((5, *images, width), dtype),
            ((step, padded, padded), torch.int64),
        )
        # The gradients of queries and keys are written where values and the output's gradient, by then used, have been.
        self.operands, self.products = both[:4], both[2:]
        starts = range(0, num_images, step)
        self.parts = [(slice(i, min(i + step, num_images)), slice(0, min(step, num_images - i))) for i in starts]
        """Images of the batch, and their places in the buffers."""


class _Bias:
    """The bias of all pairs of tokens, on a CPU."""

    def __init__(self, table: Tensor, positions: Tensor) -> None:
        self.num_rows, self.num_heads = table.shape
        self.spread = relpos.spread(table)  # (H, entries)
        self.queries, self.keys = positions[0].unsqueeze(2), positions[1].unsqueeze(1)
        self.is_shared = positions.shape[1] == 1
        if self.is_shared:
            num_tokens = positions.shape[2]
            self.shared = table.new_empty(1, self.num_heads, num_tokens, num_tokens)
            self.shared_entries = (self.queries - self.keys).flatten(1)
            self._look_up(self.shared_entries, self.shared)

    def entries(self, images: slice, target: Tensor) -> Tensor:
        """Where in `spread` every pair of tokens finds its bias, (B or 1, K * K); `target`, (B, K, K), may hold it."""
        if self.is_shared:
            return self.shared_entries
        return torch.sub(self.queries[images], self.keys[images], out=target).flatten(1)

    def write(self, entries: Tensor, target: Tensor) -> None:
        """Write the bias to `target`, (B, H, K, K)."""
        if self.is_shared:
            target.copy_(self.shared)
        else:
            self._look_up(entries, target)

    def _look_up(self, entries: Tensor, target: Tensor) -> None:
        # On a CPU this lookup is several times faster than an embedding or an advanced index.
        rows, index = self.spread.expand(len(entries), -1, -1), self.for_heads(entries)
        torch.gather(rows, 2, index, out=target.flatten(2))

    def for_heads(self, entries: Tensor) -> Tensor:
        """Entries (B, K * K) as an index for all heads, (B, H, K * K)."""
        return entries.unsqueeze(1).expand(-1, self.num_heads, -1)


class _BiasGradient:
    """The gradient of a `_Bias`, summed over the images of a batch."""

    def __init__(self, bias: _Bias, images_at_a_time: int) -> None:
        self.bias = bias
        if bias.is_shared:
            self.shared = torch.zeros_like(bias.shared[0])
        else:
            self.spread = bias.spread.new_zeros(images_at_a_time, *bias.spread.shape)

    def add(self, entries: Tensor, grad: Tensor) -> None:
        """Add the gradient (B, H, K, K) of the bias of some images."""
        if self.bias.is_shared:
            self.shared += grad.sum(0)
        else:
            self.spread[: len(grad)].scatter_add_(2, self.bias.for_heads(entries), grad.flatten(2))

    def of_table(self) -> Tensor:
        """The gradient of the table, (rows, H)."""
        if self.bias.is_shared:
            (entries,) = self.bias.for_heads(self.bias.shared_entries)
            spread = torch.zeros_like(self.bias.spread).scatter_add_(1, entries, self.shared.flatten(1))
        else:
            spread = self.spread.sum(0)
        return relpos.fold(spread, self.bias.num_rows).contiguous()


@materialised_attention.register_kernel("cuda")
def _(qkv: Tensor, table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    from pss.attention_tables import write_bias

    return _memory_efficient(qkv, write_bias(table, positions, qkv.dtype))


@_backward.register_kernel("cuda")
def _(
    grad_out: Tensor, qkv: Tensor, table: Tensor, positions: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    from pss.attention_tables import reduce_bias, write_bias

    bias = write_bias(table, positions, qkv.dtype)
    grad_qkv, grad_bias = _memory_efficient_backward(grad_out, qkv, bias, out, lse)
    return grad_qkv, reduce_bias(grad_bias, table, positions)


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
    return qkv.new_empty(num_images, num_tokens, num_heads, width), qkv.new_empty(0)


@_backward.register_fake
def _(
    grad_out: Tensor, qkv: Tensor, table: Tensor, positions: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv), table.new_empty(table.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor, _: None) -> tuple[Tensor, Tensor, None]:
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
