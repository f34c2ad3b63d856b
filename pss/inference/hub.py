"""Models in the layout of the Hugging Face Hub: `config.json`, `model.safetensors`, and a model card.

`config.json` is timm's. What needs nothing of ours (no relative positions, ordinary biases) loads with
`timm.create_model("local-dir:FOLDER")`; it is tried, logits and all, before timm is told what to build. Anything else
names an architecture `pss_…`, which timm knows once pss is imported (`pss.timm_models`). Under `pss` it says how to
build the model with ρ. Uploading the folder is the user's step, with whatever tool of the hub.

A folder that somebody else made is data: what it may ask for is a closed list, and nothing in it names another file, an
address or code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.models import is_model as timm_has
from torch import Tensor

from pipelines.base import DataConfig
from pss import timm_models
from pss.models import settings as about
from pss.models.create import create_model
from pss.models.files import PSS, check_values, found_at, read
from pss.models.interface.asked import OWN, check_setting, is_whole
from pss.models.settings import TrainedOn
from pss.models.vit import VisionTransformer
from pss.runtime import files

PREFIX = "hf-hub:"

PICTURES = ("rho.png",)
"""What the card shows, and lies beside it."""

_CONFIG, _WEIGHTS, _CARD = "config.json", "model.safetensors", "README.md"
_FORMAT = 1
_REQUIRES = "pss: import it before timm.create_model, which then knows this architecture"

_MOST_BYTES = 1 << 26
_MOST_PATCHES = 1 << 16


@dataclass(frozen=True)
class Published:
    """A model that was pushed, and what it takes to evaluate it."""

    model: VisionTransformer
    name: str
    """The name that `pss.create_model` built it by."""
    settings: dict[str, Any]
    """And the other arguments, but for the number of classes and the image size."""
    classes: list[str] | None
    data: DataConfig
    step: int

    def __post_init__(self) -> None:
        if ":" in self.name:
            raise ValueError(
                f"the model is {self.name}, code of your own, which no published folder holds; --export writes a file "
                "that needs none"
            )


def is_model(folder: Path) -> bool:
    """Whether a folder has the layout of the hub."""
    return all(found_at(folder / name) == "file" for name in (_CONFIG, _WEIGHTS))


def save(
    folder: Path, published: Published, card: str | Callable[[bool], str], more: Mapping[str, str | bytes] | None = None
) -> None:
    """Write a model and its card: a new `folder` is complete or not there.

    Args:
        folder: Where to.
        published: The model.
        card: Markdown with front matter, or what returns it when told whether timm builds the model without pss.
        more: What else lies there, by the names in `PICTURES`.

    Raises:
        OSError: it cannot be written, and what was there before still is.
    """
    model, name, settings = published.model, published.name, published.settings
    classes, data = published.classes, published.data
    if tuple(model.image_size) != (data.img_size, data.img_size):
        raise ValueError(
            f"the model takes images of {model.image_size[0]} x {model.image_size[1]} pixels and data.img_size is "
            f"{data.img_size}; a published model takes square ones of that size"
        )
    settings = {key: value for key, value in settings.items() if value is not None or key == "init_values"}
    for key, value in settings.items():
        try:
            check_setting(key, value, _CONFIG)
        except ValueError:
            raise ValueError(
                f"the model was built with {key}={value!r}, which no published folder tells; --export writes a file "
                "that needs none of it"
            ) from None
    with torch.device("meta"):
        again = create_model(name, num_classes=model.num_classes, img_size=data.img_size, **settings)
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
    found = about.differences(about.describe(model), about.describe(again))
    if found or shapes != {key: tuple(value.shape) for key, value in again.named_parameters()}:
        raise ValueError(
            f"the settings {settings} of {name} build another model{', with '.join(['', *found])}; pass "
            "those that it was built with"
        )
    plain_args = {key: value for key, value in settings.items() if key not in OWN and value is not None}
    plain_args |= {"img_size": data.img_size}
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with_timm = _timm_computes_the_same(model, name, plain_args)
    trained_on = TrainedOn.images(classes, data)
    told = about.describe(model) | trained_on.to_dict()
    # A tensor that timm has no place for, so that it does not take weights that mean something else to it.
    weights[about.KEY] = about.encode(told)
    if with_timm:
        del weights[about.KEY]
    config = {
        "architecture": name if with_timm else timm_models.PREFIX + name.split(".")[0],
        "num_classes": model.num_classes,
        "num_features": model.embed_dim,
        "model_args": plain_args if with_timm else settings | {"img_size": data.img_size},
        **({} if with_timm else {"requires": _REQUIRES}),
        "pretrained_cfg": {
            "input_size": [3, data.img_size, data.img_size],
            "fixed_input_size": True,
            "interpolation": data.interpolation,
            "crop_pct": data.crop_pct,
            "mean": list(data.mean),
            "std": list(data.std),
            "num_classes": model.num_classes,
            "first_conv": model.first_conv,
            "classifier": _classifiers(model),
            **({"label_names": list(classes)} if classes is not None else {}),
        },
        "pss": {"format": _FORMAT, "name": name, "settings": settings, "step": published.step},
    }
    text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    contents: dict[str, str | bytes] = {
        _WEIGHTS: safetensors.torch.save(weights, metadata={"format": "pt", PSS: about.to_text(told)}),
        **(more or {}),
        _CARD: card if isinstance(card, str) else card(with_timm),
        _CONFIG: text,  # last: it says what the others are
    }
    files.write_folder(folder, contents)


def _classifiers(model: VisionTransformer) -> str | list[str]:
    names = model.classifiers()
    return names[0] if len(names) == 1 else names


def check_target(folder: Path) -> None:
    """Raise `ValueError` for a folder that holds something else, which a pushed model would be mixed up with."""
    if not folder.is_dir():
        return
    for name in (_WEIGHTS, _CARD, _CONFIG, *PICTURES):
        if (folder / name).is_dir():
            raise ValueError(f"--push {folder} holds a folder {name}; name another folder")
    held = sorted(one.name for one in folder.iterdir() if not one.name.startswith("."))  # such as a clone's .git
    if held and not _is_ours(folder):
        raise ValueError(
            f"--push {folder} holds {held[0]}, and was not made by --push; name a new folder, or an empty one"
        )


def _is_ours(folder: Path) -> bool:
    try:
        return "name" in json.loads((folder / _CONFIG).read_text(encoding="utf-8"))["pss"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


@torch.inference_mode()
def _timm_computes_the_same(model: VisionTransformer, name: str, model_args: Mapping[str, Any]) -> bool:
    """Whether timm's model of that name takes the weights, and gives the same logits with them; it is tried."""
    if model.rel_pos != "none" or not timm_has(name.split(".")[0]):
        return False
    weight = next(model.parameters())
    tensors = {key: value for key, value in model.state_dict().items() if key != about.KEY}
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            plain: Any = timm.create_model(name, num_classes=model.num_classes, **model_args)
        plain.to(weight).load_state_dict(tensors)
        images = torch.randn(2, 3, *model.image_size, generator=torch.Generator().manual_seed(0)).to(weight)
        ours, theirs = model(images, sort="magnitude").float(), plain.eval()(images).float()
    except Exception:  # whatever timm raises for what it does not know
        return False
    finally:
        model.train(training)
    close = 1e-4 if weight.dtype == torch.float32 else 1e-2
    return ours.shape == theirs.shape and torch.allclose(
        ours, theirs, rtol=0, atol=close * max(1, float(ours.abs().max()))
    )


def load(source: str | Path) -> Published:
    """A model that `save` wrote: from a folder, or `hf-hub:owner/name`, which is fetched.

    Nothing else is read or asked for, whatever the folder holds.

    Raises:
        ValueError: it cannot be fetched, was not written by pss or by a later one, or is damaged.
    """
    fetched = str(source).startswith(PREFIX)
    folder = _fetch(str(source).removeprefix(PREFIX)) if fetched else Path(source)
    try:
        for name in (_CONFIG, _WEIGHTS):
            _check_within(folder, name)
        return _read(folder)
    except RecursionError:
        raise ValueError(
            f"{source} is no model that pss published ({_CONFIG} is nested too deeply); restore it"
        ) from None
    except (OSError, ValueError) as error:
        reason = str(error)  # which may repeat whatever the file holds
        reason = reason if len(reason) < 400 else f"{reason[:200]} … {reason[-100:]}"
        raise ValueError(f"{source} is no model that can be read: {reason}") from None


def _check_within(folder: Path, name: str) -> None:
    """Raise `ValueError` for a link out of the folder, but for those that the hub's own cache consists of."""
    target, home = (folder / name).resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs"
    if target.parent != home and not (home.parent.name == "snapshots" and target.parent == blobs):
        raise ValueError(f"{name} is a link to a file outside of the folder; put the file itself there")


def _read(folder: Path) -> Published:
    config = _read_config(folder / _CONFIG)
    if "pss" not in config:
        raise ValueError(f"{_CONFIG} was not written by pss; for another model name MODEL=FILE, its weights")
    own = _part(config, "pss", dict)
    version = own.get("format", _FORMAT)  # the first version had none
    if not is_whole(version, 1, _FORMAT):
        raise ValueError(f"{_CONFIG} has format {str(version)[:40]!r}, and this pss reads up to {_FORMAT}; update pss")
    name, step, known = _part(own, "name", str), _part(own, "step", int), _part(config, "pretrained_cfg", dict)
    if ":" in name:
        raise ValueError(f"{_CONFIG} names code, {name[:80]!r}, and a published folder holds none; ask for its run")
    settings = _part(own, "settings", dict)
    for key, value in settings.items():
        check_setting(key, value, _CONFIG)
    num_classes, shape = _part(config, "num_classes", int), _part(known, "input_size", list)
    if len(shape) != 3 or shape[0] != 3 or shape[1] != shape[2] or not is_whole(shape[1], 1, 1 << 14):
        raise ValueError(f"{_CONFIG} has input_size {str(shape)[:60]}; it is [3, SIDE, SIDE]")
    data = DataConfig(
        img_size=shape[1],
        interpolation=_part(known, "interpolation", str),
        crop_pct=_part(known, "crop_pct", float),
        mean=tuple(_part(known, "mean", list)),
        std=tuple(_part(known, "std", list)),
    )
    classes = known.get("label_names")
    if classes is not None and not (
        isinstance(classes, list) and len(classes) == num_classes and all(isinstance(one, str) for one in classes)
    ):
        raise ValueError(f"{_CONFIG} has label_names that are not {num_classes} names; restore it")

    weights = read(folder / _WEIGHTS)
    num_blocks = len({key.split(".")[1] for key in weights.tensors if key.startswith("blocks.")})
    if settings.get("depth", num_blocks) != num_blocks:
        raise ValueError(f"{_CONFIG} has depth {settings['depth']} and {_WEIGHTS} {num_blocks} blocks; restore them")
    with torch.device("meta"):  # nothing that the weights do not fill takes memory
        blank = create_model(name, num_classes=num_classes, img_size=data.img_size, **settings)
    if blank.num_patches > _MOST_PATCHES:
        raise ValueError(f"{_CONFIG} has images of {blank.num_patches} patches; pss takes up to {_MOST_PATCHES}")
    _check_fits(
        {key: tuple(value.shape) for key, value in blank.state_dict().items() if key != about.KEY}, weights.tensors
    )
    model = create_model(name, num_classes=num_classes, img_size=data.img_size, **settings)
    for key, value in weights.tensors.items():
        check_values(key, value, _WEIGHTS)
    told = TrainedOn.of(weights.settings or {})
    if classes is None and told.classes is not None:
        raise ValueError(f"{_CONFIG} has no label_names, and {_WEIGHTS} was made with some; restore it")
    model.trained_on = TrainedOn.images(classes, data)
    model.pretrained_cfg = model.pretrained_cfg | {"interpolation": data.interpolation}
    for key in ("mean", "std", "crop_pct"):
        theirs = getattr(told, key)
        if theirs is not None and theirs != getattr(data, key):
            raise ValueError(
                f"{_CONFIG} has {key} {getattr(data, key)} and {_WEIGHTS} was made with {theirs}; restore it"
            )
    carried = {} if weights.settings is None else {about.KEY: about.encode(weights.settings)}
    model.load_state_dict(weights.tensors | carried)
    return Published(model.eval(), name, settings, classes, data, step)


def _read_config(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{_CONFIG} is larger than {_MOST_BYTES >> 20} MiB; restore it")

    def refuse(constant: str) -> Any:
        raise ValueError(f"it holds {constant}; restore it")

    try:
        config = json.loads(path.read_bytes().decode("utf-8"), parse_constant=refuse)
    except ValueError as error:
        raise ValueError(f"{_CONFIG} is no JSON in UTF-8 ({error}); restore it") from None
    if not isinstance(config, dict):
        raise ValueError(f"{_CONFIG} was not written by pss; for another model name MODEL=FILE, its weights")
    return config


def _part(config: Mapping[str, Any], key: str, kind: Any) -> Any:
    """A value of that type. Raises `ValueError` where it is not there, or is something else."""
    value: Any = config.get(key)
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fits or isinstance(value, bool) or (kind is int and not is_whole(value, 0, 1 << 62)):
        raise ValueError(f"{_CONFIG} has {key} {str(value)[:60]!r}; restore it, or have pss-eval --push write it again")
    return value


def _check_fits(wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` where the weights are not of these names and shapes."""
    for name in sorted(wanted.keys() ^ tensors.keys()):
        where = f"lacks {name}" if name in wanted else f"has {name[:80]}, which the model does not"
        raise ValueError(f"{_WEIGHTS} {where}; it belongs to another {_CONFIG}")
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{_WEIGHTS} has {name} of shape {tuple(tensors[name].shape)} and {_CONFIG} wants {shape}; restore them"
            )


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[_CONFIG, _WEIGHTS]))
    except Exception as error:  # whatever the hub's client raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{PREFIX}{name} could not be fetched: {reason}") from None
