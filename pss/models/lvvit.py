"""LV-ViT (Jiang et al., NeurIPS 2021, https://arxiv.org/abs/2104.10858): a convolutional stem, divided residual
branches, and a classifier of patches beside that of the image.

Parameter names are those of the authors' files.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from pss.attention.attend import RelPos
from pss.models.block import Block
from pss.models.sampling import Sort, TokenCounts
from pss.models.vit import QkvBias, VisionTransformer

_STEM_STRIDE = 2  # of the convolutions before the projection
_LAYER_NORM_EPS = 1e-5
_PATCH_SHARE = 0.5


@dataclass(frozen=True)
class Shape:
    """What tells the variants apart; all of it can be set."""

    embed_dim: int
    depth: int
    num_heads: int
    residual_divisor: float
    stem_width: int = 64
    patch_size: int = 16
    mlp_ratio: float = 3.0
    drop_path_rate: float = 0.0


VARIANTS = {
    "lvvit_t": Shape(240, 12, 4, residual_divisor=1.0),
    "lvvit_s": Shape(384, 16, 6, residual_divisor=2.0),
    "lvvit_m": Shape(512, 20, 8, residual_divisor=2.0),
    "lvvit_l": Shape(768, 24, 12, residual_divisor=3.0, stem_width=128),
}
"""Those that have been published, by name."""

CROP_SHARES = {"lvvit_t": 0.9, "lvvit_s": 0.9, "lvvit_m": 1.0, "lvvit_l": 1.0}
"""What `data.crop_pct` was where they were evaluated."""


class ConvStem(nn.Module):
    """Three convolutions, of which the first halves the sides, and a projection of what is then half a patch wide."""

    def __init__(
        self, img_size: Any, patch_size: Any, in_chans: int, embed_dim: int, bias: bool, *, width: int, **_: Any
    ) -> None:
        """The arguments are those of timm's `PatchEmbed`, and the number of channels in between."""
        super().__init__()
        self.img_size: tuple[int, int] = to_2tuple(img_size)
        self.patch_size: tuple[int, int] = to_2tuple(patch_size)
        rows, columns = (size // side for size, side in zip(self.img_size, self.patch_size, strict=True))
        self.grid_size, self.num_patches = (rows, columns), rows * columns
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=_STEM_STRIDE, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        side = self.patch_size[0] // _STEM_STRIDE
        self.proj = nn.Conv2d(width, embed_dim, side, stride=side, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) of any number of whole patches to patches in raster order, (B, N, D)."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        patches: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return patches

    def macs_per_patch(self) -> int:
        """Multiply-accumulates of the share of the stem that belongs to one patch."""
        positions = (self.patch_size[0] // _STEM_STRIDE) ** 2
        convolutions = sum(conv.weight.numel() for conv in (self.conv1, self.conv2, self.conv3))
        return positions * convolutions + self.proj.weight.numel()


class LVViT(VisionTransformer):
    """A prediction adds, class by class, half of the largest logit that a patch has to the logits of the class token:
    with fewer patches the maximum can only be lower. Losses are taken of both apart."""

    embeds_apart = False  # convolutions look over the borders of patches
    own_heads = ("aux_head",)
    first_conv = "patch_embed.conv1"
    patch_embed: Any

    def __init__(self, plain: Any, *, residual_divisor: float, **options: Any) -> None:
        super().__init__(plain, **options)
        self.patch_share = _PATCH_SHARE
        self.aux_head: nn.Module = nn.Identity()
        if self.num_classes:
            head = nn.Linear(self.embed_dim, self.num_classes)
            trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
            self.aux_head = head
        assert self.cls_token is not None
        trunc_normal_(self.cls_token, std=0.02)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.residual_divisor = residual_divisor

    def stem_macs(self, num_embedded: int) -> int:
        return num_embedded * int(self.patch_embed.macs_per_patch())

    def readout_macs(self, num_tokens: int) -> int:
        patches = (num_tokens - self.num_prefix_tokens) if self.patch_share else 0
        of_patches = patches * sum(weight.numel() for weight in self.aux_head.parameters() if weight.ndim > 1)
        return super().readout_macs(num_tokens) + of_patches

    def embed_patches(self, images: Tensor, kept: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """The stem, which sees the whole image whatever is kept of it."""
        patches: Tensor = self.patch_embed(images)
        return patches if kept is None else patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))

    def readout(self, tokens: Tensor) -> Tensor:
        """The trunk's tokens (B, K, D) to logits (B, num_classes)."""
        logits, patches = self.answers(tokens)
        if patches is None or not self.patch_share:
            return logits
        return logits + self.patch_share * patches.amax(dim=1)

    def answers(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of the class token (B, num_classes), and of the patches (B, K - prefix, num_classes) unless they count
        for nothing."""
        logits: Tensor = self.head(self.pooled(tokens))
        if not self.num_classes or not self.patch_share:
            return logits, None
        return logits, self.aux_head(tokens[:, self.num_prefix_tokens :])


def build(
    name: str,
    *,
    num_classes: int,
    img_size: int | tuple[int, int] | None,
    rel_pos: RelPos | None = None,
    qkv_bias: QkvBias | None = None,
    init: str | None = None,
    sort: Sort = "magnitude",
    token_counts: TokenCounts = "published",
    global_pool: str = "token",
    **overrides: Any,
) -> LVViT:
    """The model of a name in `VARIANTS`, with its `Shape` overridden; the other arguments are `create_model`'s.

    Raises:
        ValueError: a setting that it does not have, or that does not go with another.
    """
    known = asdict(VARIANTS[name])
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(
                f"{name} has no setting {key!r}; "
                + (f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}")
            )
    if global_pool != "token":
        raise ValueError(
            f"{name} classifies by class token and patches, got model.global_pool={global_pool}; set it to token"
        )
    if init is not None:
        raise ValueError(f"{name} has initial weights of its own, got model.init={init}; set it to none")
    shape = Shape(**(known | overrides))
    sides = to_2tuple(224 if img_size is None else img_size)
    if shape.patch_size % _STEM_STRIDE:
        raise ValueError(
            f"{name} halves the sides of an image before it cuts patches, which patches of {shape.patch_size} pixels "
            f"do not allow; set model.patch_size={shape.patch_size + 1}, or another even number"
        )
    if any(side % shape.patch_size or not side for side in sides):
        raise ValueError(
            f"img_size {sides} is not a multiple of the patch size {shape.patch_size}; change data.img_size or "
            "model.patch_size"
        )
    if shape.embed_dim % shape.num_heads:
        raise ValueError(
            f"{name} cannot share model.embed_dim={shape.embed_dim} evenly between {shape.num_heads} heads; change one "
            "of them, model.num_heads is the other"
        )
    if shape.residual_divisor <= 0:
        raise ValueError(f"residual_divisor is {shape.residual_divisor:g}; it must be above 0")
    plain = TimmVisionTransformer(
        img_size=sides,
        patch_size=shape.patch_size,
        num_classes=num_classes,
        embed_dim=shape.embed_dim,
        depth=shape.depth,
        num_heads=shape.num_heads,
        mlp_ratio=shape.mlp_ratio,
        drop_path_rate=shape.drop_path_rate,
        qkv_bias=qkv_bias is not None,
        norm_layer=partial(nn.LayerNorm, eps=_LAYER_NORM_EPS),
        embed_layer=partial(ConvStem, width=shape.stem_width),
    )
    return LVViT(
        plain,
        residual_divisor=shape.residual_divisor,
        rel_pos=rel_pos or "none",
        qkv_bias=qkv_bias or "full",
        sort=sort,
        token_counts=token_counts,
    )
