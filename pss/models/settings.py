"""What a model computes that no tensor of it shows: carried by its state dict, and compared wherever one is loaded.

Names and shapes tell a model's width, depth and bias tables. They do not tell into how many heads the width is divided,
whether tokens are turned by their position, how many rows the patch grid has, which activation and which epsilon is
used, how tokens are pooled, nor what the classes are called and how images were normalised. Those travel as JSON in the
state dict's `_extra_state`, in the metadata of a safetensors file, or under `settings` beside the weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Json = dict[str, Any]

KEY = "_extra_state"
"""Where torch puts what `get_extra_state` returns."""

_FORMAT = 1
_IN_METHOD = "model."  # what precedes a model's names in the state of its method
_MOST_BYTES = 1 << 24  # the names of a hundred thousand classes; what is longer is no such text

_CHECKS: dict[str, Any] = {
    "num_heads": lambda value: _is_count(value),
    "rel_pos": lambda value: value in ("none", "bias", "separable", "rope"),
    "img_size": lambda value: _is_pair(value),
    "patch_size": lambda value: _is_pair(value),
    "no_embed_class": lambda value: isinstance(value, bool),
    "global_pool": lambda value: isinstance(value, str),
    "pool_include_prefix": lambda value: isinstance(value, bool),
    "residual_divisor": lambda value: _is_number(value) and value > 0,
    "patch_share": lambda value: _is_number(value) and value >= 0,
    "layers": lambda value: isinstance(value, dict) and all(isinstance(one, str) for one in value.values()),
    "classes": lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
    "mean": lambda value: _is_triple(value),
    "std": lambda value: _is_triple(value),
    "crop_pct": lambda value: _is_number(value) and 0 < value <= 1,
}


@dataclass(frozen=True)
class TrainedOn:
    """What a model's classes are called, how its images are normalised, and how much of them is shown in evaluation;
    None for what is not known."""

    classes: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None

    @classmethod
    def images(cls, classes: Iterable[str] | None, data: Any) -> TrainedOn:
        """`data` has `mean`, `std` and `crop_pct`, as `pipelines.base.DataConfig` has them."""
        return cls(None if classes is None else tuple(classes), data.mean, data.std, data.crop_pct)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> TrainedOn:
        """That part of a model's settings."""
        values = {name: settings.get(name) for name in ("classes", "mean", "std")}
        told = {name: None if value is None else tuple(value) for name, value in values.items()}
        return cls(**told, crop_pct=settings.get("crop_pct"))

    def to_dict(self) -> Json:
        told = {name: value for name, value in vars(self).items() if value is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}


class WithSettings(nn.Module):
    """Base of a model whose state dict carries its settings, and which takes no state dict with other ones.

    They are no buffer, which DDP would send round at every step, and a name that timm's models refuse.
    """

    name: str | None
    """What `create_model` built it by; settings that a weights file does not tell are those of that name."""
    trained_on: TrainedOn | None
    """What its classes are called and how its images are normalised, where that is known."""

    block_sizes: dict[str, list[int]]
    """What `create_model` is to be told beside its other settings, of a model whose blocks were pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.name = self.trained_on = None
        self.block_sizes = {}
        self.register_load_state_dict_pre_hook(_compare)  # type: ignore[no-untyped-call]

    def get_extra_state(self) -> Tensor:
        return encode(describe(self))

    def set_extra_state(self, state: Any) -> None:
        """Take the names of the classes from a state dict; what else it tells has been compared before."""
        if self.trained_on is None:
            theirs = TrainedOn.of(decode(state))
            self.trained_on = theirs if theirs != TrainedOn() else None


def _compare(model: Any, state: Json, prefix: str, *_: Any) -> None:
    """Raise `ValueError`, before a tensor is copied, where a state dict is of a model that computes something else.

    A state dict without settings, timm's say, is taken as it is: `load_weights` asks for what it does not tell.
    """
    if not prefix:
        _take_out_of_a_checkpoint(state)
    ours = describe(model)
    theirs = decode(state.setdefault(prefix + KEY, encode(ours)))
    found = differences(theirs, ours)
    grids = grid_of(theirs), grid_of(ours)
    if None not in grids and grids[0] != grids[1] and math.prod(grids[0] or ()) == math.prod(grids[1] or ()):
        found.append("a grid of {} x {} patches, not {} x {}".format(*(side for grid in grids for side in grid or ())))
    if (classes := other_classes(theirs, ours)) is not None:
        found.append(f"other classes: {classes}")
    if found:
        raise ValueError(f"these weights are of another model, with {'; '.join(found)}; build the one they belong to")


def _take_out_of_a_checkpoint(state: Json) -> None:
    """Leave the model's own tensors of what a run's checkpoint holds, which `timm.models.load_checkpoint` passes whole.

    They are the weights that were trained, not their average. Raises `ValueError` where the method has others besides.
    """
    if not (isinstance(state.get("method"), Mapping) and isinstance(state.get("config"), Mapping)):
        return
    weights = state["method"]
    if others := [name for name in weights if not name.startswith(_IN_METHOD)]:
        raise ValueError(
            f"the checkpoint holds weights of its method beside those of the model ({others[0]}, …); name its run to "
            "pss-eval, whose --export writes a file with all of them"
        )
    state.clear()
    state.update({name.removeprefix(_IN_METHOD): value for name, value in weights.items()})


def describe(model: Any) -> Json:
    """The settings of a `VisionTransformer`, read from what was built and not from what was asked for."""
    block = model.blocks[0] if len(model.blocks) else None
    layers = {
        "norm_pre": model.norm_pre,
        "norm": model.norm,
        "fc_norm": model.fc_norm,
        **{f"patch_embed.{name}": getattr(model.patch_embed, name, None) for name in ("norm", "bn1", "bn2", "bn3")},
    }
    if block is not None:
        layers |= {"blocks.norm1": block.norm1, "blocks.norm2": block.norm2}
        layers |= {f"blocks.attn.{name}": getattr(block.attn, name, None) for name in ("q_norm", "k_norm", "norm")}
        layers |= {f"blocks.mlp.{name}": getattr(block.mlp, name, None) for name in ("act", "norm")}
    told: Json = {
        "rel_pos": model.rel_pos,
        "img_size": [int(side) for side in model.image_size],
        "patch_size": [size // part for size, part in zip(model.image_size, model.grid_size, strict=True)],
        "no_embed_class": model.pos_embed is not None and model.pos_embed.shape[1] == model.num_patches,
        "global_pool": model.global_pool,
        "pool_include_prefix": bool(model.pool_include_prefix),
        "layers": {name: _kind(part) for name, part in layers.items() if isinstance(part, nn.Module)},
    }
    told["layers"] = {name: kind for name, kind in told["layers"].items() if kind != "Identity"}
    if block is not None:
        told |= {"num_heads": block.attn.num_heads, "residual_divisor": float(block.residual_divisor)}
    if model.patch_share is not None:
        told["patch_share"] = model.patch_share
    return told | (model.trained_on.to_dict() if model.trained_on is not None else {})


def _kind(module: nn.Module) -> str:
    """The class of a module, with what it computes by besides its parameters."""
    options = [f"{name}={getattr(module, name)}" for name in ("eps", "approximate") if hasattr(module, name)]
    return type(module).__name__ + (f"({', '.join(options)})" if options else "")


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], *, ignore_head: bool = False) -> list[str]:
    """In what another model would compute something else with the same tensors, as `num_heads 4, not 3`.

    What one of them does not tell is not compared. Image sizes are: not of how many pixels, but whether the same number
    of patches lies in the same rows. With `ignore_head` all that follows the blocks is left out, and the classes.
    """
    found = []
    heads = () if not ignore_head else ("global_pool", "pool_include_prefix", "patch_share")
    for name in (
        "num_heads",
        "residual_divisor",
        "no_embed_class",
        "global_pool",
        "pool_include_prefix",
        "patch_share",
    ):
        if name in theirs and name in ours and name not in heads and theirs[name] != ours[name]:
            found.append(f"{name} {theirs[name]}, not {ours[name]}")
    # A bias shows in tables; without them it is zero.
    if "rope" in (theirs.get("rel_pos"), ours.get("rel_pos")) and theirs.get("rel_pos", "") != ours.get("rel_pos"):
        found.append(f"rel_pos {theirs.get('rel_pos', 'unknown')}, not {ours.get('rel_pos')}")
    their_layers, our_layers = theirs.get("layers", {}), ours.get("layers", {})
    for name in their_layers.keys() & our_layers.keys():
        if their_layers[name] != our_layers[name] and not (ignore_head and name in ("norm", "fc_norm")):
            found.append(f"{name} {their_layers[name]}, not {our_layers[name]}")
    return sorted(found)


def other_classes(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """How the classes of two models differ by name; None if they do not, or one does not tell."""
    one, other = theirs.get("classes"), ours.get("classes")
    if one is None or other is None or one == other:
        return None
    if sorted(one) == sorted(other):
        return "the same ones in another order"
    place = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        return f"{len(one)}, not {len(other)}"
    return f"{one[place]!r} where the model has {other[place]!r}"


def grid_of(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the patch grid that settings tell of."""
    if "img_size" not in settings or "patch_size" not in settings:
        return None
    rows, columns = (size // part for size, part in zip(settings["img_size"], settings["patch_size"], strict=True))
    return rows, columns


def encode(settings: Json) -> Tensor:
    """Settings as a tensor of bytes, which every format of weights can hold."""
    return torch.tensor(list(to_text(settings).encode()), dtype=torch.uint8, device="cpu")


def to_text(settings: Json) -> str:
    return json.dumps({"format": _FORMAT} | settings, ensure_ascii=False)


def decode(carried: Any) -> Json:
    """What `encode` or `to_text` made, or the same as a dictionary.

    Raises:
        ValueError: it is nothing of the kind, or from a later version of pss.
    """
    if isinstance(carried, Tensor):
        if carried.dtype != torch.uint8 or carried.ndim != 1 or carried.numel() > _MOST_BYTES:
            raise ValueError("the settings beside the weights (pss_settings) are damaged; restore the file")
        carried = bytes(carried.cpu().numpy())
    if isinstance(carried, str | bytes):
        try:
            carried = json.loads(carried)
        except (ValueError, RecursionError):
            raise ValueError("the settings beside the weights (pss_settings) are damaged; restore the file") from None
    if not isinstance(carried, Mapping):
        raise ValueError(
            f"the model's settings beside the weights are a {type(carried).__name__}, not names and values"
        )
    settings = dict(carried)
    version = settings.pop("format", _FORMAT)
    if not _is_count(version) or version > _FORMAT:
        raise ValueError(
            f"the model's settings beside the weights have format {version!r} and this pss reads {_FORMAT}; update pss"
        )
    for name in ("img_size", "patch_size"):
        if _is_count(settings.get(name)):
            settings[name] = [settings[name]] * 2
    settings |= {name: list(value) for name, value in settings.items() if isinstance(value, tuple)}
    for name, value in settings.items():
        if name not in _CHECKS:
            raise ValueError(
                f"the model's settings beside the weights have {str(name)[:40]!r}, which this pss does not know; it "
                f"knows {', '.join(_CHECKS)}"
            )
        if not _CHECKS[name](value):
            raise ValueError(f"the model's settings beside the weights have {name} {str(value)[:60]!r}; correct it")
    return settings


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1 << 20


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))


def _is_triple(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))
