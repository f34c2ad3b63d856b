"""The methods by which programs that know timm's models use one as a backbone.

Signatures and shapes are those of timm's `VisionTransformer`. Where a share of the patches has a meaning, `rho` and
what goes with it come after timm's own arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.layers import Format
from torch import Tensor, nn

Intermediates = list[Tensor] | list[tuple[Tensor, Tensor]]

POOLING = ("token", "avg", "max", "avgmax")
"""How tokens become one vector."""


class TimmInterface:
    """Base of a model that consists of a stem, blocks, a norm and heads, under timm's names."""

    # Of the model.
    blocks: nn.ModuleList
    block_sizes: dict[str, list[int]]
    checkpoint_activations: bool
    cls_token: nn.Parameter | None
    embed_dim: int
    fc_norm: nn.Module
    global_pool: str
    grid_size: tuple[int, int]
    head: nn.Module
    head_dist: nn.Module | None
    image_size: tuple[int, int]
    name: str | None
    norm: nn.Module
    num_classes: int
    num_prefix_tokens: int
    own_heads: tuple[str, ...]
    parameters: Callable[..., Any]
    patch_embed: Any
    training: bool
    trained_on: Any

    compute: Callable[..., Any]
    pooled: Callable[..., Tensor]
    positions: Callable[..., Tensor | None]
    readout: Callable[..., Tensor]
    run_blocks: Callable[..., Tensor]
    see: Callable[..., tuple[Tensor, Tensor | None]]
    trunk: Callable[..., Tensor]

    first_conv = "patch_embed.proj"
    """The convolution that sees the pixels."""
    in_chans = 3
    """Channels of an image."""
    source_cfg: dict[str, Any] | None = None
    """What timm knows of the weights that it was asked to build the model for; None where timm did not build it."""

    @property
    def num_features(self) -> int:
        """Width of the tokens."""
        return self.embed_dim

    @property
    def head_hidden_size(self) -> int:
        """Width of what the classifier sees."""
        return self.embed_dim

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """For each block, its name, the channels of its feature map, and how many pixels of the image one of it is."""
        reduction = max(self.patch_embed.patch_size)
        return [
            {"module": f"blocks.{i}", "num_chs": self.embed_dim, "reduction": reduction}
            for i in range(len(self.blocks))
        ]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What timm keeps beside a model, so that `timm.data.resolve_data_config(model=model)` prepares images for it.

        What is not known of the images that it was trained on is left out.
        """
        told = self.source_cfg
        if told is None:
            names = self.classifiers()
            told = {
                "architecture": self.name,
                "num_classes": self.num_classes,
                "pool_size": None,
                "first_conv": self.first_conv,
                "classifier": names[0] if len(names) == 1 else names,
            }
        known = {} if self.trained_on is None else self.trained_on.to_dict()
        known |= {"input_size": (self.in_chans, *self.image_size), "fixed_input_size": True}
        if "classes" in known:
            known["label_names"] = known.pop("classes")
        return told | {key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}

    @pretrained_cfg.setter
    def pretrained_cfg(self, cfg: dict[str, Any]) -> None:
        self.source_cfg = dict(cfg)

    @property
    def default_cfg(self) -> dict[str, Any]:
        """`pretrained_cfg`, by the name that timm gave it first."""
        return self.pretrained_cfg

    @default_cfg.setter
    def default_cfg(self, cfg: dict[str, Any]) -> None:
        if cfg != self.pretrained_cfg:  # timm sets the one to the other, with what is known of the model now
            self.pretrained_cfg = cfg

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not to be decayed although they are not 1-D, as in timm."""
        return {"pos_embed", "cls_token", "reg_token", "dist_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameter names into layers, for learning rates that fall towards the input: stem, then
        each block, then what follows them (BEiT's rule; timm counts the last norm to the last block).

        `coarse` groups a network by its stages, of which a ViT has none: it changes nothing, as in timm.
        """
        return {
            "stem": r"^cls_token|^reg_token|^dist_token|^pos_embed|^patch_embed|^norm_pre",
            "blocks": r"^blocks\.(\d+)",
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Have each block computed once more in the backward pass, which then needs less memory, or not."""
        self.checkpoint_activations = enable

    def forward_features(
        self, x: Tensor, rho: float = 1.0, *, sort: str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Images (B, 3, height, width) to the tokens after the last norm, (B, K, D): prefix, then the kept patches.

        Raises:
            ValueError: wrong image size, rho or sort.
        """
        tokens: Tensor = self.compute(self.trunk, *self.see(x, rho, sort, generator))
        return tokens

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` returned, (B, K, D), to logits (B, num_classes), or with `pre_logits` to what the
        classifier would see, (B, D)."""
        return self.pooled(x) if pre_logits else self.readout(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        *,
        rho: float = 1.0,
        sort: str | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """What comes out of some blocks, as maps or as tokens.

        Args:
            x: Images, (B, 3, height, width).
            indices: Numbers of blocks, from the end where negative; how many of the last ones; None for all.
            return_prefix_tokens: Return a pair of patches and prefix for each block.
            norm: Apply the model's last norm to each of them.
            stop_early: Leave out the blocks after the last one that is asked for.
            output_fmt: `NCHW` for maps, (B, D, rows, columns), which take all patches; `NLC` for patches, (B, K, D).
            intermediates_only: Leave out the tokens after the last norm.
            output_dict: Return `image_intermediates`, `image_intermediates_prefix` and `image_features` by name; below
                rho 1 also `image_kept`, (B, K), the numbers of the kept patches in raster order.
            rho: Share of the tokens to keep, in (0, 1].
            sort: Which patches to keep; the model's own `sort` if None.
            generator: Source of the random sort; torch's default generator if None.

        Returns:
            The tokens after the last norm (B, prefix + K, D) and the list of intermediates, or what is asked for of it.

        Raises:
            ValueError: there is no such block or format, or a map is asked for of a part of the patches.
        """
        form = str(output_fmt.value if isinstance(output_fmt, Format) else output_fmt)
        if form not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {form!r}")
        wanted, last = self._blocks_asked_for(indices)
        tokens, kept = self.see(x, rho, sort, generator)
        if kept is not None and form == "NCHW":
            raise ValueError(
                f"a map of features needs all patches, and rho is {rho:g}; leave rho out, or set output_fmt to NLC"
            )
        positions = self.positions(kept)
        taken: list[Tensor] = []
        for number in range(last + 1 if stop_early else len(self.blocks)):
            tokens = self.run_blocks(tokens, positions, number, number + 1)
            if number in wanted:
                taken.append(self.norm(tokens) if norm else tokens)
        prefix = [one[:, : self.num_prefix_tokens] for one in taken]
        patches = [one[:, self.num_prefix_tokens :] for one in taken]
        if form == "NCHW":
            patches = [one.transpose(1, 2).reshape(len(x), -1, *self.grid_size) for one in patches]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": patches}
            if with_prefix:
                found["image_intermediates_prefix"] = prefix
            if kept is not None:
                found["image_kept"] = kept
            return found if intermediates_only else found | {"image_features": self.norm(tokens)}
        intermediates: Intermediates = list(zip(patches, prefix, strict=True)) if with_prefix else patches
        return intermediates if intermediates_only else (self.norm(tokens), intermediates)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        **options: Any,
    ) -> Any:
        """`forward_intermediates` under the name and with the arguments of DINO's models; `options` are rho and what
        goes with it."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens,
            norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            **options,
        )

    def _blocks_asked_for(self, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
        count = len(self.blocks)
        last_ones = count if indices is None else indices
        if isinstance(last_ones, int):
            if not 0 < last_ones <= count:
                raise ValueError(f"{last_ones} blocks are asked for and the model has {count}; ask for 1 to {count}")
            wanted = list(range(count - last_ones, count))
        else:
            wanted = [count + one if one < 0 else one for one in last_ones]
            if not wanted or not all(0 <= one < count for one in wanted):
                raise ValueError(f"indices {list(last_ones)} are no blocks of this model; it has 0 to {count - 1}")
        return wanted, max(wanted)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop, in place, the blocks after the last of `indices`, and the last norm and the heads if asked.

        Returns the numbers of the blocks that were asked for. Raises `ValueError` where there is no such block.
        """
        wanted, last = self._blocks_asked_for(indices)
        self.blocks = self.blocks[: last + 1]
        self.block_sizes = {key: sizes[: last + 1] for key, sizes in self.block_sizes.items()}
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return wanted

    def classifiers(self) -> list[str]:
        """Names of the modules that are classifiers."""
        return ["head", *(["head_dist"] if self.head_dist is not None else []), *self.own_heads]

    def get_classifier(self) -> Any:
        """The classifier; all of them, as a tuple, where a prediction is made by more than one."""
        heads = tuple(getattr(self, name) for name in self.classifiers())
        return heads[0] if len(heads) == 1 else heads

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by an untrained one.

        Args:
            num_classes: Its width; 0 for none, so that features come out.
            global_pool: How tokens become features: `token`, `avg`, `max`, `avgmax`, or none for all tokens as they
                are; None leaves that as it is.

        Raises:
            ValueError: not such a number, or a pooling that the model cannot do.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}; it must be a number of classes, or 0 for no classifier")
        names = self.classifiers()
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in ("", *POOLING):
            raise ValueError(f"global_pool must be one of {', '.join(POOLING)}, or empty, got {pool!r}")
        if pool == "token" and self.cls_token is None:
            raise ValueError("global_pool is token and this model has no class token; set it to avg")
        if len(names) > 1 and pool != "token" and (pool or num_classes):
            raise ValueError(
                f"global_pool is {pool!r}, and {' and '.join(names)} of this model read tokens of their own; leave it "
                "out"
            )
        like = next(self.parameters())
        for name in names:
            head: nn.Module = nn.Identity()
            if num_classes:
                head = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
            setattr(self, name, head.train(self.training))
        self.num_classes, self.global_pool = num_classes, pool
        if self.trained_on is not None:
            self.trained_on = replace(self.trained_on, classes=None)
