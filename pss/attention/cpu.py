"""Attention with a relative position bias on a CPU: what `pss.attention.materialised` does there.

A few images are worked on at a time, so that what there is for all pairs of their tokens stays in the cache. Forward,
torch's flash attention takes the bias as a mask. It has no gradient for one, so the backward pass is written out in
plain matrix products; it computes the weights once more, and leaves the gradient of the bias on its way. For that,
either torch's threads share every operation, or each of ours takes a share of the images (`pss.runtime.threads`).

Tokens are padded to a multiple of 8: products with matrices of all pairs are up to half as fast again if each of their
rows begins at one. What is given for the padding is zero and it gets no weight, so nothing is learnt from it.
"""

import functools
import math
import threading
from collections.abc import Hashable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from pss.attention import relpos
from pss.runtime.threads import num_shares, run_shares

# Bytes of matrices of all pairs of tokens that are worked on at a time: by a thread on its own, what its own cache
# holds; by torch's threads together, for each of them, its part of the processor's last cache, as less costs more in
# waking them, once for every operation, than it saves in reading memory.
_OWN_CACHE = 2**20
_SHARED_CACHE = 2**23

# Few tokens are so soon computed that it matters how often Python asks torch for something: ten microseconds each time,
# views included, in the middle of a training step. Hence `_Views`, `_pairs` and `_rows`, which remember things.


def forward(qkv: Tensor, table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with a bias.

    Args:
        qkv: (3, B, H, K, head width).
        table: (rows, H).
        positions: (2, B or 1, K); see `pss.attention.relpos.positions`.

    Returns:
        (B, H, K, head width), and `spread` of the table, which `backward` takes.
    """
    if not qkv.shape[1]:
        return torch.empty_like(qkv[0]), spread(table, qkv.dtype)
    bias = _Bias(spread(table, qkv.dtype), positions, len(table))
    (share,) = _plan(bias, qkv.shape[1], 0, 1)
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):  # it would round the bias to half precision
            return _attend(qkv, bias, share), bias.spread
    return _attend(qkv, bias, share), bias.spread


def _attend(qkv: Tensor, bias: "_Bias", share: "_Share") -> Tensor:
    results = []
    shared = bias.of_all() if bias.is_shared else None
    for images, at in share.parts:
        q, k, v = _of(images, qkv, 1).unbind(0)
        if shared is not None:
            num_tokens = qkv.shape[3]
            mask = shared[:, :, :num_tokens, :num_tokens].expand(len(q), -1, -1, -1)
        else:
            bias.look_up(images, at)
            mask = at.mask
        results.append(F.scaled_dot_product_attention(q, k, v, mask))
    return results[0] if len(results) == 1 else torch.cat(results)


def backward(grad_out: Tensor, qkv: Tensor, spread: Tensor, positions: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The gradients of `qkv`, in its layout, and of the table (rows, H), from that of (B, H, K, head width)."""
    if not qkv.shape[1]:
        return torch.empty_like(qkv), spread.new_zeros(num_rows, len(spread))
    bias = _Bias(spread, positions, num_rows)
    width = qkv.shape[4]
    shares = _plan(bias, qkv.shape[1], width, num_shares())
    shared = bias.of_all() if bias.is_shared else None
    scale = width**-0.5
    grad_qkv = torch.empty_like(qkv)

    def differentiate(number: int) -> None:
        grad_bias = shares[number].grad_bias.zero_()
        for images, at in shares[number].parts:
            at.given_qkv.copy_(_of(images, qkv, 1))
            at.given_grad.copy_(_of(images, grad_out, 0))
            at.operand_padding.zero_()
            if shared is not None:
                at.bias.copy_(shared)
            else:
                bias.look_up(images, at)
            at.logits.baddbmm_(at.q, at.k_t, alpha=scale)
            at.logit_padding.fill_(-math.inf)
            torch.softmax(at.logits, -1, out=at.weights)

            torch.bmm(at.weights_t, at.grad, out=at.grad_v)
            torch.bmm(at.grad, at.v_t, out=at.logits)  # the weights' gradient, then in its place that of the logits
            _softmax_backward(at.logits, at.weights, -1, at.weights.dtype, grad_input=at.logits)
            if shared is not None:
                grad_bias.add_(torch.sum(at.bias, 0, out=at.spare))
            else:
                grad_bias[: len(at.bias)].scatter_add_(2, at.index, at.bias_by_entry)
            at.grad_q.baddbmm_(at.logits, at.k, beta=0, alpha=scale)
            at.grad_k.baddbmm_(at.logits_t, at.q, beta=0, alpha=scale)
            _of(images, grad_qkv, 1).copy_(at.found)

    run_shares(differentiate, len(shares))
    # Added up in one order, whoever was first, so that a run can be repeated to the bit.
    grad_bias = functools.reduce(torch.add, [share.grad_bias for share in shares])
    grad_spread = bias.grad_of_all(grad_bias) if bias.is_shared else grad_bias.sum(0)
    return grad_qkv, relpos.fold(grad_spread, num_rows).contiguous()


_softmax_backward = torch.ops.aten._softmax_backward_data.out


def spread(table: Tensor, dtype: torch.dtype) -> Tensor:
    """`pss.attention.relpos.spread` of the table (rows, H), for queries of that dtype."""
    dtype = precision(dtype)
    by_head = (table if table.dtype == dtype else table.to(dtype)).t()
    return by_head.index_select(1, _rows(len(table)))


def precision(dtype: torch.dtype) -> torch.dtype:
    """Of the bias, and of all arithmetic of the backward pass, for queries of that dtype."""
    return torch.promote_types(dtype, torch.float32)


@functools.cache
def _rows(num_rows: int) -> Tensor:
    """The row of the table that each entry of `spread` comes from."""
    with torch.inference_mode(False):
        return relpos.spread(torch.arange(num_rows, device="cpu").unsqueeze(1))[0].clone()


def _of(images: slice, batch: Tensor, dim: int) -> Tensor:
    count = images.stop - images.start
    return batch if count == batch.shape[dim] else batch.narrow(dim, images.start, count)


class _Pairs:
    """All pairs of tokens, K of them padded to P."""

    def __init__(self, positions: Tensor, reach: int) -> None:
        self.num_tokens = positions.shape[2]
        # With the key of the last patch, which is the reach, padding has an entry with every other token.
        queries, keys = F.pad(positions, (0, -self.num_tokens % 8), value=reach).unbind(0)
        self.padded = queries.shape[1]
        self.queries, self.keys = queries.unsqueeze(2), keys.unsqueeze(1)  # (B or 1, P, 1), (B or 1, 1, P)
        self.entries = (self.queries - self.keys).flatten(1) if len(queries) == 1 else None
        """(1, P * P), if all images keep the same tokens."""


def _pairs(positions: Tensor, reach: int) -> _Pairs:
    """The pairs of these tokens; those asked for last are remembered, as all blocks of a model ask for the same."""
    if positions.is_inference():  # which nothing tells if it was written to
        return _Pairs(positions, reach)
    version = positions._version, reach
    last = _memory.last_pairs
    if last is None or last[0] is not positions or last[1] != version:
        last = _memory.last_pairs = positions, version, _Pairs(positions, reach)
    return last[2]


class _Bias:
    """The bias of all pairs of tokens."""

    def __init__(self, spread: Tensor, positions: Tensor, num_rows: int) -> None:
        self.spread = spread  # (H, entries)
        self.num_heads = len(spread)
        self.pairs = _pairs(positions, relpos.reach(num_rows))
        self.is_shared = self.pairs.entries is not None

    def look_up(self, images: slice, at: "_Views") -> None:
        """Write the bias of these images to `at.bias`."""
        torch.sub(_of(images, self.pairs.queries, 0), _of(images, self.pairs.keys, 0), out=at.entries)
        # On a CPU this lookup is several times faster than an embedding or an advanced index.
        torch.gather(self.spread.expand(len(at.bias), -1, -1), 2, at.index, out=at.bias_by_entry)

    def of_all(self) -> Tensor:
        """The bias (1, H, P, P) of all images, if they keep the same tokens."""
        return self.spread.gather(1, self._index()).view(1, self.num_heads, self.pairs.padded, self.pairs.padded)

    def grad_of_all(self, grad: Tensor) -> Tensor:
        """The gradient of `spread` from that of `of_all`."""
        return torch.zeros_like(self.spread).scatter_add_(1, self._index(), grad.flatten(1))

    def _index(self) -> Tensor:
        assert self.pairs.entries is not None
        return self.pairs.entries.expand(self.num_heads, -1)


class _Share:
    """Who works on which images, a few at a time, and with which buffers; what they hold is soon written over."""

    def __init__(
        self, parts: list[slice], num_tokens: int, pairs: Tensor, operands: Tensor, entries: Tensor, grad_bias: Tensor
    ) -> None:
        views = {}
        for images in parts:
            count = images.stop - images.start
            views[count] = _Views(num_tokens, pairs[:, :count], operands[:, :count], entries[:count])
        self.parts = [(images, views[images.stop - images.start]) for images in parts]
        self.grad_bias = grad_bias
        """Of the images so far: of `_Bias.spread`, by place among those worked on at a time, or of all."""


class _Views:
    """The buffers for n images at a time, by name."""

    def __init__(self, num_tokens: int, pairs: Tensor, operands: Tensor, entries: Tensor) -> None:
        self.entries = entries  # (n, P, P): where in `_Bias.spread` each pair of tokens finds its bias
        self.index = entries.flatten(1).unsqueeze(1).expand(-1, pairs.shape[2], -1)  # the same, (n, H, P * P)
        self.bias = pairs[0]  # (n, H, P, P)
        self.bias_by_entry = self.bias.flatten(2)  # (n, H, P * P)
        self.mask = self.bias[:, :, :num_tokens, :num_tokens]
        self.logits, self.weights = pairs.flatten(1, 2)  # (n * H, P, P)
        self.spare = pairs[1, 0]  # (H, P, P), when the weights are not needed any more
        self.logits_t, self.weights_t = self.logits.transpose(1, 2), self.weights.transpose(1, 2)
        self.logit_padding = self.logits[:, :, num_tokens:]
        # The gradients of queries and keys are written where values and the result's gradient, by then used, have been.
        given, found = operands[:4], operands[2:]  # (4 or 3, n, H, P, head width)
        self.given_qkv, self.given_grad = given[:3, :, :, :num_tokens], given[3, :, :, :num_tokens]
        self.operand_padding = given[:, :, :, num_tokens:]
        self.found = found[:, :, :, :num_tokens]
        self.q, self.k, self.v, self.grad = given.flatten(1, 2)  # (n * H, P, head width)
        self.k_t, self.v_t = self.k.transpose(1, 2), self.v.transpose(1, 2)
        self.grad_q, self.grad_k, self.grad_v = found.flatten(1, 2)


class _Memory(threading.local):
    """What a thread keeps for its next call.

    Memory that is given back and taken anew is mapped page by page when it is first written, which would take as long
    as the products. What is kept is for as many images as are worked on at a time.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Keep nothing."""
        self.last_pairs: tuple[Tensor, tuple[int, int], _Pairs] | None = None
        self.known: dict[Hashable, list[_Share]] = {}
        self.kept = torch.empty(0, 64, dtype=torch.uint8, device="cpu")
        """The buffers of all that are known, one over the other."""

    def take(self, *wanted: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
        """Tensors of these shapes and dtypes, holding anything."""
        lines = [-(-math.prod(shape) * dtype.itemsize // 64) for shape, dtype in wanted]  # of the cache
        if len(self.kept) < sum(lines):
            self.clear()
            self.kept = torch.empty(sum(lines), 64, dtype=torch.uint8, device="cpu")
        parts = torch.split(self.kept[: sum(lines)], lines)
        return [
            part.view(-1).view(dtype)[: math.prod(shape)].view(shape)
            for part, (shape, dtype) in zip(parts, wanted, strict=True)
        ]


_memory = _Memory()
_MOST_KNOWN = 64


def _plan(bias: _Bias, num_images: int, width: int, num_shares: int) -> list[_Share]:
    """The images divided into shares; `width` is that of the heads, or 0 if no products are to be kept."""
    room = _OWN_CACHE if num_shares > 1 else _SHARED_CACHE * torch.get_num_threads()
    dtype = bias.spread.dtype
    sizes = (num_images, bias.num_heads, bias.pairs.num_tokens, width, bias.spread.shape[1])
    key = (*sizes, bias.is_shared, dtype, num_shares, room)
    known = _memory.known.get(key)
    if known is None:
        with torch.inference_mode(False):  # else the buffers could not be written outside of that mode
            known = _divide(bias, num_images, width, min(num_shares, num_images), room)
        if len(_memory.known) >= _MOST_KNOWN:
            _memory.known.clear()
        _memory.known[key] = known
    return known


def _divide(bias: _Bias, num_images: int, width: int, num_shares: int, room: int) -> list[_Share]:
    dtype = bias.spread.dtype
    at_a_time = max(1, room // (2 * bias.num_heads * bias.pairs.padded**2 * dtype.itemsize))
    divided = []
    for i in range(num_shares):
        first, end = num_images * i // num_shares, num_images * (i + 1) // num_shares
        times = -(-(end - first) // at_a_time)
        bounds = [first + (end - first) * j // times for j in range(times + 1)]
        divided.append([slice(*pair) for pair in pairwise(bounds)])
    most = max(images.stop - images.start for parts in divided for images in parts)
    grad_bias = (bias.num_heads, bias.pairs.padded, bias.pairs.padded) if bias.is_shared else (most, *bias.spread.shape)
    buffers = _memory.take(
        ((num_shares, 2, most, bias.num_heads, bias.pairs.padded, bias.pairs.padded), dtype),
        ((num_shares, 5, most, bias.num_heads, bias.pairs.padded, width), dtype),
        ((num_shares, most, bias.pairs.padded, bias.pairs.padded), torch.int64),
        ((num_shares, *grad_bias), dtype),
    )
    return [_Share(parts, bias.pairs.num_tokens, *mine) for parts, *mine in zip(divided, *buffers, strict=True)]
