"""What S²ViTE is made of: scores of heads and neurons, the parameters that belong to them, and their removal.

Chen et al., 2021 (https://arxiv.org/abs/2106.04533), structured sparsity: a head is its queries, keys and values, a
neuron a row of the MLP's first layer and a column of its second. The projection after the heads is never masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from pss.attention.attend import Attention
from pss.models.block import Block
from pss.models.vit import VisionTransformer


class ScoredAttention(Attention):
    """Attention that scores its heads by what they return, in the steps that ask for it."""

    def __init__(self, source: Any) -> None:
        super().__init__(source)
        self.scores: Tensor | None = None
        """Sums over the images since it was set to zeros, (2, H): how much the loss depends on a head's output, to
        first order, and the L1 norm of the loss's gradient by it."""

    def project_out(self, x: Tensor) -> Tensor:
        """As the base's; x is (B, H, K, head width)."""
        if self.scores is not None and x.requires_grad:
            x.register_hook(partial(self._score, x.detach()))  # type: ignore[no-untyped-call]
        return super().project_out(x)

    def _score(self, output: Tensor, gradient: Tensor) -> None:
        assert self.scores is not None
        gradient = gradient.float()
        by_output = (output.float() * gradient).sum((2, 3)).abs().sum(0)  # (H,)
        self.scores += torch.stack((by_output, gradient.abs().sum((0, 2, 3))))


def check_blocks(model: VisionTransformer, name: str) -> None:
    """Raise `ValueError` where heads and neurons of the model cannot be taken out."""
    for block in model.blocks:
        assert isinstance(block, Block)
        plain = type(block.attn) is Attention and type(block.mlp) is Mlp
        if not plain or not isinstance(block.attn.norm, nn.Identity) or not isinstance(block.mlp.norm, nn.Identity):
            raise ValueError(
                f"method {name} cannot take heads and neurons out of blocks with a {type(block.attn).__name__} and a "
                f"{type(block.mlp).__name__}, or a norm inside of them; use a model.name with plain ones"
            )


def head_rows(heads: Tensor, width: int, roles: int = 3) -> Tensor:
    """Rows of queries, keys and values, or of some of these roles, of heads: bool, (H,) to (roles * H * width,)."""
    return heads.repeat_interleave(width).repeat(roles)


def owned(
    block: Block, heads: Tensor, neurons: Tensor, *, biases: bool = True
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The parameters of a block that heads (H,) and neurons (M,) own, and which of their entries, broadcastable."""
    attn = block.attn
    rows, one = head_rows(heads, attn.head_dim), head_rows(heads, attn.head_dim, 1)
    parameters = dict(block.named_parameters())
    yield parameters["attn.qkv.weight"], rows[:, None]
    yield parameters["mlp.fc1.weight"], neurons[:, None]
    yield parameters["mlp.fc2.weight"], neurons[None]
    if biases:
        owners = {"attn.qkv.bias": rows, "attn.q_bias": one, "attn.v_bias": one, "mlp.fc1.bias": neurons}
        yield from ((parameters[name], mask) for name, mask in owners.items() if name in parameters)


@torch.no_grad()
def fold_values(block: Block, heads: Tensor) -> None:
    """Move into the projection's bias what heads with the mask False add to every token, their values' bias: with
    queries, keys and values zero but for it, they return it whatever the image."""
    attn, parameters = block.attn, dict(block.named_parameters())
    bias = parameters.get("attn.v_bias", parameters.get("attn.qkv.bias"))
    if bias is not None:
        constant = bias[-attn.num_heads * attn.head_dim :] * ~head_rows(heads, attn.head_dim, 1)
        added, before = attn.proj.weight @ constant, parameters.get("attn.proj.bias")
        attn.proj.bias = nn.Parameter(added if before is None else before + added)
