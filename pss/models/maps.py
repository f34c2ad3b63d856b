"""What tokens look at, for pictures."""

from collections.abc import Sequence

from torch import Tensor

from pss.models.block import Block
from pss.models.vit import VisionTransformer


def attention_maps(
    model: VisionTransformer, tokens: Tensor, kept: Tensor | None, blocks: Sequence[int] | None = None
) -> list[Tensor]:
    """Attention weights (B, H, K, K) in some blocks of a model, in all by default.

    Args:
        model: Its parts are used as they are, in training mode with their dropout.
        tokens: What `VisionTransformer.sample` returns, (B, K, D).
        kept: See `VisionTransformer.positions`.
        blocks: Numbers of blocks, from 0.
    """
    positions = model.positions(kept)
    wanted = range(len(model.blocks)) if blocks is None else blocks
    maps = {}
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        if number in wanted:
            maps[number] = block.attn.weights(block.norm1(tokens), positions)
        tokens = model.run_blocks(tokens, positions, number, number + 1)
    return [maps[number] for number in wanted]
