"""What can be held against settings only where a run starts: its model, its steps, its folders and its machine."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipelines.storage.manifest import MapsEntry
from pss import overrides
from pss.config import Config, ModelConfig, unread_in
from pss.methods.patches import TokensSettings
from pss.models.create import create_model
from pss.plugins import is_plugin
from pss.runs.lock import BUDGET, CHECKPOINTS, CONFIG, CURVES, LOCK, SUMMARY
from pss.runs.log import AUGMENTED, BOARD, LOG

_OF_A_RUN = {CONFIG, LOG, SUMMARY, BUDGET, CURVES, AUGMENTED, CHECKPOINTS, BOARD, LOCK}
_SCHEDULERS = (".out", ".err", ".log")  # what a job's output may be written to, beside the run's own files


def check_shapes(config: Config) -> None:
    """Raise `ValueError` where images are no whole patches, or heads cannot share the width.

    A field that is left at None has what the named model has. A backbone of one's own knows its shapes itself.
    """
    model, data = config.model, config.data
    if is_plugin(model.name):
        return
    with torch.device("meta"):
        usual: Any = create_model(model.name, depth=1)
    patch = model.patch_size or usual.patch_embed.patch_size[0]
    width = model.embed_dim or usual.embed_dim
    heads = model.num_heads or usual.blocks[0].attn.num_heads
    sizes = {data.img_size: "data.img_size"}
    if data.progressive.start_size is not None:
        names = {data.train_size(epoch): "data.progressive, which makes" for epoch in range(config.train.epochs)}
        sizes = names | {data.progressive.start_size: "data.progressive.start_size"} | sizes
    for size, name in sizes.items():
        if size % patch:
            near = max(1, size // patch) * patch
            remedy = f"set {name}={near}" if name in ("data.img_size", "data.progressive.start_size") else ""
            raise ValueError(
                f"{name} {'images of' if not remedy else 'is'} {size} pixels, which are no whole patches of {patch} "
                f"pixels; {remedy or f'set data.progressive.multiple={patch}'}, or another model.patch_size"
            )
    if width % heads:
        raise ValueError(
            f"model.embed_dim is {width}, which {heads} heads cannot share evenly (model.num_heads); set "
            f"model.embed_dim={max(1, round(width / heads)) * heads}, or another model.num_heads"
        )
    if model.rel_pos == "rope" and width // heads % 4:
        fitting = 4 * heads * max(1, round(width / heads / 4))
        raise ValueError(
            f"model.rel_pos is rope, which takes heads of a multiple of 4 wide, and model.embed_dim={width} gives "
            f"each of {heads} heads {width // heads}; set model.embed_dim={fitting}"
        )

    try:
        with torch.device("meta"):
            create_model(model.name, img_size=data.img_size, **(model.overrides() | {"depth": 1}))
    except ValueError as error:
        chosen = {name: value for name, value in model.overrides().items() if value != getattr(ModelConfig(), name)}
        told = ", ".join(f"model.{name}={value}" for name, value in chosen.items())
        raise ValueError(f"{str(error).rstrip(': ')}; they are model.name={model.name}, {told}") from None


def check_steps(config: Config, steps_per_epoch: int) -> None:
    """Raise `ValueError` for lengths that are less than a step, or more than the run."""
    for name in ("warmup_epochs", "cooldown_epochs"):
        epochs = getattr(config.optim, name)
        if epochs and not round(epochs * steps_per_epoch):
            raise ValueError(
                f"optim.{name} is {epochs:g}, which is not one of the {steps_per_epoch:,} steps of an epoch; set it to "
                "0, or to more"
            )
    for section in config.own:
        section.check_steps(config, steps_per_epoch)


def check_maps(config: Config, maps: Mapping[str, MapsEntry]) -> None:
    """Raise `ValueError` where a data set's own label maps are of another part of the images than the run takes them to
    be; `maps` is what its manifest says of them, by split."""
    if config.data.label_maps != "auto" or (entry := maps.get("train")) is None:
        return
    for section in config.own:
        if isinstance(section, TokensSettings) and entry.covers == "square" and section.label_geometry == "whole":
            raise ValueError(
                f"{entry.file} holds label maps of the images' central squares, and tokens.label_geometry=whole takes "
                "them for maps of whole images; set tokens.label_geometry=reference, or make them again without "
                "--label-square"
            )


def check_folders(data: Path, output: Path) -> None:
    """Raise `ValueError` where a run's folder would be that of other things."""
    folder, images = output.resolve(), data.resolve()
    if folder == Path.cwd().resolve():
        raise ValueError(f"--output {output} is the current folder; name a new one, for example --output runs/first")
    if folder == images or images in folder.parents:
        where = "the data set itself" if folder == images else f"inside the data set {data}"
        raise ValueError(f"--output {output} is {where}; name a folder elsewhere")
    if not folder.is_dir():
        return
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if not name.startswith(".") and not name.endswith(_SCHEDULERS)]
    if others and not set(names) & _OF_A_RUN:
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise ValueError(f"--output {output} is no run and holds other things ({shown}); name a new folder")


def check_machine(config: Config, settings: Sequence[str], *, device: str, backends: Collection[str]) -> None:
    """Raise `SettingError` for one of the `section.key=value` settings that nothing reads on this device.

    Args:
        config: Of the run.
        settings: What was asked for beside the recipe, which may bring along what other machines read.
        device: The kind of device.
        backends: Of the loaders.
    """
    given = {overrides.split(setting)[0] for setting in settings}
    for found in unread_in(config, device=device, backends=frozenset(backends)):
        if found.full_name in given and found.asks:
            raise found.error()
