"""The transformer block, and what is left of one that is pruned."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pss.attention.attend import Attention
from pss.models.settings import WithSettings


class Block(nn.Module):
    """One pre-norm transformer block, made of the parts of timm's, that hands extra arguments on to its attention."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.norm1: nn.Module = source.norm1
        self.attn = Attention(source.attn)
        self.ls1: nn.Module = source.ls1
        self.drop_path1: nn.Module = source.drop_path1
        self.norm2: nn.Module = source.norm2
        self.mlp: nn.Module = source.mlp
        self.ls2: nn.Module = source.ls2
        self.drop_path2: nn.Module = source.drop_path2
        self.residual_divisor = 1.0
        """What each branch is divided by before it is added (LV-ViT's residual scaling)."""

    def forward(self, x: Tensor, positions: Tensor | None = None, **attention_options: Any) -> Any:
        """Tokens (B, K, D) to tokens (B, K, D).

        `positions` are those of the model; `attention_options` go to the attention: `attn_mask`, or what a method's own
        attention module takes. An attention module that returns a pair has its second part handed on: the block then
        returns a pair, too.
        """
        branch, extra = self._attend(x, positions, **attention_options)
        x = self._add(x, branch)
        x = self._add(x, self.mlp_branch(x))
        return x if extra is None else (x, extra)

    def attention_branch(self, x: Tensor, positions: Tensor | None = None, **attention_options: Any) -> Tensor:
        """What attention adds to the tokens (B, K, D), before it is divided."""
        return self._attend(x, positions, **attention_options)[0]

    def _attend(self, x: Tensor, positions: Tensor | None, **attention_options: Any) -> tuple[Tensor, Any]:
        attended = self.attn(self.norm1(x), positions, **attention_options)
        attended, extra = attended if isinstance(attended, tuple) else (attended, None)
        return self.drop_path1(self.ls1(attended)), extra

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + (branch if self.residual_divisor == 1.0 else branch / self.residual_divisor)

    def mlp_branch(self, x: Tensor) -> Tensor:
        """What the MLP adds to the tokens (B, K, D), before it is divided."""
        branch: Tensor = self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return branch


@torch.no_grad()
def prune(model: WithSettings, kept: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Take heads and neurons out of a model's blocks, in place: what is left is a smaller model.

    It computes the same where the values of the heads that go, and what reads the neurons that go, are zero.

    Args:
        model: A `VisionTransformer`.
        kept: For each block, the indices of the heads and of the MLP's neurons that stay, ascending.

    Raises:
        ValueError: not one entry a block, no such head or neuron, or none left.
    """
    blocks = list(model.get_submodule("blocks").children())
    if len(blocks) != len(kept):
        raise ValueError(f"block_heads and block_neurons tell of {len(kept)} blocks, and the model has {len(blocks)}")
    for block, (heads, neurons) in zip(blocks, kept, strict=True):
        assert isinstance(block, Block)
        _keep_heads(block.attn, heads)
        _keep_neurons(block.mlp, neurons)
    sizes = [(len(heads), len(neurons)) for heads, neurons in kept]
    model.block_sizes = {"block_heads": [size[0] for size in sizes], "block_neurons": [size[1] for size in sizes]}


def _keep_heads(attn: Attention, heads: Tensor) -> None:
    _check_kept(heads, attn.num_heads, "block_heads")
    width = attn.head_dim
    channels = (heads[:, None] * width + torch.arange(width, device=heads.device)).flatten()  # of one role
    size = attn.num_heads * width
    _narrow(attn.qkv, rows=torch.cat([channels + role * size for role in range(3)]))
    _narrow(attn.proj, columns=channels)
    for name, index, dim in (
        ("q_bias", channels, 0),
        ("v_bias", channels, 0),
        ("relative_position_bias_table", heads, 1),
        ("separable_relative_position_bias_table", heads, 1),
    ):
        if (part := getattr(attn, name)) is not None:
            setattr(attn, name, nn.Parameter(part.index_select(dim, index.to(part.device))))
    attn.num_heads = len(heads)


def _keep_neurons(mlp: nn.Module, neurons: Tensor) -> None:
    inwards, outwards = mlp.get_submodule("fc1"), mlp.get_submodule("fc2")
    assert isinstance(inwards, nn.Linear)
    assert isinstance(outwards, nn.Linear)
    _check_kept(neurons, inwards.out_features, "block_neurons")
    _narrow(inwards, rows=neurons)
    _narrow(outwards, columns=neurons)


def _check_kept(kept: Tensor, total: int, name: str) -> None:
    if not 1 <= len(kept) <= total:
        raise ValueError(f"{name} keeps {len(kept)} of {total} in a block; it must be 1 to {total}")


def _narrow(layer: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    weight = layer.weight
    if rows is not None:
        weight = nn.Parameter(weight.index_select(0, rows.to(weight.device)))
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.index_select(0, rows.to(weight.device)))
    if columns is not None:
        weight = nn.Parameter(weight.index_select(1, columns.to(weight.device)))
    layer.weight = weight
    layer.out_features, layer.in_features = weight.shape
