"""A Vision Transformer that accepts any share of its patches, composed from timm's parts.

The parts keep timm's names, so a state dict of timm's plain model loads as it is when there is no relative position
bias. The public pieces (`see`, which is `embed` and `sample`, `trunk`, which is `positions`, `blocks` and `norm`, and
`readout`) are what `forward` is made of; a method that selects tokens elsewhere puts them together in its own way. A
backbone that is not timm's plain ViT is a subclass that replaces some of them, and says what they cost.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from timm.layers import PatchEmbed, RotaryEmbeddingCat
from timm.models.vision_transformer import global_pool_nlc
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pss.attention import relpos
from pss.attention.attend import RelPos
from pss.attention.relpos import Grid
from pss.models import sampling
from pss.models.block import Block
from pss.models.compiled import Graphs
from pss.models.interface.timm_interface import TimmInterface
from pss.models.sampling import Sort, TokenCounts
from pss.models.settings import WithSettings
from pss.models.stem import embed_some

QkvBias = Literal["full", "qv"]


class VisionTransformer(WithSettings, TimmInterface):
    """A ViT whose forward pass takes the kept share of patches as an argument; it remembers nothing about it.

    At rho = 1 nothing is sampled and the numbers are those of timm's model. Training and evaluation mode obey rho
    alike.
    """

    embeds_apart = True
    """Whether a patch is embedded from its own pixels alone; then those that are dropped at random are not embedded."""
    own_heads: tuple[str, ...] = ()
    """Names of a backbone's further classifiers, which weights for other classes leave out with the usual ones."""
    patch_share: float | None = None
    """What the largest logit of a patch counts in a prediction; None where there is no classifier of patches."""

    def __init__(
        self,
        plain: Any,
        *,
        rel_pos: RelPos = "none",
        qkv_bias: QkvBias = "full",
        sort: Sort = "magnitude",
        token_counts: TokenCounts = "published",
    ) -> None:
        """Take over the parts of timm's plain ViT; use `create_model`, which also checks that it is one."""
        super().__init__()
        for key, value, choices in (("sort", sort, Sort), ("token_counts", token_counts, TokenCounts)):
            if value not in get_args(choices):
                raise ValueError(f"{key} must be one of {', '.join(get_args(choices))}, got {value!r}")
        self.sort: Sort = sort
        self.token_counts: TokenCounts = token_counts
        self.rel_pos: RelPos = rel_pos
        self.grid_size: Grid = plain.patch_embed.grid_size
        self.image_size: tuple[int, int] = plain.patch_embed.img_size
        self.embed_dim: int = plain.embed_dim
        self.num_classes: int = plain.num_classes
        self.num_prefix_tokens: int = plain.num_prefix_tokens
        self.global_pool: str = plain.global_pool
        self.pool_include_prefix: bool = plain.pool_include_prefix

        self.patch_embed: PatchEmbed = plain.patch_embed
        self.cls_token: nn.Parameter | None = plain.cls_token
        self.reg_token: nn.Parameter | None = plain.reg_token
        self.dist_token: nn.Parameter | None = getattr(plain, "dist_token", None)
        self.pos_embed: nn.Parameter | None = plain.pos_embed
        self.pos_drop: nn.Dropout = plain.pos_drop
        self.norm_pre: nn.Module = plain.norm_pre
        self.blocks = nn.ModuleList(blocks := [Block(block) for block in plain.blocks])
        self.norm: nn.Module = plain.norm
        self.fc_norm: nn.Module = plain.fc_norm
        self.head_drop: nn.Module = plain.head_drop
        self.head: nn.Module = plain.head
        self.head_dist: nn.Module | None = getattr(plain, "head_dist", None)

        for block in blocks:
            if qkv_bias == "qv":
                block.attn.drop_key_bias()
            if rel_pos != "none":
                block.attn.add_positions(rel_pos, self.grid_size)
        self.graphs: Graphs | None = None  # where `compute` has it compiled, if it does
        self.checkpoint_activations = False
        """Have each block computed once more in the backward pass, which then needs only what entered it."""
        # Angles as in timm's own ViTs with axial rotary embedding.
        self.rope: RotaryEmbeddingCat | None = None
        if rel_pos == "rope":
            grid, width = list(self.grid_size), blocks[0].attn.head_dim
            self.rope = RotaryEmbeddingCat(width, temperature=100.0, in_pixels=False, feat_shape=grid)

    @property
    def num_patches(self) -> int:
        """Patches of a whole image."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def num_tokens(self) -> int:
        """Tokens of a whole image, prefix included."""
        return self.num_prefix_tokens + self.num_patches

    def grid_of(self, image_size: tuple[int, int] | int) -> Grid:
        """Patch rows and columns of an image of (height, width) pixels, or of a square one of that side.

        Raises:
            ValueError: it does not consist of whole patches, or has more of them than the model was built for.
        """
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        sides = self.patch_embed.patch_size
        grid = size[0] // sides[0], size[1] // sides[1]
        fits = all(0 < part <= whole for part, whole in zip(grid, self.grid_size, strict=True))
        if not fits or any(pixels % side for pixels, side in zip(size, sides, strict=True)):
            raise ValueError(
                f"images of {size[0]} x {size[1]} pixels do not suit this model: it takes whole patches of "
                f"{sides[0]} x {sides[1]}, and at most {self.image_size[0]} x {self.image_size[1]} pixels"
            )
        return grid

    def num_kept_tokens(self, rho: float, image_size: tuple[int, int] | int | None = None) -> int:
        """Tokens that the blocks see at a share `rho`, prefix included.

        Args:
            rho: Share of the image's tokens, in (0, 1].
            image_size: Of images with a lower resolution; that of the model by default.

        Raises:
            ValueError: a rho not in (0, 1], or images that do not suit the model.
        """
        height, width = self.grid_size if image_size is None else self.grid_of(image_size)
        return sampling.num_kept_tokens(rho, height * width, self.num_prefix_tokens, self.token_counts)

    def stem_macs(self, num_embedded: int) -> int:
        """Multiply-accumulates of one image before the blocks, with so many patches embedded."""
        return num_embedded * int(self.patch_embed.get_parameter("proj.weight").numel())

    def readout_macs(self, num_tokens: int) -> int:
        """Multiply-accumulates of one image after the blocks, which returned so many tokens, prefix included."""
        heads = (self.head, self.head_dist)
        return int(sum(head.weight.numel() for head in heads if isinstance(head, nn.Linear)))

    def forward(
        self,
        images: Tensor,
        rho: float = 1.0,
        *,
        sort: Sort | None = None,
        generator: torch.Generator | None = None,
        low_resolution: bool = False,
    ) -> Tensor:
        """Classify images from a share of their patches.

        Args:
            images: (B, 3, height, width), of the size the model was built for.
            rho: Share of the tokens to keep, in (0, 1].
            sort: Which patches to keep; the model's own `sort` if None.
            generator: Source of the random sort; torch's default generator if None.
            low_resolution: Take smaller images too, as the same view in fewer patches; see `see`.

        Returns:
            Logits, (B, num_classes).

        Raises:
            ValueError: wrong image size, rho or sort.
        """
        tokens, kept = self.see(images, rho, sort, generator, low_resolution)
        return self.readout(self.compute(self.trunk, tokens, kept))

    def compute(self, part: Callable[..., Any], tokens: Tensor, *others: Tensor | int | None) -> Any:
        """`part(tokens, *others)`, compiled where the run compiles; see `Graphs`."""
        if self.graphs is None or torch.compiler.is_compiling():
            return part(tokens, *others)
        return self.graphs(part, tokens, *others)

    def see(
        self,
        images: Tensor,
        rho: float,
        sort: Sort | None = None,
        generator: torch.Generator | None = None,
        low_resolution: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`embed` and `sample` in one, which saves embedding patches that a random choice drops; see there.

        With `low_resolution` images may be smaller than those the model was built for, by whole patches. Their few
        patches are spread evenly over the model's grid: to the blocks it is as if the patches between them had been
        dropped, so that position embeddings and biases keep their meaning in shares of the view, and need no resizing.
        The indices returned are on the model's grid; where no patch is dropped, they are the same for all images and
        have one dimension.
        """
        places = self._places(images) if low_resolution else None
        num_patches = self.num_patches if places is None else len(places)
        num_kept = sampling.num_kept_tokens(rho, num_patches, self.num_prefix_tokens, self.token_counts)
        whole = num_kept == num_patches + self.num_prefix_tokens
        random = (self.sort if sort is None else sort) == "random"
        dropout = self.training and self.pos_drop.p > 0
        if whole or not random or dropout or not self.embeds_apart:
            tokens, kept = self.take(self.embed(images, places=places), num_kept, sort, generator)
        else:
            count = num_kept - self.num_prefix_tokens
            kept = sampling.select_at_random(len(images), num_patches, count, generator, images.device)
            tokens = self.embed(images, kept, places)
        if places is None:
            return tokens, kept
        return tokens, places if kept is None else places[kept]

    def _places(self, images: Tensor) -> Tensor | None:
        """Where on the model's grid the patches of smaller images lie, (patches,); None if the images are not smaller.

        Raises `ValueError` for images of a size that does not suit the model.
        """
        grid = self.grid_of((images.shape[-2], images.shape[-1]))
        return None if grid == self.grid_size else sampling.spread(grid, self.grid_size, images.device)

    def embed(self, images: Tensor, kept: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """Images (B, 3, height, width) to tokens (B, N, D): prefix, patches, position embedding, input norm.

        Args:
            images: Of the size the model was built for, or smaller if there are `places`.
            kept: Indices of the patches to embed, (B, K - prefix), which gives (B, K, D); None for all.
            places: Where on the model's grid the patches of smaller images lie, (patches,).

        Raises:
            ValueError: the images have another size than the model was built for.
        """
        if places is None and tuple(images.shape[-2:]) != tuple(self.image_size):
            raise ValueError(
                f"this model takes images of {self.image_size[0]} x {self.image_size[1]} pixels, "
                f"got {images.shape[-2]} x {images.shape[-1]}; build it with that img_size"
            )
        return self.place(self.embed_patches(images, kept, places), kept, places)

    def embed_patches(self, images: Tensor, kept: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """The stem: images to patches (B, patches, D), with nothing of where they are; arguments as of `embed`."""
        if kept is not None:
            return embed_some(self.patch_embed, images, kept, self.grid_of((images.shape[-2], images.shape[-1])))
        if places is None:
            x: Tensor = self.patch_embed(images)
        else:  # timm's module would refuse the size
            x = self.patch_embed.norm(self.patch_embed.proj(images).flatten(2).transpose(1, 2))
        return x

    def place(self, x: Tensor, kept: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """Patches (B, patches, D) to tokens: the prefix before them, position embedding, input norm; arguments as of
        `embed`."""
        prefix = [
            token.expand(x.shape[0], -1, -1)
            for token in (self.cls_token, self.dist_token, self.reg_token)
            if token is not None
        ]
        if self.pos_embed is None:
            x = torch.cat((*prefix, x), dim=1)
        else:
            num_placed = self.pos_embed.shape[1] - self.num_patches  # prefix tokens that have a position
            positions: Tensor = self.pos_embed
            where = kept if places is None else places.unsqueeze(0) if kept is None else places[kept]
            if where is not None:
                some = positions[0, num_placed + where]  # (B or 1, K - prefix, D)
                positions = torch.cat((positions[:, :num_placed].expand(len(some), -1, -1), some), dim=1)
            if num_placed:
                x = self.pos_drop(torch.cat((*prefix, x), dim=1) + positions)
            else:
                x = self.pos_drop(torch.cat((*prefix, x + positions), dim=1))
        tokens: Tensor = self.norm_pre(x)
        return tokens

    def sample(
        self, tokens: Tensor, rho: float, sort: Sort | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Keep a share of the patches: the patch sampling block of McDanel & Huynh (2022).

        Args:
            tokens: All tokens, (B, N, D).
            rho: Share of the tokens to keep, in (0, 1].
            sort: Which patches to keep; the model's own `sort` if None.
            generator: Source of the random sort; torch's default generator if None.

        Returns:
            The prefix and the kept patches (B, K, D), and the indices of the latter (B, K - prefix); at rho = 1 the
            tokens themselves and None.
        """
        return self.take(tokens, self.num_kept_tokens(rho), sort, generator)

    def take(
        self, tokens: Tensor, num_kept: int, sort: Sort | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        """`sample` of any grid of tokens (B, N, D), with the number to keep, prefix included."""
        if num_kept == tokens.shape[1]:
            return tokens, None
        kept = sampling.select(tokens, num_kept, self.num_prefix_tokens, self.sort if sort is None else sort, generator)
        return sampling.gather(tokens, kept, self.num_prefix_tokens), kept

    def keep(self, tokens: Tensor, num_patches: int) -> tuple[Tensor, Tensor]:
        """`sample` by magnitude, with the number of patches to keep, which `torch.export` may leave free; indices are
        returned even if all are kept."""
        num_prefix = self.num_prefix_tokens
        kept = sampling.select(tokens, num_patches + num_prefix, num_prefix, "magnitude")
        return sampling.gather(tokens, kept, num_prefix), kept

    def positions(self, kept: Tensor | None) -> Tensor | None:
        """What the blocks need to know of the tokens' positions; None if they need nothing.

        Tokens may be reordered, and dropped, along with their positions.

        Args:
            kept: Indices of the kept patches on the model's grid, (B, K - prefix), or (K - prefix,) if they are the
                same for all images; None if all patches are there.

        Returns:
            For a bias the numbers of `relpos.positions`, (2, B, K); for rotary embedding sines and cosines,
            (B, K, 2 * head width). If all images have the same patches, 1 in place of B.
        """
        if self.rel_pos == "none":
            return None
        if kept is not None and kept.ndim == 1:
            kept = kept.unsqueeze(0)
        if self.rope is None:
            device = next(self.parameters()).device
            return relpos.positions(self.grid_size, self.num_prefix_tokens, kept, device)
        return relpos.turns(self.rope.get_embed(), self.num_prefix_tokens, kept)

    def trunk(self, tokens: Tensor, kept: Tensor | None) -> Tensor:
        """All blocks, and the norm after them.

        Args:
            tokens: What `sample` returns, (B, K, D).
            kept: See `positions`.

        Returns:
            (B, K, D).
        """
        normed: Tensor = self.norm(self.run_blocks(tokens, self.positions(kept)))
        return normed

    def run_blocks(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        start: int = 0,
        stop: int | None = None,
        *,
        extras: list[Any] | None = None,
        **options: Any,
    ) -> Tensor:
        """Tokens (B, K, D) through the blocks from number `start` up to `stop`, to the last one if that is None.

        `positions` are what the method of that name returns, and `options` go to each block's attention; see `Block`.
        What attention modules of a method's own return besides is appended to `extras`, one entry a block.
        """
        again = self.checkpoint_activations and torch.is_grad_enabled()
        for block in self.blocks[start:stop]:
            if again:
                result = checkpoint(block, tokens, positions, use_reentrant=False, **options)
            else:
                result = block(tokens, positions, **options)
            tokens, extra = result if isinstance(result, tuple) else (result, None)
            if extras is not None:
                extras.append(extra)
        return tokens

    def pooled(self, tokens: Tensor) -> Tensor:
        """The trunk's tokens (B, K, D) to one feature vector per image, (B, D); to all of them without pooling."""
        if self.head_dist is not None and self.global_pool:
            features: Tensor = (self.head_drop(tokens[:, 0]) + self.head_drop(tokens[:, 1])) / 2
        else:
            x = global_pool_nlc(tokens, self.global_pool, self.num_prefix_tokens, self.pool_include_prefix)
            features = self.head_drop(self.fc_norm(x))
        return features

    def readout(self, tokens: Tensor) -> Tensor:
        """The trunk's tokens (B, K, D) to logits (B, num_classes); a distilled model averages its two heads."""
        if self.head_dist is None or not self.global_pool:
            logits: Tensor = self.head(self.pooled(tokens))
        else:
            logits = (self.head(self.head_drop(tokens[:, 0])) + self.head_dist(self.head_drop(tokens[:, 1]))) / 2
        return logits

    def answers(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """What losses are taken of, where `readout` is what a prediction is: logits of the image (B, num_classes), and
        of each of its patches (B, K - prefix, num_classes) where the backbone has a classifier for them."""
        return self.readout(tokens), None
