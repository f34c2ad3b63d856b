"""Weights as they lie in files: read without running pickled code, freed of wrappers and prefixes, with their settings.

The state dict may lie under `model`, `state_dict`, `module` or `method`, an average of weights under `state_dict_ema`,
`model_ema` or `ema`; names may begin with `module.`, `model.`, `encoder.`, `backbone.` or `_orig_mod.`.

What the tensors do not show (`pss.models.settings`) is looked for in the state dict itself, where pss puts it, in the
metadata of a safetensors file, under `pss` beside the weights, and in the configuration of a run's checkpoint.
"""

from __future__ import annotations

import argparse
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pss.models import grids, settings
from pss.models.create import create_model, settings_of_name
from pss.models.grids import SEPARABLE_TABLE, TABLE
from pss.models.vit import VisionTransformer
from pss.plugins import is_plugin

ANCHOR = "patch_embed.proj.weight"
"""Every ViT has it, so it tells what precedes the names."""
_BEFORE_ANCHOR = "patch_embed.conv1.weight"
"""Where there is one, it is LV-ViT's, which halves the sides of an image before the projection."""
PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")
PSS = "pss"
"""Where the settings lie beside the weights, in a dictionary or in safetensors' metadata."""

_PLAIN = ("model", "state_dict", "module", "method")
_AVERAGED = ("model_ema", "state_dict_ema", "ema")
_PREFIXES = {"module", "model", "encoder", "backbone", "_orig_mod"}
_MOST_WRAPPERS = 8
_NORMS = {"norm", "fc_norm"}
_WORDS = {
    "num_heads": "how many heads its width is divided into",
    "img_size": "how many rows its patches lie in",
}


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
    """The file's model has other parts, or parts of another shape, or computes something else with them."""

    other_bias: str = "create it with rel_pos={kind!r}"
    """The file has position biases, and the model has none of that kind."""

    other_images: str = "set data.mean={mean} and data.std={std}"
    """The file's model was trained on images that were normalised in another way."""


@dataclass(frozen=True)
class Weights:
    """A ViT's tensors and what is known of the model that they are of."""

    source: str
    tensors: dict[str, Tensor]
    settings: settings.Json | None
    """As `pss.models.settings.describe` returns them; None where the file tells none."""
    outside: list[str] = field(default_factory=list)
    """Names of the file's tensors that are not the ViT's."""
    averaged: bool = False
    """Whether they are a moving average."""
    has_average: bool = False
    """Whether the file holds a moving average beside them."""


def found_at(path: str | Path) -> Literal["file", "folder"] | None:
    """What there is at a path; None, and no error, also for what can be no path, such as a name that is too long."""
    try:
        return "folder" if Path(path).is_dir() else "file" if Path(path).is_file() else None
    except (OSError, ValueError):
        return None


def read(path: Path, *, ema: bool = False, no_file: str = "name a file that exists") -> Weights:
    """The weights in a file, or the average of them.

    Raises:
        ValueError: it is not there (with the remedy `no_file`), cannot be read as plain weights, or holds no ViT.
    """
    if found_at(path) != "file":
        raise ValueError(f"there is no weights file {str(path)[:200]}; {no_file}")
    if path.suffix in (".pt2", ".onnx"):
        raise ValueError(
            f"{path} is for programs without pss, which does not read it back; name the run, checkpoint or published "
            "folder that it was made of"
        )
    beside: Any = None
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                beside = (file.metadata() or {}).get(PSS)
            content: Any = safetensors.torch.load_file(path)
        else:
            # Training scripts leave their settings in the file; these two types hold plain values and are not needed.
            with torch.serialization.safe_globals([argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}); give it to whoever runs this") from None
    except Exception as error:  # bytes that are no pickle fail the reader in any way they like
        raise ValueError(
            f"{path} cannot be read as plain weights: it is damaged, or holds Python objects other than tensors "
            "(then save its state dict alone, as safetensors)"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not named tensors; save a state dict")
    return unwrap(content, str(path), ema=ema, beside=beside)


def unwrap(content: Mapping[Any, Any], source: str, *, ema: bool = False, beside: Any = None) -> Weights:
    """The weights in what a file holds; `beside` are settings that it has in another place. Raises `ValueError`."""
    averages = [key for key in _AVERAGED if isinstance(content.get(key), Mapping)]
    if ema and not averages:
        raise ValueError(f"{source} holds one set of weights and no average of them; leave out --ema, or #ema")
    state: Mapping[Any, Any] = content[averages[0]] if ema else content
    inner = [key for key in _PLAIN if isinstance(content.get(key), Mapping)]
    averaged = ema or (not inner and bool(averages))
    for _ in range(_MOST_WRAPPERS):
        wrapper = next((key for key in (*_PLAIN, *_AVERAGED) if isinstance(state.get(key), Mapping)), None)
        if wrapper is None:
            break
        state = state[wrapper]
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    anchors = [name.removesuffix(ANCHOR) for name in tensors if name.endswith(ANCHOR)]
    prefix = next((prefix for prefix in anchors if _PREFIXES.issuperset(prefix.split(".")[:-1])), None)
    if prefix is None:
        raise ValueError(f"{source} holds no Vision Transformer: {ANCHOR} is not among its {len(tensors)} tensors")
    inside = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    told = _settings_of_run(content)
    try:
        for carried in (beside, content.get(PSS), inside.pop(settings.KEY, None)):
            told |= {} if carried is None else settings.decode(carried)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    outside = [name for name in tensors if not name.startswith(prefix)]
    return Weights(source, inside, told or None, outside, averaged, bool(averages) and not averaged)


def _settings_of_run(content: Mapping[Any, Any]) -> settings.Json:
    """What the checkpoint of a run tells of its model beside the tensors, also one written by an earlier version."""
    config, told = content.get("config"), settings.Json()
    if not isinstance(config, Mapping) or not isinstance(config.get("model"), Mapping):
        return told
    data = config.get("data")
    data = dict(data) if isinstance(data, Mapping) else {}
    model = {key: value for key, value in config["model"].items() if value is not None}
    name = model.pop("name", "")
    for key in ("weights", "own_head"):
        model.pop(key, None)
    if isinstance(name, str) and not is_plugin(name):
        try:
            with torch.device("meta"):
                told = settings.describe(create_model(name, num_classes=1, img_size=data.get("img_size"), **model))
        except (ValueError, TypeError):  # of a later version, say; then it tells nothing
            told = settings.Json()
    told |= {key: list(data[key]) for key in ("mean", "std") if isinstance(data.get(key), list | tuple)}
    if isinstance(content.get("classes"), list):
        told["classes"] = content["classes"]
    return told


def settings_told(weights: Weights, remedies: Remedies) -> dict[str, Any]:
    """See `pss.models.weights.settings_of`."""
    found, carried = weights.tensors, weights.settings or {}
    for name, num_dimensions in {
        ANCHOR: 4,
        "head.weight": 2,
        **dict.fromkeys(("pos_embed", *PREFIX_TOKENS), 3),
    }.items():
        if name in found and found[name].ndim != num_dimensions:
            raise ValueError(f"{weights.source} has {name} of shape {tuple(found[name].shape)}; {remedies.other_model}")
    told: dict[str, Any] = {
        "num_classes": found["head.weight"].shape[0] if "head.weight" in found else 0,
        "pos_embed": "learn" if "pos_embed" in found else "none",
        "init_values": 1.0 if any(re.search(r"\.(gamma_1|ls1\.gamma)$", name) for name in found) else None,
    }
    height, width = patch_size_of(found)
    possible = grids.candidates(found, None)
    if height == width:
        square = [grid for grid in possible if grid[0] == grid[1]]
        told |= {"patch_size": width} | ({"img_size": square[0][0] * width} if square else {})
    if any(name.endswith(SEPARABLE_TABLE) for name in found):
        told["rel_pos"] = "separable"
    elif any(name.endswith(TABLE) for name in found):
        told["rel_pos"] = "bias"
    if any(name.endswith("attn.q_bias") for name in found):
        told["qkv_bias"] = "qv"
    if _NORMS & {name.split(".")[0] for name in found} == {"fc_norm"}:
        told["global_pool"] = "avg"
    for name in ("num_heads", "global_pool", "pool_include_prefix", "no_embed_class"):
        if name in carried and carried[name] is not False:
            told[name] = carried[name]
    if carried.get("rel_pos") == "rope":
        told["rel_pos"] = "rope"
    if _BEFORE_ANCHOR in found:  # LV-ViT has these in one way only
        del told["pos_embed"], told["init_values"]
    for name in ("img_size", "patch_size"):
        if name in carried:
            one, other = carried[name]
            told[name] = one if one == other else (one, other)
    return told


def settings_assumed(weights: Weights, found: Mapping[str, Tensor], model: VisionTransformer) -> settings.Json:
    """The settings of a file's model, under the names `found` that its tensors have in `model`.

    What it does not tell is what the model of that name has in timm, as far as that is the same model: heads are known
    where the width is, the grid where the number of patches is.

    Raises:
        ValueError: it does not tell which model it is of.
    """
    carried, unknown = dict(weights.settings or {}), []
    named = settings_of_name(model.name) or {}
    same_width = named.pop("embed_dim", None) == model.embed_dim
    usual_size = named.pop("img_size", None)
    theirs = named | {"patch_size": list(patch_size_of(found))} | carried
    if "patch_share" not in carried:  # whether patches count is for training to say
        theirs.pop("patch_share", None)
    if "global_pool" not in carried and ("fc_norm.weight" in found) != ("fc_norm" in named.get("layers", {})):
        theirs["global_pool"] = "avg" if "fc_norm.weight" in found else "token"
    if "num_heads" not in carried and not same_width:
        unknown.append("num_heads")
    if "img_size" not in carried and any(name == "pos_embed" or name.endswith(TABLE) for name in found):
        num_placed = 0 if theirs.get("no_embed_class") else model.num_prefix_tokens
        possible = grids.candidates(found, num_placed)
        usual = None if usual_size is None else settings.grid_of(theirs | {"img_size": usual_size})
        square = _BEFORE_ANCHOR in found and len(possible) == 1  # LV-ViT's files are for square images
        if usual in possible or square or grids.is_sure(found, possible):
            grid = usual if usual is not None and usual in possible else possible[0]
            theirs["img_size"] = [side * part for side, part in zip(grid, theirs["patch_size"], strict=True)]
        else:
            unknown.append("img_size")
    if unknown:
        ours = settings.describe(model)
        example = ", ".join(f"'{name}': {ours.get(name)}" for name in unknown)
        raise ValueError(
            f"{weights.source} does not tell {' and '.join(map(_WORDS.__getitem__, unknown))}; save it again with that "
            f"beside the weights: torch.save({{'model': WEIGHTS, 'pss': {{{example}}}}}, FILE), if that is what it has"
        )
    return theirs


def patch_size_of(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Height and width of a patch in pixels, by the convolutions that images go through."""
    height, width = tensors[ANCHOR].shape[2:]
    return (2 * height, 2 * width) if _BEFORE_ANCHOR in tensors else (height, width)


def check_values(name: str, value: Tensor, source: str) -> None:
    """Raise `ValueError` for a tensor that holds no weights, nor counts batches."""
    if name.endswith(".num_batches_tracked") and value.dtype == torch.int64 and value.layout == torch.strided:
        return
    if value.layout != torch.strided or not value.is_floating_point() or value.is_quantized or value.is_meta:
        raise ValueError(f"{source} has {name} as {value.dtype}, {value.layout}; save plain floating-point tensors")
    if not torch.isfinite(value.float()).all():
        raise ValueError(f"{source} has values in {name} that are not finite; name weights from before they diverged")
