"""Attention with a relative position bias that is looked up into a buffer, and not kept.

On a CPU a few images are worked on at a time, so that their logits stay in the cache. torch's own kernel would take the
bias as a mask, but has no gradient for it; both passes are therefore written out in plain matrix products. The backward
pass computes the weights once more, and leaves the gradient of the bias on its way.

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

# Bytes of matrices of all pairs of tokens that are worked on at a time, for each thread: a share of the processor's
# last cache. Less costs more in waking the threads, once for every operation, than it saves in reading memory.
_CACHE = 2**22


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
    _, num_images, num_heads, num_tokens, width = qkv.shape
    work = _Workspace(qkv, table, positions, num_operands=3)
    out = qkv.new_empty(num_images, num_tokens, num_heads, width)
    for images, here in work.parts:
        work.tokens[:, here] = qkv[:, images]
        q, k, v = work.operands[:, here].flatten(1, 2)  # (images * H, padded, head width)
        attended = torch.bmm(work.weights(here, work.bias.entries(images), q, k), v)
        out[images] = work.tokens_of(attended).transpose(1, 2)
    return out, out.new_empty(0)


@torch.library.custom_op("pss::materialised_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor, qkv: Tensor, table: Tensor, positions: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `qkv`, in its layout, and of `table`."""
    work = _Workspace(qkv, table, positions, num_operands=4)
    grad_qkv, grad_bias = torch.empty_like(qkv), _BiasGradient(work.bias, len(work.tokens[0]))
    for images, here in work.parts:
        work.tokens[:3, here] = qkv[:, images]
        work.tokens[3, here] = grad_out[images].transpose(1, 2)
        q, k, v, grad = work.operands[:, here].flatten(1, 2)  # (images * H, padded, head width)
        entries = work.bias.entries(images)
        weights = work.weights(here, entries, q, k)
        grad_v = torch.bmm(weights.transpose(1, 2), grad)
        grad_logits = torch.bmm(grad, v.transpose(1, 2), out=work.pairs[0, here].flatten(0, 1))
        torch.ops.aten._softmax_backward_data.out(grad_logits, weights, -1, weights.dtype, grad_input=grad_logits)
        grad_bias.add(entries, work.pairs[0, here])
        grad_q = torch.baddbmm(q, grad_logits, k, beta=0, alpha=work.scale)
        grad_k = torch.baddbmm(k, grad_logits.transpose(1, 2), q, beta=0, alpha=work.scale)
        for target, source in zip(grad_qkv[:, images], (grad_q, grad_k, grad_v), strict=True):
            target.copy_(work.tokens_of(source))
    return grad_qkv, grad_bias.of_table().to(table.dtype)


class _Workspace:
    """Buffers on a CPU for a few images at a time, whose tokens are padded to a multiple of 8.

    Products with matrices of all pairs are up to half as fast again if each of their rows begins at a multiple of 8.
    Operands of the padding are zero, and no weight falls on it.
    """

    def __init__(self, qkv: Tensor, table: Tensor, positions: Tensor, num_operands: int) -> None:
        _, num_images, self.num_heads, self.num_tokens, width = qkv.shape
        dtype = torch.promote_types(qkv.dtype, torch.float32)
        padded = -(-self.num_tokens // 8) * 8
        self.scale = width**-0.5
        last = positions[:, :, -1:].expand(-1, -1, padded - self.num_tokens)
        self.bias = _Bias(table.to(dtype), torch.cat((positions, last), dim=2))
        bytes_per_image = 2 * self.num_heads * padded**2 * dtype.itemsize
        step = max(1, min(num_images, torch.get_num_threads() * _CACHE // bytes_per_image))
        self.pairs = qkv.new_empty(2, step, self.num_heads, padded, padded, dtype=dtype)
        self.operands = qkv.new_zeros(num_operands, step, self.num_heads, padded, width, dtype=dtype)
        self.tokens = self.operands[:, :, :, : self.num_tokens]
        starts = range(0, num_images, step)
        self.parts = [(slice(i, min(i + step, num_images)), slice(0, min(step, num_images - i))) for i in starts]
        """Images of the batch, and their places in the buffers."""

    def weights(self, here: slice, entries: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Attention weights (images * H, padded, padded), in the second buffer of pairs; the first one is free then."""
        self.bias.write(entries, self.pairs[0, here])
        logits, weights = self.pairs[:, here].flatten(1, 2)
        logits.baddbmm_(q, k.transpose(1, 2), alpha=self.scale)
        logits[:, :, self.num_tokens :] = float("-inf")
        return torch.softmax(logits, -1, out=weights)

    def tokens_of(self, padded: Tensor) -> Tensor:
        """(images * H, padded, head width) to (images, H, K, head width)."""
        return padded.view(-1, self.num_heads, *padded.shape[1:])[:, :, : self.num_tokens]


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
            self.shared_entries = self._entries(slice(None))
            self._look_up(self.shared_entries, self.shared)

    def entries(self, images: slice) -> Tensor:
        """Where in `spread` every pair of tokens finds its bias, (B or 1, H, K * K)."""
        return self.shared_entries if self.is_shared else self._entries(images)

    def write(self, entries: Tensor, target: Tensor) -> None:
        """Write the bias to `target`, (B, H, K, K)."""
        if self.is_shared:
            target.copy_(self.shared)
        else:
            self._look_up(entries, target)

    def _entries(self, images: slice) -> Tensor:
        entries = self.queries[images] - self.keys[images]  # (B, K, K)
        return entries.flatten(1).unsqueeze(1).expand(-1, self.num_heads, -1)

    def _look_up(self, entries: Tensor, target: Tensor) -> None:
        # On a CPU this lookup is several times faster than an embedding or an advanced index.
        torch.gather(self.spread.expand(len(entries), -1, -1), 2, entries, out=target.flatten(2))


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
            for image in grad:
                self.shared += image
        else:
            self.spread[: len(grad)].scatter_add_(2, entries, grad.flatten(2))

    def of_table(self) -> Tensor:
        """The gradient of the table, (rows, H)."""
        if self.bias.is_shared:
            entries = self.bias.entries(slice(0, 1))[0]
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
