"""Models in the layout of the Hugging Face Hub: `config.json`, `model.safetensors`, and a model card.

`config.json` is timm's, so that what needs nothing of ours (no relative positions, ordinary biases) loads with
`timm.create_model("local-dir:FOLDER")`; under `pss` it says how to build the model with ρ. Uploading the folder is the
user's step, with whatever tool of the hub.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

from pipelines.base import DataConfig, in_words
from pss.inference.text import markdown
from pss.models.create import create_model
from pss.models.vit import VisionTransformer
from pss.runtime import files

PREFIX = "hf-hub:"

_CONFIG, _WEIGHTS, _CARD = "config.json", "model.safetensors", "README.md"
_DATA = ("img_size", "interpolation", "crop_pct", "mean", "std")


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


def is_model(folder: Path) -> bool:
    """Whether a folder has the layout of the hub."""
    return (folder / _CONFIG).is_file() and (folder / _WEIGHTS).is_file()


def save(folder: Path, published: Published, card: str) -> None:
    """Write a model and its card (Markdown with front matter): a new `folder` is complete or not there.

    Raises:
        OSError: it cannot be written, and what was there before still is.
    """
    model, name, settings = published.model, published.name, published.settings
    classes, data = published.classes, published.data
    own = ("rel_pos", "sort", "token_counts", "qkv_bias", "init")
    config = {
        "architecture": name,
        "num_classes": model.num_classes,
        "num_features": model.embed_dim,
        "model_args": {key: value for key, value in settings.items() if key not in own} | {"img_size": data.img_size},
        "pretrained_cfg": {
            "input_size": [3, data.img_size, data.img_size],
            "fixed_input_size": True,
            "interpolation": data.interpolation,
            "crop_pct": data.crop_pct,
            "mean": list(data.mean),
            "std": list(data.std),
            "num_classes": model.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            **({"label_names": list(classes)} if classes is not None else {}),
        },
        "pss": {"name": name, "settings": settings, "step": published.step},
    }
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    contents: dict[str, str | bytes] = {
        _WEIGHTS: safetensors.torch.save(weights, metadata={"format": "pt"}),
        _CARD: card,
        _CONFIG: json.dumps(config, indent=2, ensure_ascii=False) + "\n",  # last: it says what the others are
    }
    files.write_folder(folder, contents)


def check_target(folder: Path) -> None:
    """Raise `ValueError` for a folder that holds something else, which a pushed model would be mixed up with."""
    if not folder.is_dir():
        return
    for name in (_WEIGHTS, _CARD, _CONFIG):
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
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load(source: str | Path) -> Published:
    """A model that `save` wrote: from a folder, or `hf-hub:owner/name`, which is fetched.

    Raises:
        ValueError: it cannot be fetched, or was not written by pss.
    """
    folder = _fetch(str(source).removeprefix(PREFIX)) if str(source).startswith(PREFIX) else Path(source)
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        own, known = config["pss"], config["pretrained_cfg"]
        data = DataConfig(
            img_size=known["input_size"][-1],
            interpolation=known["interpolation"],
            crop_pct=known["crop_pct"],
            mean=tuple(known["mean"]),
            std=tuple(known["std"]),
        )
        settings, classes = own["settings"], known.get("label_names")
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{source} is no model that pss published ({in_words(error)}); for another one name MODEL=FILE, its weights"
        ) from None
    model = create_model(own["name"], num_classes=config["num_classes"], img_size=data.img_size, **settings)
    model.load_state_dict(safetensors.torch.load_file(folder / _WEIGHTS))
    return Published(model.eval(), own["name"], settings, classes, data, own["step"])


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[_CONFIG, _WEIGHTS]))
    except Exception as error:  # whatever the hub's client raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{PREFIX}{name} could not be fetched: {reason}") from None


def card(name: str, *, rows: Sequence[dict[str, Any]], columns: Sequence[tuple[str, Any]], architecture: str) -> str:
    """A model card that shows what the sweep found."""
    lines = [
        "---",
        "library_name: pss",
        "tags: [image-classification, vision-transformer, patch-sampling]",
        "---",
        "",
        f"# {markdown(name)}",
        "",
        f"A Vision Transformer ({markdown(architecture)}) that takes any share ρ of an image's patches at inference: "
        "fewer patches are faster, more are more accurate. Trained with a Patch Sampling Schedule (McDanel & Huynh "
        "2022).",
        "",
        "```python",
        "from pss.inference import hub",
        "",
        'model = hub.load("FOLDER or hf-hub:OWNER/NAME").model',
        "logits = model(images, rho=0.6)",
        "```",
        "",
        f"Measured on {rows[0]['num_images']:,} images, {markdown(rows[0]['device'])}, torch {rows[0]['torch']}, "
        f"batches of {rows[0]['batch_size']}; median (slowest–fastest round). GFLOPs are multiply-accumulates.",
        "",
        "| " + " | ".join(heading for heading, _ in columns) + " |",
        "|---" * len(columns) + "|",
        *("| " + " | ".join(text(row) for _, text in columns) + " |" for row in rows),
        "",
    ]
    return "\n".join(lines)
