"""What can be evaluated, read back: the folder of a run, one of its checkpoints, a published folder, a timm model."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import timm
import torch

from pipelines.base import DataConfig
from pss import methods
from pss.config import Config, ModelConfig, check_same_run
from pss.inference import hub
from pss.methods import Method
from pss.models import lvvit
from pss.models.create import check_name, create_model
from pss.models.files import found_at, read, settings_told
from pss.models.sampling import Sort
from pss.models.settings import TrainedOn
from pss.models.vit import VisionTransformer
from pss.models.weights import Remedies, fill, start_from
from pss.runs import checkpoint, records
from pss.runs.lock import CHECKPOINTS, CONFIG

# pss-eval has no options for what a model is like: that is seen from the file, or was settled in training.
_REMEDIES = Remedies(
    no_file="name one, as in NAME=FILE",
    other_head="fine-tune it with pss-train before it is evaluated",
    other_model="name the model that it belongs to, as in NAME=FILE",
    other_bias="name the model that it belongs to, as in NAME=FILE",
)


@dataclass(frozen=True)
class Run:
    """A trained method and where it came from."""

    name: str
    config: Config
    classes: list[str] | None
    """Names of the classes; None where only their number is known, of weights that pss did not train."""
    step: int
    method: Method
    folder: Path | None = None
    """Where the run keeps its log; None for weights that no run of ours is behind."""
    averaged: bool = False
    """Whether its weights are the moving average of those that were trained."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the model was built with that its configuration has no fields for."""
    notes: tuple[str, ...] = ()
    """What was adapted when it was opened, or taken to be so because nothing tells it; a sentence each, to be shown."""

    @property
    def num_classes(self) -> int:
        return self.method.model.num_classes

    def published(self) -> hub.Published:
        """What `pss.inference.hub.save` writes of it.

        Raises:
            ValueError: its method has weights of its own, beside the model's.
        """
        if type(self.method).predict is not Method.predict:
            raise ValueError(
                f"{self.name} predicts in the way of method {self.method.name}, which no published folder tells; "
                "--export writes a file that does"
            )
        if own := [name for name, _ in self.method.named_parameters() if not name.startswith("model.")]:
            raise ValueError(
                f"{self.name} has weights of method {self.method.name} beside its model ({own[0]}, …), which no "
                "published folder holds; --export writes a file with all of them"
            )
        settings = self.config.model.overrides() | self.settings
        model = self.config.model
        return hub.Published(self.method.model, model.name, settings, self.classes, self.config.data, self.step)


def open_run(
    source: str, device: torch.device, *, ema: bool = False, best: bool = False, sort: Sort | None = None
) -> Run:
    """Whatever `source` names, in evaluation mode on `device`.

    Args:
        source: The `--output` of a `pss-train` run, one checkpoint file inside it, a folder or `hf-hub:owner/name` as
            `pss.inference.hub` writes it, `timm:NAME` for a timm model with its pretrained weights, or `NAME=FILE`
            for a weights file and the model it belongs to, of which the file tells the readout, biases and more
            (`pss.models.weights.settings_of`). The last two get the patch sampling block injected.
        device: Where to.
        ema: Take the moving average of the weights instead of the weights.
        best: Of a run, take the checkpoint of the best validation instead of the newest.
        sort: Which patches to keep; what the run was trained with if None.

    Raises:
        ValueError: nothing of that kind is there, or there is no moving average, or no validation yet.
    """
    path, there = Path(source), found_at(source) is not None
    if not source.startswith(hub.PREFIX) and not hub.is_model(path) and (there or not _names_weights(source)):
        if not there:
            raise ValueError(f"{source[:200]} not found; name the --output folder of a pss-train run")
        return load_run(path, device, ema=ema, best=best, sort=sort)
    weighs_file = "=" in source and not source.startswith(hub.PREFIX) and not hub.is_model(path)
    if best or (ema and not weighs_file):
        raise ValueError(f"{source} holds one set of weights; leave out {'--ema' if ema else '--best'}")
    notes: tuple[str, ...] = ()
    if source.startswith(hub.PREFIX) or hub.is_model(path):
        published = hub.load(source)
        model, data, classes, step = published.model, published.data, published.classes, published.step
        name, settings = published.name, published.settings
        model.sort = sort or model.sort
    else:
        model, data, settings, notes = _plain_model(source, sort or "magnitude", ema)
        named = None if model.trained_on is None else model.trained_on.classes
        classes, step = None if named is None else list(named), 0
        name = source.removeprefix("timm:").partition("=")[0]
    known = {one.name for one in fields(ModelConfig)}
    settings = settings | {"sort": model.sort}
    described = ModelConfig(name=name, **{key: value for key, value in settings.items() if key in known})
    config = Config(recipe=source, method=methods.PLAIN.name, model=described, data=data)
    method = methods.PLAIN(model, config, 1)
    rest = {key: value for key, value in settings.items() if key not in known}
    return Run(Path(source).name, config, classes, step, method.to(device).eval(), settings=rest, notes=notes)


def load_run(
    source: Path, device: torch.device, *, ema: bool = False, best: bool = False, sort: Sort | None = None
) -> Run:
    """The method of a run's newest whole checkpoint, or of the one named, in evaluation mode on `device`.

    Args:
        source: The `--output` of a `pss-train` run, or a file in its `checkpoints`.
        device: Where to.
        ema: Take the moving average of the weights instead of the weights.
        best: Take the checkpoint of the best validation instead of the newest.
        sort: Which patches to keep; what the run was trained with if None.

    Raises `ValueError` where the folder holds no run, or no moving average was kept, or no epoch was validated yet.
    """
    folder = source if source.suffix != ".pt" or source.is_dir() else source.parent.parent
    config = Config.from_json(folder / CONFIG)
    checkpoints = folder / CHECKPOINTS
    if best and folder != source:
        raise ValueError(f"{source} is one checkpoint; name the run's folder, or leave out --best")
    if best:
        noted = checkpoint.read_best(checkpoints)
        if noted is None:
            raise ValueError(
                f"{folder} holds no validated checkpoint; leave out --best, or let pss-train finish an epoch with a "
                "validation split"
            )
        path = checkpoints / noted["file"]
        # What was best is evaluated: of an epoch, the weights or their average.
        ema = ema or noted.get("weights") == "ema"
        state = checkpoint.load(path)
    elif folder == source:
        found = checkpoint.load_latest(checkpoints)
        if found is None:
            raise ValueError(f"{folder} holds no checkpoint yet; let pss-train finish at least one epoch")
        state, path = found
    else:
        state, path = checkpoint.load(source), source
    state = records.check(state, records.Checkpoint, path, remedy="name another checkpoint")
    check_same_run(state["config"], config, path)
    weights = state["ema" if ema else "method"]
    if weights is None:
        raise ValueError(f"{folder} kept no moving average; train with --set train.ema_decay=0.999, or leave out --ema")
    if sort is not None:
        config = replace(config, model=replace(config.model, sort=sort))
    method = methods.build(config, len(state["classes"]), steps_per_epoch=1)
    try:
        method.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not hold the model that its settings describe "
            f"({str(error).strip().splitlines()[-1].strip()}); it was edited: name another checkpoint"
        ) from error
    method = method.deployed()
    method.model.trained_on = TrainedOn.images(state["classes"], config.data)
    notes = (f"the best is step {state['step']}, its {'moving average' if ema else 'weights'}",) if best else ()
    found_at = folder.name, config, state["classes"], state["step"], method.to(device).eval(), folder
    return Run(*found_at, averaged=ema, settings=dict(method.model.block_sizes), notes=notes)


def _names_weights(source: str) -> bool:
    return source.startswith("timm:") or "=" in source


def _plain_model(
    source: str, sort: Sort, ema: bool
) -> tuple[VisionTransformer, DataConfig, dict[str, Any], tuple[str, ...]]:
    """A model of timm's with its published weights, or with those of a file; its images; what it was built with; and
    what was adapted.

    All its parameters are the file's. Raises `ValueError` where the file does not tell what that takes.
    """
    name, _, file = source.removeprefix("timm:").partition("=")
    check_name(name)
    if name in lvvit.CROP_SHARES and not file:
        raise ValueError(f"timm has no weights for {name}; name a file of its authors, {name}=FILE")
    try:
        known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"timm knows no model {name} ({error}); name one without what follows the dot") from None
    data = DataConfig(crop_pct=lvvit.CROP_SHARES.get(name, DataConfig().crop_pct))
    if known is not None:
        data = DataConfig(
            img_size=known.input_size[-1],
            crop_pct=known.crop_pct or data.crop_pct,
            interpolation="bilinear" if known.interpolation == "bilinear" else "bicubic",
            mean=known.mean,
            std=known.std,
        )
    if not file:
        num_classes = known.num_classes if known is not None else 1000
        model = create_model(name, num_classes=num_classes, img_size=data.img_size, sort=sort)
        report = start_from(model, source, remedies=_REMEDIES)
        return model, data, {}, (f"weights of {source}: {report}",) if report.adapted else ()
    weights = read(Path(file), ema=ema, no_file=_REMEDIES.no_file)
    settings = settings_told(weights, _REMEDIES)
    num_classes, size = settings.pop("num_classes"), settings.pop("img_size", data.img_size)
    if not num_classes:
        raise ValueError(f"{file} has no classifier; {_REMEDIES.other_head}")
    if settings.get("pos_embed") == "none" and "rel_pos" not in settings:
        raise ValueError(
            f"{file} does not tell how its model knows where patches lie (it has neither a position embedding nor "
            "bias tables); name the run of pss-train that it is from"
        )
    if not isinstance(size, int):
        raise ValueError(f"{file} is of a model for images of {size[0]} x {size[1]} pixels; pss-eval takes square ones")
    carried = weights.settings or {}
    notes = []
    if size != data.img_size:
        how = "as its settings say" if "img_size" in carried else "taking its patches for a square"
        notes.append(f"weights of {file}: made for images of {size} pixels, {how}, where {name} has {data.img_size}")
    data = replace(data, img_size=size)
    if "mean" in carried and "std" in carried:
        data = replace(data, mean=tuple(carried["mean"]), std=tuple(carried["std"]))
    data = replace(data, crop_pct=carried.get("crop_pct", data.crop_pct))
    model = create_model(name, num_classes=num_classes, img_size=size, sort=sort, **settings)
    if "img_size" not in carried:
        weights = replace(weights, settings=carried | {"img_size": [size, size]})
    report = fill(model, weights, remedies=_REMEDIES)
    told = ", ".join(f"{value:g}" for value in data.mean)
    if "mean" not in carried:
        report = replace(report, notes=(*report.notes, f"normalised as the weights of {name} in timm, mean {told}"))
    if report.adapted:
        notes.append(f"weights of {file}: {report}")
    return model, data, settings, tuple(notes)
