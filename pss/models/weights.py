"""Load pretrained weights, whoever saved them, into a `VisionTransformer`.

Files are safetensors or what `torch.save` wrote (`pss.models.files`). Names understood:

* timm and DeiT: `patch_embed`, `cls_token`, `dist_token`, `reg_token`, `pos_embed`, `blocks.0.attn.qkv`,
  `blocks.0.ls1.gamma`, `norm` or `fc_norm`, `head`, `head_dist`. These are our own names too.
* BEiT: `blocks.0.attn.q_bias` and `v_bias` instead of `qkv.bias`, `blocks.0.gamma_1` and `gamma_2` for the layer
  scale, `blocks.0.attn.relative_position_bias_table`, and `relative_position_index` buffers, which are not needed.
* LV-ViT: as timm, with `patch_embed.conv1` to `conv3`, `bn1` to `bn3` and `aux_head`.
* SimMIM: as BEiT, with `encoder.` before every name of a pretrained model and one `rel_pos_bias` table for all
  layers, which every layer gets a copy of.

What names and shapes do not show is compared too. Where a file does not tell it, it is what the model of that name has
in timm; a file whose model must be another one, by its width or its number of patches, is refused until it is told.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor

from pss.models import grids, settings
from pss.models.files import Remedies, Weights, check_values, found_at, read, settings_assumed, settings_told, unwrap
from pss.models.grids import SEPARABLE_TABLE, TABLE
from pss.models.settings import Json, TrainedOn
from pss.models.vit import VisionTransformer
from pss.runs import checkpoint

__all__ = ["Remedies", "Report", "load_weights", "settings_of", "start_from"]

_BACKBONE = {"patch_embed", "cls_token", "dist_token", "reg_token", "pos_embed", "norm_pre", "blocks"}
_HEADS = {"head", "head_dist"}
_NORMS = {"norm", "fc_norm"}

_SHARED_TABLE = f"rel_pos_bias.{TABLE}"


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

    notes: tuple[str, ...] = ()
    """What else was adapted, or is not told by the file and was taken to be as it is here."""

    @property
    def adapted(self) -> bool:
        """Whether the model is anything else than the file's."""
        return bool(self.resized or self.missing or self.unexpected or self.notes)

    def __str__(self) -> str:
        parts = [f"loaded {len(self.loaded)} of {len(self.loaded) + len(self.missing)} tensors"]
        for what, names in (
            ("resized", self.resized),
            ("not in the file", self.missing),
            ("not used", self.unexpected),
        ):
            if names:
                parts.append(f"{what}: {_first(names)}")
        return "; ".join((*parts, *self.notes))


def start_from(
    model: VisionTransformer, where: str, *, ignore_head: bool = False, remedies: Remedies = Remedies()
) -> Report:
    """Copy the weights that `where` names into `model`: a file, the folder of a pss-train run or one that pss-eval
    pushed, or timm:NAME.

    Behind a file or a folder, `#ema` asks for the moving average of the weights, `#best` for the checkpoint of a run's
    best validation, and `#best#ema` for both.

    Raises:
        ValueError: as `load_weights`, with `remedies` at the end; a folder without a checkpoint; a name that timm has
            no weights for.
    """
    if where.startswith("timm:"):
        return fill(model, _weights_of_timm(where.removeprefix("timm:")), ignore_head, remedies)
    name, ema, best = _split(where)
    path = Path(name)
    if found_at(path / "model.safetensors") == "file":
        path = path / "model.safetensors"
    if found_at(path) != "folder":
        if best:
            raise ValueError(f"{path} is one file; #best is for the folder of a run, leave it out")
        return fill(model, read(path, ema=ema, no_file=remedies.no_file), ignore_head, remedies)
    if best:
        noted = checkpoint.best(path / "checkpoints")
        state = None if noted is None else checkpoint.load(noted)
    else:
        newest = checkpoint.load_latest(path / "checkpoints")
        state = None if newest is None else newest[0]
    if state is None:
        which = "validated checkpoint" if best else "checkpoint"
        raise ValueError(f"{path} holds no {which}; name a weights file, or the --output of a pss-train run")
    return fill(model, unwrap(state, str(path), ema=ema), ignore_head, remedies)


def _split(where: str) -> tuple[str, bool, bool]:
    """What `where` names without `#ema` and `#best`, and whether they are there."""
    asked: set[str] = set()
    while found_at(where) is None and where.endswith(("#ema", "#best")):
        where, _, last = where.rpartition("#")
        asked.add(last)
    return where, "ema" in asked, "best" in asked


def _weights_of_timm(name: str) -> Weights:
    try:
        pretrained = timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever the hub's client or timm raise
        reason = str(error).split("\n")[0]
        raise ValueError(f"timm gives no pretrained weights for {name} ({reason}); name a weights file") from error
    weights = unwrap(pretrained.state_dict(), f"timm:{name}")
    known = getattr(pretrained, "pretrained_cfg", None) or {}
    told = {key: list(known[key]) for key in ("mean", "std") if known.get(key) is not None}
    if isinstance(pretrained, TimmVisionTransformer):
        told |= settings.describe(VisionTransformer(pretrained))  # of what was built, whatever its name says
    return replace(weights, settings=told or None)


def load_weights(
    model: VisionTransformer,
    path: str | Path,
    *,
    ignore_head: bool = False,
    ema: bool = False,
    told: Mapping[str, Any] | None = None,
) -> Report:
    """Copy the weights of a file into `model`, converting names and patch grids on the way.

    A relative position bias that the file lacks stays zero, which changes nothing. Everything is checked before the
    model is touched.

    Args:
        model: Where to; the values are cast to its parameters' dtype.
        path: A .safetensors file, or one written by `torch.save`.
        ignore_head: Leave the classifier as it is, and the norm before it too if the file has none. For fine-tuning
            on other classes, or from an encoder that was pretrained without labels.
        ema: Take the moving average of the weights that the file holds.
        told: What the file does not tell of its model, such as `{"num_heads": 3, "img_size": (8, 32)}`.

    Raises:
        ValueError: the file cannot be read as plain weights, or the model would not be what the file describes: parts
            missing, parts left over, shapes that differ by more than the patch grid, another number of classes or
            other ones, something else to compute; or it does not tell which model it is of.
    """
    weights = read(Path(path), ema=ema)
    if told:
        weights = replace(weights, settings=settings.decode(dict(told)) | (weights.settings or {}))
    return fill(model, weights, ignore_head, Remedies())


def settings_of(path: str | Path, *, remedies: Remedies = Remedies()) -> dict[str, Any]:
    """What a weights file tells of its model: keyword arguments, to be given to `create_model` after the model's name.

    The name says the rest: width and depth above all. Told are:

    * `num_classes`, 0 if there is no classifier;
    * `patch_size` in pixels, and `img_size` where the patches of a position embedding or a bias table form a square;
    * `global_pool`: `avg` where there is an `fc_norm` and no `norm`, as in BEiT and timm;
    * `rel_pos`: `bias` or `separable` where there are tables;
    * `qkv_bias`: `qv` where there is a `q_bias`; a joint bias is what most models have anyway;
    * `pos_embed`, and `init_values` for layer scale, whose values are in the file;
    * in files of pss also `num_heads`, rotary embedding, any pooling, and images that are not square.

    Raises:
        ValueError: the file cannot be read as plain weights, or holds no Vision Transformer of the usual shapes.
    """
    return settings_told(read(Path(path), no_file=remedies.no_file), remedies)


def fill(
    model: VisionTransformer, weights: Weights, ignore_head: bool = False, remedies: Remedies = Remedies()
) -> Report:
    """`load_weights` with weights that have been read; `remedies` are those of whoever reads an error."""
    source, found, ours = weights.source, dict(weights.tensors), settings.describe(model)
    heads = _HEADS | set(model.own_heads)
    unused_head = sorted(name for name in found if ignore_head and _part(name) in heads)
    for name in unused_head:
        del found[name]
    found = _our_names(found, model)
    own = {name: value for name, value in model.state_dict().items() if name != settings.KEY}

    missing = [name for name in own if name not in found]
    unexpected = [name for name in found if name not in own]
    resizable = {name for name in own if name == "pos_embed" or name.endswith(TABLE)}
    for name, value in found.items():
        if name not in own:
            continue
        check_values(name, value, source)
        may_differ = name in resizable and value.shape[-1:] == own[name].shape[-1:] and value.ndim == own[name].ndim
        if value.shape != own[name].shape and not may_differ:
            raise ValueError(_other_shape(name, value, own[name], source, heads, remedies))
    _check_parts(missing, unexpected, source, ignore_head, heads, remedies)

    theirs = settings_assumed(weights, found, model)
    _compare(theirs, ours, weights, ignore_head, remedies)
    resized, notes = _resize(found, own, theirs, model, weights, remedies), []
    if resized:
        old, new = settings.grid_of(theirs) or (0, 0), model.grid_size
        notes.append(f"from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches")
    if weights.has_average:
        notes.append(f"there is a moving average too: {source}#ema")
    if weights.averaged:
        notes.append("the moving average of the weights")
    here = {} if model.trained_on is None else model.trained_on.to_dict()
    if (
        not ignore_head
        and None not in (crops := (theirs.get("crop_pct"), ours.get("crop_pct")))
        and crops[0] != crops[1]
    ):
        notes.append(f"evaluated with data.crop_pct={crops[0]:g}, here with {crops[1]:g}")
    words = {"mean": "how images were normalised"} | ({} if ignore_head else {"classes": "what its classes are called"})
    if untold := [words[name] for name in words if name in here and name not in theirs]:
        notes.append(f"the file does not tell {' and '.join(untold)}: taken to be as here")

    model.load_state_dict({name: value for name, value in found.items() if name in own}, strict=False)
    if model.trained_on is None:
        known = {key: value for key, value in theirs.items() if key != "classes" or not ignore_head}
        model.trained_on = None if TrainedOn.of(known) == TrainedOn() else TrainedOn.of(known)
    return Report(
        loaded=tuple(name for name in own if name in found),
        resized=tuple(resized),
        missing=tuple(missing),
        unexpected=(*unexpected, *unused_head, *weights.outside),
        notes=tuple(notes),
    )


def _check_parts(
    missing: list[str], unexpected: list[str], source: str, ignore_head: bool, heads: set[str], remedies: Remedies
) -> None:
    """Raise `ValueError` where the model, or the file, has parts that the other one has not."""
    optional = _NORMS | heads if ignore_head else set()
    lacking = [name for name in missing if not name.endswith(TABLE) and _part(name) not in optional]
    surplus = [name for name in unexpected if _part(name) in (_BACKBONE if ignore_head else _BACKBONE | _NORMS)]
    if lacking:
        parts = {_part(name) for name in lacking}
        # A norm in another place is that of another readout, which its classifier was trained with.
        other_model = parts & _BACKBONE or (parts <= _NORMS and _NORMS & {_part(name) for name in surplus})
        remedy = remedies.other_model if other_model else remedies.other_head
        raise ValueError(f"{source} lacks {_first(lacking)}; {remedy}")
    if surplus:
        remedy = remedies.other_model
        if all(name.endswith(TABLE) for name in surplus):
            remedy = remedies.other_bias.format(kind="separable" if surplus[0].endswith(SEPARABLE_TABLE) else "bias")
        raise ValueError(f"{source} has {_first(surplus)}, which this model does not; {remedy}")


def _compare(theirs: Json, ours: Json, weights: Weights, ignore_head: bool, remedies: Remedies) -> None:
    """Raise `ValueError` where the file's model computes something else, or was trained on something else."""
    if found := settings.differences(theirs, ours, ignore_head=ignore_head):
        raise ValueError(f"{weights.source} is of a model with {'; '.join(found)}; {remedies.other_model}")
    if not ignore_head and (classes := settings.other_classes(theirs, ours)) is not None:
        raise ValueError(f"{weights.source} classifies into other classes: {classes}; {remedies.other_head}")
    for name in ("mean", "std"):
        if name in theirs and name in ours and any(
            abs(a - b) > 1e-6 for a, b in zip(theirs[name], ours[name], strict=True)
        ):  # fmt: skip
            their, our = (",".join(f"{value:g}" for value in one[name]) for one in (theirs, ours))
            remedy = remedies.other_images.format(
                **{key: ",".join(f"{value:g}" for value in theirs.get(key) or ours[key]) for key in ("mean", "std")}
            )
            raise ValueError(
                f"{weights.source} was trained on images normalised with data.{name}={their}, and here it is {our}; "
                f"{remedy}"
            )


def _resize(
    found: dict[str, Tensor], own: Mapping[str, Tensor], theirs: Json, model: VisionTransformer, weights: Weights,
    remedies: Remedies,
) -> list[str]:  # fmt: skip
    """Interpolate, in `found`, what lies on the file's patch grid to the model's; returns the names of these."""
    grid, new = settings.grid_of(theirs), model.grid_size
    resized = []
    for name in [name for name in found if name in own and (name == "pos_embed" or name.endswith(TABLE))]:
        if found[name].shape == own[name].shape and grid in (None, new):
            continue
        num_placed = own[name].shape[1] - model.num_patches if name == "pos_embed" else 0
        value = None if grid is None else grids.resize(name, found[name], grid, new, num_placed)
        if value is None and found[name].shape == own[name].shape and grid is not None:
            raise ValueError(
                f"{weights.source} tells of {grid[0]} x {grid[1]} patches, and its {name} is not of so many; restore it"
            )
        if value is None:
            raise ValueError(_other_shape(name, found[name], own[name], weights.source, set(), remedies))
        found[name] = value
        resized.append(name)
    return resized


def _other_shape(name: str, value: Tensor, target: Tensor, source: str, heads: set[str], remedies: Remedies) -> str:
    if _part(name) in heads and value.ndim:
        return (
            f"{source} classifies into {value.shape[0]} classes, the model into {target.shape[0]}; "
            f"{remedies.other_head}"
        )
    return (
        f"{source} has {name} of shape {tuple(value.shape)}, the model needs {tuple(target.shape)}; "
        f"{remedies.other_model}"
    )


def _our_names(found: dict[str, Tensor], model: VisionTransformer) -> dict[str, Tensor]:
    """BEiT's and SimMIM's names turned into ours, and the bias of q, k and v into the form the model has."""
    ours = {
        re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name): value
        for name, value in found.items()
        if not name.endswith("relative_position_index")
    }
    if _SHARED_TABLE in ours:
        table = ours.pop(_SHARED_TABLE)
        ours |= {f"blocks.{number}.attn.{TABLE}": table for number in range(len(model.blocks))}

    own = model.state_dict()
    for attention in [name.removesuffix("qkv.weight") for name in ours if name.endswith("attn.qkv.weight")]:
        joint, q, v = (attention + suffix for suffix in ("qkv.bias", "q_bias", "v_bias"))
        if q in own and joint in ours:
            ours[q], _, ours[v] = ours.pop(joint).chunk(3)  # a bias on the keys cancels in the softmax
        elif joint in own and q in ours and v in ours:
            q_bias = ours.pop(q)
            ours[joint] = torch.cat((q_bias, torch.zeros_like(q_bias), ours.pop(v)))
    return ours


def _part(name: str) -> str:
    return name.split(".")[0]


def _first(names: list[str] | tuple[str, ...]) -> str:
    """The first few of many names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
