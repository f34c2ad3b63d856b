"""Models by name: timm's plain Vision Transformers, presets, and backbones of one's own."""

import difflib
import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import timm
import torch
from timm.layers import Attention as TimmAttention
from timm.layers import Format, PatchEmbed, trunc_normal_
from timm.models import list_models
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import nn

from pss.attention.attend import RelPos
from pss.models import lvvit
from pss.models.block import prune
from pss.models.interface.timm_interface import POOLING
from pss.models.sampling import Sort, TokenCounts
from pss.models.settings import describe
from pss.models.vit import QkvBias, VisionTransformer
from pss.plugins import is_plugin, load

Init = Literal["timm", "published"]

_PRESETS: dict[str, dict[str, Any]] = {
    # ViT-B as SimMIM fine-tunes it: positions are known through the bias alone.
    "simmim_base_patch16": {
        "name": "vit_base_patch16_224",
        "rel_pos": "bias",
        "qkv_bias": "qv",
        "init": "published",
        "pos_embed": "none",
        "global_pool": "avg",
        "init_values": 0.1,
    },
}

# Options of timm's model that would drop patches, or change the grid, behind the back of the sampling. Some models have
# them on by default, so all are built with them off.
_OFF: dict[str, Any] = {"patch_drop_rate": 0.0, "dynamic_img_size": False, "dynamic_img_pad": False}

# What timm's plain ViT is built with. `timm.create_model` takes more, such as files and addresses to load weights from.
_OPTIONS = frozenset(inspect.signature(TimmVisionTransformer.__init__).parameters) - {"self", "device", "dtype"}


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    img_size: int | tuple[int, int] | None = 224,
    rel_pos: RelPos | None = None,
    sort: Sort = "magnitude",
    token_counts: TokenCounts = "published",
    qkv_bias: QkvBias | None = None,
    init: Init | None = None,
    block_heads: Sequence[int] | None = None,
    block_neurons: Sequence[int] | None = None,
    **overrides: Any,
) -> VisionTransformer:
    """Build a Vision Transformer by name.

    Args:
        name: A plain ViT of timm (`deit_small_patch16_224`, `vit_base_patch16_224`, distilled ones too); LV-ViT,
            `lvvit_t`, `lvvit_s`, `lvvit_m` or `lvvit_l`; a preset, `simmim_base_patch16`, the ViT-B that SimMIM
            fine-tunes; or a backbone of your own, `package.module:function`, which is called with the other arguments
            and returns a `VisionTransformer`.
        num_classes: Width of the classifier; 0 for none, so that features come out.
        img_size: Height and width of the images in pixels, or one number for both; multiples of the patch size.
            None is the size that the named model has of its own.
        rel_pos: How attention learns of relative positions. `bias`: a bias table in every block, as BEiT and the PSS
            runs; `separable`: a bias that is the sum of one for rows and one for columns; `rope`: axial rotary
            embedding; `none`: not at all. None is the preset's choice, or `none`.
        sort: Which patches `forward` keeps unless told otherwise (see `pss.models.sampling.select`).
        token_counts: What a share of the tokens is rounded to: whole tokens as `published`, or multiples of 8
            (`aligned`), which a GPU computes faster (see `pss.models.sampling.num_kept_tokens`).
        qkv_bias: `full` leaves timm's bias on queries, keys and values; `qv` has none on the keys, as BEiT.
        init: `timm`, or `published` for the initialisation of the PSS runs: truncated normal 0.02, the
            outputs of block l divided by sqrt(2l), a classifier near zero.
        block_heads: How many heads each block has, where some were taken out; each is as wide as before.
        block_neurons: As many neurons its MLP has.
        overrides: Passed on to `timm.create_model` (patch_size, embed_dim, depth, num_heads, drop_path_rate, ...), or
            what `pss.models.lvvit.Shape` has.

    Raises:
        ValueError: unknown name, a model that is not a plain ViT, or settings that do not go together.
    """
    explicit = {"rel_pos": rel_pos, "qkv_bias": qkv_bias, "init": init}
    model: VisionTransformer
    if is_plugin(name):
        given = overrides | {key: value for key, value in explicit.items() if value is not None}
        model = _create_own(name, num_classes, img_size, sort=sort, token_counts=token_counts, **given)
    elif name in lvvit.VARIANTS:
        model = lvvit.build(
            name, num_classes=num_classes, img_size=img_size, rel_pos=rel_pos, qkv_bias=qkv_bias, init=init, sort=sort,
            token_counts=token_counts, **overrides,
        )  # fmt: skip
    else:
        model = _create_timms(name, num_classes, img_size, sort, token_counts, explicit, overrides)
    model.name = name
    if block_heads is not None or block_neurons is not None:
        heads, neurons = block_heads or (), block_neurons or ()
        if len(heads) != len(neurons):
            raise ValueError(
                f"block_heads names {len(heads)} counts and block_neurons {len(neurons)}; both name one a block"
            )
        prune(model, [(torch.arange(few), torch.arange(many)) for few, many in zip(heads, neurons, strict=True)])
    return model


def _create_timms(
    name: str,
    num_classes: int,
    img_size: int | tuple[int, int] | None,
    sort: Sort,
    token_counts: TokenCounts,
    explicit: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> VisionTransformer:
    """A plain ViT of timm's, or a preset. Raises `ValueError`."""
    own = preset(name)
    settings = {"rel_pos": "none", "qkv_bias": "full", "init": "timm", "name": name, **own, **overrides}
    for key in ("rel_pos", "qkv_bias"):
        if key in own and explicit[key] not in (None, own[key]):
            raise ValueError(f"{name} has {key}={own[key]!r}, got {explicit[key]!r}; leave {key} out")
    settings |= {key: value for key, value in explicit.items() if value is not None}
    for key, choices in (("rel_pos", RelPos), ("qkv_bias", QkvBias), ("init", Init)):
        if settings[key] not in get_args(choices):
            raise ValueError(f"{key} must be one of {', '.join(get_args(choices))}, got {settings[key]!r}")
    timm_name, rel_pos, qkv_bias, init = (settings.pop(key) for key in ("name", "rel_pos", "qkv_bias", "init"))
    if qkv_bias == "qv":
        settings["qkv_bias"] = True

    plain = create_plain(timm_name, num_classes=num_classes, img_size=img_size, **settings)
    if init == "published":
        _init_published(plain)
    return VisionTransformer(plain, rel_pos=rel_pos, qkv_bias=qkv_bias, sort=sort, token_counts=token_counts)


def classifies_patches(name: str) -> bool | None:
    """Whether the model of that name has a classifier of patches; None where only its code can tell."""
    return None if is_plugin(name) else name in lvvit.VARIANTS


def preset(name: str) -> Mapping[str, Any]:
    """What a name brings along beside a plain model of timm's; nothing, for most."""
    return _PRESETS.get(name, {})


def settings_of_name(name: str | None) -> dict[str, Any] | None:
    """The settings (`pss.models.settings`) of the model of that name as it is built without any; None if it is none of
    timm's and no preset."""
    told = None if name is None or is_plugin(name) else _settings_of_name(name)
    return None if told is None else dict(told)


@functools.cache
def _settings_of_name(name: str) -> dict[str, Any] | None:
    with torch.device("meta"):
        try:
            plain = create_model(name, img_size=None)
        except ValueError:
            return None
    return describe(plain) | {"embed_dim": plain.embed_dim}


def _create_own(
    name: str, num_classes: int, img_size: int | tuple[int, int] | None, **settings: Any
) -> VisionTransformer:
    builder, settings = load(name), {"num_classes": num_classes, "img_size": img_size, **settings}
    try:
        inspect.signature(builder).bind(**settings)
    except TypeError as error:
        raise ValueError(f"{name} does not take these settings: {error}") from error
    made = builder(**settings)
    if not isinstance(made, VisionTransformer):
        raise ValueError(f"{name} made a {type(made).__name__}; a backbone is a pss.models.vit.VisionTransformer")
    return made


def create_plain(name: str, **settings: Any) -> Any:
    """timm's model of that name, once it is known to be a plain ViT whose grid fits the image.

    Raises:
        ValueError: unknown name, a model that is not a plain ViT, or settings that it cannot be built with.
    """
    check_name(name)
    for key, value in settings.items():
        if key in _OFF and value:
            raise ValueError(f"{key} cannot be combined with patch sampling; leave out what drops patches beside ρ")
        if key not in _OPTIONS:
            near = difflib.get_close_matches(key, _OPTIONS, n=1)
            raise ValueError(
                f"a plain Vision Transformer has no setting {key!r}; "
                + (f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(_OPTIONS))}")
            )
    try:
        plain = timm.create_model(name, **(settings | _OFF))
    except Exception as error:  # timm checks its arguments with whatever it comes across first
        reason = str(error).split("\n")[0] or type(error).__name__
        reason = f"it knows no {reason}" if isinstance(error, KeyError) else reason
        raise ValueError(f"timm cannot build {name} with these settings: {reason}") from error
    if not _is_plain(plain):
        raise ValueError(
            f"{name} is not a plain Vision Transformer (patch embedding, pre-norm blocks with ordinary attention, "
            f"{', '.join(POOLING)} pooling); choose one that is, such as deit_small_patch16_224"
        )
    if any(size % patch for size, patch in zip(plain.patch_embed.img_size, plain.patch_embed.patch_size, strict=True)):
        raise ValueError(
            f"img_size {plain.patch_embed.img_size} is not a multiple of the patch size "
            f"{plain.patch_embed.patch_size}; change data.img_size or model.patch_size"
        )
    return plain


def check_name(name: str) -> None:
    """Raise `ValueError`, with the nearest one, for what is no name of a model that `create_model` knows."""
    known = [*_PRESETS, *lvvit.VARIANTS, *list_models(module="vision_transformer"), *list_models(module="deit")]
    if name.split(".")[0] not in known:
        nearest = difflib.get_close_matches(name, known) or ["deit_small_patch16_224"]
        raise ValueError(f"no plain Vision Transformer is called {name[:80]!r}; did you mean {', '.join(nearest)}?")


def _is_plain(plain: Any) -> bool:
    """Whether all that timm's model consists of is what `VisionTransformer` takes over."""
    if (
        type(plain) not in (TimmVisionTransformer, VisionTransformerDistilled)
        or type(plain.patch_embed) is not PatchEmbed
    ):
        return False
    embed = plain.patch_embed
    return (
        all(type(block) is TimmBlock and type(block.attn) is TimmAttention for block in plain.blocks)
        and all(block.attn.gate is None for block in plain.blocks)
        and plain.global_pool in POOLING
        and plain.attn_pool is None
        and type(plain.patch_drop) is nn.Identity
        and not plain.dynamic_img_size
        and not embed.dynamic_img_pad
        and embed.flatten
        and embed.output_fmt == Format.NCHW
        and embed.proj.in_channels == 3
    )


def _init_published(plain: Any) -> None:
    """Initialise a timm ViT as the runs of McDanel & Huynh (2022) were."""
    for module in plain.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):  # the patch embedding too, as in SimMIM's model
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name in ("cls_token", "reg_token", "dist_token", "pos_embed"):
        if getattr(plain, name, None) is not None:
            trunc_normal_(getattr(plain, name), std=0.02)
    with torch.no_grad():
        for number, block in enumerate(plain.blocks, start=1):
            block.attn.proj.weight.div_(math.sqrt(2 * number))
            block.mlp.fc2.weight.div_(math.sqrt(2 * number))
        for name in ("head", "head_dist"):
            if isinstance(head := getattr(plain, name, None), nn.Linear):
                head.weight.mul_(0.001)
