"""Attention with a relative position bias that is looked up into a buffer, and not kept.

On a CPU a few images are worked on at a time, so that their logits stay in the cache. torch's kernel takes the bias as
a mask, but has no gradient for it; the backward pass is therefore written out in plain matrix products, and leaves the
gradient of the bias on its way.

On a GPU the bias is written in the queries' precision, lines padded to what torch's memory-efficient kernel can read
in place, and written again for the backward pass. The gradient of the bias is reduced to that of the table without
atomics (see `pss.attention_kernels`).
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pss import relpos

# Bytes of matrices of all pairs of tokens that each thread works on at a time: what a core's cache has room for.
_CACHE = 3 * 2**19


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
        (B, K, H, head width), and for the backward pass the logarithm of every row's sum of exponentials, (B, H, K) on
        a CPU, padded on a GPU.
    """
    _, num_images, num_heads, num_tokens, width = qkv.shape
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    bias = _Bias(table.to(dtype), positions)
    out = qkv.new_empty(num_images, num_tokens, num_heads, width)
    lse = qkv.new_empty(num_images, num_heads, num_tokens, dtype=dtype)
    for images, mask in bias.in_parts(_images_at_a_time(num_images, num_heads * num_tokens**2 * dtype.itemsize)):
        attended, lse[images] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *qkv[:, images], attn_mask=mask
        )
        out[images] = attended.transpose(1, 2)
    return out, lse


@torch.library.custom_op("pss::materialised_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor, qkv: Tensor, table: Tensor, positions: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `qkv`, in its layout, and of `table`."""
    _, num_images, num_heads, num_tokens, width = qkv.shape
    dtype, scale = lse.dtype, width**-0.5
    bias = _Bias(table.to(dtype), positions)
    step = _images_at_a_time(num_images, 2 * num_heads * num_tokens**2 * dtype.itemsize)
    grad_qkv = torch.empty_like(qkv)
    grad_bias = _BiasGradient(bias, step)
    buffers = lse.new_empty(2, step, num_heads, num_tokens, num_tokens)
    for images in _slices(num_images, step):
        q, k, v = qkv[:, images].to(dtype).flatten(1, 2)
        grad = grad_out[images].to(dtype).transpose(1, 2).flatten(0, 1)
        logits = bias.write(images, buffers[0]).flatten(0, 1).baddbmm_(q, k.transpose(1, 2), alpha=scale)
        weights = logits.sub_(lse[images].flatten(0, 1).unsqueeze(2)).exp_()
        grad_q, grad_k, grad_v = grad_qkv[:, images]
        grad_v.copy_(torch.bmm(weights.transpose(1, 2), grad).view(grad_v.shape))
        by_image = buffers[1, : len(grad_q)]
        grad_logits = torch.bmm(grad, v.transpose(1, 2), out=by_image.flatten(0, 1))
        torch.ops.aten._softmax_backward_data.out(grad_logits, weights, -1, dtype, grad_input=grad_logits)
        grad_bias.add(images, by_image)
        grad_q.copy_(torch.baddbmm(q, grad_logits, k, beta=0, alpha=scale).view(grad_q.shape))
        grad_k.copy_(torch.baddbmm(k, grad_logits.transpose(1, 2), q, beta=0, alpha=scale).view(grad_k.shape))
    return grad_qkv, grad_bias.of_table().to(table.dtype)


class _Bias:
    """The bias of all pairs of tokens of some images, on a CPU."""

    def __init__(self, table: Tensor, positions: Tensor) -> None:
        self.num_rows = table.shape[0]
        self.spread = relpos.spread(table)  # (H, entries)
        self.positions = positions
        self.shared: Tensor | None = None  # (H, K, K)
        if positions.shape[1] == 1:
            num_tokens = positions.shape[2]
            self.shared = table.new_empty(len(self.spread), num_tokens, num_tokens)
            self._look_up(slice(0, 1), self.shared.unsqueeze(0))

    def write(self, images: slice, buffer: Tensor) -> Tensor:
        """The bias of `images` in the first places of `buffer` (B, H, K, K)."""
        target = buffer[: images.stop - images.start]
        if self.shared is None:
            self._look_up(images, target)
        else:
            target.copy_(self.shared)
        return target

    def in_parts(self, images_at_a_time: int) -> Iterator[tuple[slice, Tensor]]:
        """Some images after the other, with their bias, (B or 1, H, K, K), which the next ones overwrite."""
        if self.shared is not None:
            yield slice(None), self.shared.unsqueeze(0)
            return
        num_images, num_tokens = self.positions.shape[1:]
        buffer = self.spread.new_empty(images_at_a_time, len(self.spread), num_tokens, num_tokens)
        for images in _slices(num_images, images_at_a_time):
            yield images, self.write(images, buffer)

    def entries(self, images: slice) -> Tensor:
        """Where in `spread` every pair of tokens finds its bias, (B, H, K * K)."""
        return relpos.pair_entries(self.positions[:, images]).flatten(1).unsqueeze(1).expand(-1, len(self.spread), -1)

    def _look_up(self, images: slice, target: Tensor) -> None:
        entries = self.entries(images)
        # On a CPU this lookup is several times faster than an embedding or an advanced index.
        torch.gather(self.spread.expand(len(entries), -1, -1), 2, entries, out=target.flatten(2))


class _BiasGradient:
    """The gradient of a `_Bias`, summed over the images of a batch."""

    def __init__(self, bias: _Bias, images_at_a_time: int) -> None:
        self.bias = bias
        self.spread = bias.spread.new_zeros(images_at_a_time, *bias.spread.shape)
        self.shared = None if bias.shared is None else torch.zeros_like(bias.shared)

    def add(self, images: slice, grad: Tensor) -> None:
        """Add the gradient (B, H, K, K) of the bias of `images`."""
        if self.shared is None:
            self.spread[: len(grad)].scatter_add_(2, self.bias.entries(images), grad.flatten(2))
        else:
            for image in grad:
                self.shared += image

    def of_table(self) -> Tensor:
        """The gradient of the table, (rows, H)."""
        if self.shared is not None:
            self.spread[:1].scatter_add_(2, self.bias.entries(slice(0, 1)), self.shared.flatten(1).unsqueeze(0))
        return relpos.fold(self.spread.sum(0), self.bias.num_rows).contiguous()


def _images_at_a_time(num_images: int, bytes_per_image: int) -> int:
    return max(1, min(num_images, torch.get_num_threads() * _CACHE // bytes_per_image))


def _slices(length: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, length)) for first in range(0, length, step)]


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
    lse = qkv.new_empty(num_images, num_heads, num_tokens, dtype=torch.promote_types(qkv.dtype, torch.float32))
    return qkv.new_empty(num_images, num_tokens, num_heads, width), lse


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
