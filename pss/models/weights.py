"""Load pretrained weights, whoever saved them, into a `VisionTransformer`.

Files are safetensors or what `torch.save` wrote; the latter are read without running pickled code. Names understood:

* timm and DeiT: `patch_embed`, `cls_token`, `dist_token`, `reg_token`, `pos_embed`, `blocks.0.attn.qkv`,
  `blocks.0.ls1.gamma`, `norm` or `fc_norm`, `head`, `head_dist`. These are our own names too.
* BEiT: `blocks.0.attn.q_bias` and `v_bias` instead of `qkv.bias`, `blocks.0.gamma_1` and `gamma_2` for the layer
  scale, `blocks.0.attn.relative_position_bias_table`, and `relative_position_index` buffers, which are not needed.
* SimMIM: as BEiT, with `encoder.` before every name of a pretrained model and one `rel_pos_bias` table for all
  layers, which every layer gets a copy of.

The state dict may lie under `model`, `state_dict`, `module`, `method`, `model_ema` or `state_dict_ema` (the first of
these that is there: plain weights before averaged ones), and its names may begin with `module.`, `model.`,
`encoder.`, `backbone.` or `_orig_mod.`.
"""

import argparse
import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from pss.attention import relpos
from pss.models.vit import VisionTransformer
from pss.runs import checkpoint

_WRAPPERS = ("model", "state_dict", "module", "method", "model_ema", "state_dict_ema")
_PREFIXES = {"module", "model", "encoder", "backbone", "_orig_mod"}
_ANCHOR = "patch_embed.proj.weight"  # every ViT has it, so it tells what precedes the names

_BACKBONE = {"patch_embed", "cls_token", "dist_token", "reg_token", "pos_embed", "norm_pre", "blocks"}
_HEADS = {"head", "head_dist"}

_NORMS = {"norm", "fc_norm"}
_PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")

_TABLE = "relative_position_bias_table"
_SHARED_TABLE = f"rel_pos_bias.{_TABLE}"
_SEPARABLE_TABLE = f"separable_{_TABLE}"


@dataclass(frozen=True, kw_only=True)
class Remedies:
    """What whoever reads an error can do about weights that do not fit, in the words of what they have at hand.

    By default that is Python; the commands have options instead, and bring their own.
    """

    no_file: str = "name a file that exists"
    """There is no such file."""

    other_head: str = "pass ignore_head=True to keep the model's own classifier"
    """The file has no classifier or the norm before it is missing, or it has one for other classes."""

    other_model: str = "build the model that it belongs to; pss.models.weights.settings_of says what a file tells of it"
    """The file's model has other parts, or parts of another shape."""

    other_bias: str = "create it with rel_pos={kind!r}"
    """The file has position biases, and the model has none of that kind."""


@dataclass(frozen=True)
class Report:
    """What became of the tensors of a weights file and of the model."""

    loaded: tuple[str, ...]
    """Parameters of the model that took their value from the file."""

    resized: tuple[str, ...]
    """Those of the loaded ones that were interpolated to the model's patch grid."""

    missing: tuple[str, ...]
    """Parameters of the model that the file does not have; they keep their initial value."""

    unexpected: tuple[str, ...]
    """Tensors of the file that the model has no use for."""

    def __str__(self) -> str:
        parts = [f"loaded {len(self.loaded)} of {len(self.loaded) + len(self.missing)} tensors"]
        for what, names in (
            ("resized", self.resized),
            ("not in the file", self.missing),
            ("not used", self.unexpected),
        ):
            if names:
                parts.append(f"{what}: {_first(names)}")
        return "; ".join(parts)


def start_from(
    model: VisionTransformer, where: str, *, ignore_head: bool = False, remedies: Remedies = Remedies()
) -> Report:
    """Copy the weights that `where` names into `model`: a file, the folder of a pss-train run, or timm:NAME.

    Raises:
        ValueError: as `load_weights`, with `remedies` at the end; a folder without a checkpoint; a name that timm has
            no weights for.
    """
    if where.startswith("timm:"):
        name = where.removeprefix("timm:")
        try:
            pretrained = timm.create_model(name, pretrained=True)
        except Exception as error:  # whatever the hub's client or timm raise
            reason = str(error).split("\n")[0]
            raise ValueError(f"timm gives no pretrained weights for {name} ({reason}); name a weights file") from error
        return _load(model, pretrained.state_dict(), where, ignore_head, remedies)
    path = Path(where)
    if path.is_dir():
        newest = checkpoint.load_latest(path / "checkpoints")
        if newest is None:
            raise ValueError(f"{path} holds no checkpoint; name a weights file, or the --output of a pss-train run")
        return _load(model, newest[0], where, ignore_head, remedies)
    return _load(model, _read(path, remedies), path, ignore_head, remedies)


def load_weights(model: VisionTransformer, path: str | Path, *, ignore_head: bool = False) -> Report:
    """Copy the weights of a file into `model`, converting names and patch grids on the way.

    A relative position bias that the file lacks stays zero, which changes nothing. Everything is checked before the
    model is touched.

    Args:
        model: Where to; the values are cast to its parameters' dtype.
        path: A .safetensors file, or one written by `torch.save`.
        ignore_head: Leave the classifier as it is, and the norm before it too if the file has none. For fine-tuning
            on other classes, or from an encoder that was pretrained without labels.

    Raises:
        ValueError: the file cannot be read as plain weights, or the model would not be what the file describes: parts
            missing, parts left over, shapes that differ by more than the patch grid, another number of classes.
    """
    remedies = Remedies()
    return _load(model, _read(Path(path), remedies), path, ignore_head, remedies)


def settings_of(path: str | Path, *, remedies: Remedies = Remedies()) -> dict[str, Any]:
    """What a weights file tells of its model: keyword arguments, to be given to `create_model` after the model's name.

    The name says the rest: width, depth and heads above all. Told are:

    * `num_classes`, 0 if there is no classifier;
    * `patch_size` in pixels, and `img_size` where the patches of a position embedding or a bias table form a square;
    * `global_pool`: `avg` where there is an `fc_norm` and no `norm`, as in BEiT and timm;
    * `rel_pos`: `bias` or `separable` where there are tables; rotary embedding leaves no trace in a file;
    * `qkv_bias`: `qv` where there is a `q_bias`; a joint bias is what most models have anyway;
    * `pos_embed`, and `init_values` for layer scale, whose values are in the file.

    Raises:
        ValueError: the file cannot be read as plain weights, or holds no Vision Transformer of the usual shapes.
    """
    found, _ = _plain_names(_read(Path(path), remedies), path)
    for name, num_dimensions in {
        _ANCHOR: 4,
        "head.weight": 2,
        **dict.fromkeys(("pos_embed", *_PREFIX_TOKENS), 3),
    }.items():
        if name in found and found[name].ndim != num_dimensions:
            raise ValueError(f"{path} has {name} of shape {tuple(found[name].shape)}; {remedies.other_model}")
    told: dict[str, Any] = {
        "num_classes": found["head.weight"].shape[0] if "head.weight" in found else 0,
        "pos_embed": "learn" if "pos_embed" in found else "none",
        "init_values": 1.0 if any(re.search(r"\.(gamma_1|ls1\.gamma)$", name) for name in found) else None,
    }
    *_, height, width = found[_ANCHOR].shape
    side = _grid_side(found)
    if height == width:
        told |= {"patch_size": width} | ({"img_size": side * width} if side is not None else {})
    if any(name.endswith(_SEPARABLE_TABLE) for name in found):
        told["rel_pos"] = "separable"
    elif any(name.endswith(_TABLE) for name in found):
        told["rel_pos"] = "bias"
    if any(name.endswith("attn.q_bias") for name in found):
        told["qkv_bias"] = "qv"
    if _NORMS & {_part(name) for name in found} == {"fc_norm"}:
        told["global_pool"] = "avg"
    return told


def _grid_side(found: Mapping[str, Tensor]) -> int | None:
    """Rows, and columns, of the square patch grid that the ViT's tensors are of; None if they do not tell."""
    if "pos_embed" in found:
        num_positions = found["pos_embed"].shape[1]
        num_prefix = sum(found[name].shape[1] for name in _PREFIX_TOKENS if name in found)
        for num_patches in (num_positions - num_prefix, num_positions):  # the prefix may have no positions
            side = math.isqrt(max(0, num_patches))
            if side and side**2 == num_patches:
                return side
    tables = (table for name, table in found.items() if name.split(".")[-1] == _TABLE)
    return next(map(_table_side, tables), None)


def _table_side(table: Tensor) -> int | None:
    """Rows, and columns, of the square patch grid that a bias table (rows, H) is of; None if there is none."""
    side = (math.isqrt(max(0, table.shape[0] - relpos.NUM_PREFIX_ROWS)) + 1) // 2
    return side if relpos.num_table_rows((side, side)) == table.shape[0] else None


def _load(
    model: VisionTransformer, content: Mapping[str, Any], path: str | Path, ignore_head: bool, remedies: Remedies
) -> Report:
    """`load_weights` with what `path` holds."""
    found, outside = _plain_names(content, path)
    heads = _HEADS | set(model.own_heads)
    unused_head = sorted(name for name in found if ignore_head and _part(name) in heads)
    for name in unused_head:
        del found[name]
    found = _our_names(found, model)
    own = model.state_dict()

    resized = []
    for name, value in found.items():
        if name in own and value.shape != own[name].shape:
            found[name] = _resize(name, value, own[name], model, path, remedies)
            resized.append(name)

    missing = [name for name in own if name not in found]
    unexpected = [name for name in found if name not in own]
    optional = _NORMS | heads if ignore_head else set()
    lacking = [name for name in missing if not name.endswith(_TABLE) and _part(name) not in optional]
    surplus = [name for name in unexpected if _part(name) in (_BACKBONE if ignore_head else _BACKBONE | _NORMS)]
    if lacking:
        parts = {_part(name) for name in lacking}
        # A norm in another place is that of another readout, which its classifier was trained with.
        other_model = parts & _BACKBONE or (parts <= _NORMS and _NORMS & {_part(name) for name in surplus})
        raise ValueError(
            f"{path} lacks {_first(lacking)}; {remedies.other_model if other_model else remedies.other_head}"
        )
    if surplus:
        remedy = remedies.other_model
        if all(name.endswith(_TABLE) for name in surplus):
            remedy = remedies.other_bias.format(kind="separable" if surplus[0].endswith(_SEPARABLE_TABLE) else "bias")
        raise ValueError(f"{path} has {_first(surplus)}, which this model does not; {remedy}")

    model.load_state_dict({name: value for name, value in found.items() if name in own}, strict=False)
    return Report(
        loaded=tuple(name for name in own if name in found),
        resized=tuple(resized),
        missing=tuple(missing),
        unexpected=(*unexpected, *unused_head, *outside),
    )


def _read(path: Path, remedies: Remedies) -> Mapping[str, Any]:
    """The content of a weights file."""
    if not path.is_file():
        raise ValueError(f"there is no weights file {path}; {remedies.no_file}")
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            # Training scripts leave their settings in the file; these two types hold plain values and are not needed.
            with torch.serialization.safe_globals([argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # bytes that are no pickle fail the reader in any way they like
        raise ValueError(
            f"{path} cannot be read as plain weights: it is damaged, or holds Python objects other than tensors "
            "(then save its state dict alone, as safetensors)"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not named tensors; save a state dict")
    return content


def _plain_names(content: Mapping[str, Any], path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """The ViT's tensors without wrappers and name prefixes, and the names of the tensors that are not part of it."""
    while wrapper := next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None):
        content = content[wrapper]
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    anchors = [name.removesuffix(_ANCHOR) for name in tensors if name.endswith(_ANCHOR)]
    prefix = next((prefix for prefix in anchors if _PREFIXES.issuperset(prefix.split(".")[:-1])), None)
    if prefix is None:
        raise ValueError(f"{path} holds no Vision Transformer: {_ANCHOR} is not among its {len(tensors)} tensors")
    inside = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return inside, [name for name in tensors if not name.startswith(prefix)]


def _our_names(found: dict[str, Tensor], model: VisionTransformer) -> dict[str, Tensor]:
    """BEiT's and SimMIM's names turned into ours, and the bias of q, k and v into the form the model has."""
    ours = {
        re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name): value
        for name, value in found.items()
        if not name.endswith("relative_position_index")
    }
    if _SHARED_TABLE in ours:
        table = ours.pop(_SHARED_TABLE)
        ours |= {f"blocks.{number}.attn.{_TABLE}": table for number in range(len(model.blocks))}

    own = model.state_dict()
    for attention in [name.removesuffix("qkv.weight") for name in ours if name.endswith("attn.qkv.weight")]:
        joint, q, v = (attention + suffix for suffix in ("qkv.bias", "q_bias", "v_bias"))
        if q in own and joint in ours:
            ours[q], _, ours[v] = ours.pop(joint).chunk(3)  # a bias on the keys cancels in the softmax
        elif joint in own and q in ours and v in ours:
            q_bias = ours.pop(q)
            ours[joint] = torch.cat((q_bias, torch.zeros_like(q_bias), ours.pop(v)))
    return ours


def _resize(
    name: str, value: Tensor, target: Tensor, model: VisionTransformer, path: str | Path, remedies: Remedies
) -> Tensor:
    """A tensor that depends on the patch grid, interpolated from a square grid to the model's."""
    if name == "pos_embed" and value.ndim == 3 and value.shape[2] == target.shape[2]:
        num_prefix = target.shape[1] - model.num_patches
        side = math.isqrt(max(0, value.shape[1] - num_prefix))
        if side and side * side + num_prefix == value.shape[1]:
            resized: Tensor = resample_abs_pos_embed(value, model.grid_size, (side, side), num_prefix)
            return resized
    elif name.endswith(_TABLE) and value.ndim == 2 and value.shape[1] == target.shape[1]:
        old_side = _table_side(value)
        if old_side is not None:
            return relpos.resize_table(value, (old_side, old_side), model.grid_size)
    elif _part(name) in _HEADS | set(model.own_heads):
        raise ValueError(
            f"{path} classifies into {value.shape[0]} classes, the model into {target.shape[0]}; {remedies.other_head}"
        )
    raise ValueError(
        f"{path} has {name} of shape {tuple(value.shape)}, the model needs {tuple(target.shape)}; "
        f"{remedies.other_model}"
    )


def _part(name: str) -> str:
    return name.split(".")[0]


def _first(names: list[str] | tuple[str, ...]) -> str:
    """The first few of many names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
