"""The patch embedding of some patches only."""

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor

from pss.attention.relpos import Grid


def embed_some(stem: PatchEmbed, images: Tensor, kept: Tensor, grid: Grid) -> Tensor:
    """As a matrix product: images (B, 3, height, width) of a grid of patches to those at `kept` (B, K), (B, K, D)."""
    height, width = grid
    projection = stem.proj
    sides = images.shape[2] // height, images.shape[3] // width
    pixels = images.view(*images.shape[:2], height, sides[0], width, sides[1])  # (B, 3, h, side, w, side)
    image = torch.arange(len(images), device=images.device).unsqueeze(1)
    pixels = pixels.permute(0, 2, 4, 1, 3, 5)[image, kept // width, kept % width]  # (B, K, 3, side, side)
    x = F.linear(pixels.flatten(2), projection.weight.flatten(1), projection.bias)
    embedded: Tensor = stem.norm(x)
    return embedded
