"""What can be evaluated, read back: the folder of a run, one of its checkpoints, a published folder, a timm model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch

from pipelines.base import DataConfig
from pss import methods
from pss.config import Config, ModelConfig
from pss.inference import hub
from pss.methods import Method
from pss.models.create import create_model
from pss.models.sampling import Sort
from pss.models.vit import VisionTransformer
from pss.models.weights import num_classes_of, start_from
from pss.runs import checkpoint


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

    @property
    def num_classes(self) -> int:
        return self.method.model.num_classes

    def published(self) -> hub.Published:
        """What `pss.inference.hub.save` writes of it.

        Raises:
            ValueError: its method has weights of its own, beside the model's.
        """
        if own := [name for name, _ in self.method.named_parameters() if not name.startswith("model.")]:
            raise ValueError(
                f"{self.name} has weights of method {self.method.name} beside its model ({own[0]}, …), which no "
                "published folder holds; --export writes a file with all of them"
            )
        settings = self.config.model.overrides()
        model = self.config.model
        return hub.Published(self.method.model, model.name, settings, self.classes, self.config.data, self.step)


def open_run(
    source: str, device: torch.device, *, ema: bool = False, best: bool = False, sort: Sort | None = None
) -> Run:
    """Whatever `source` names, in evaluation mode on `device`.

    Args:
        source: The `--output` of a `pss-train` run, one checkpoint file inside it, a folder or `hf-hub:owner/name` as
            `pss.inference.hub` writes it, `timm:NAME` for a timm model with its pretrained weights, or `NAME=FILE`
            for a weights file and the model it belongs to. The last two get the patch sampling block injected.
        device: Where to.
        ema: Take the moving average of the weights instead of the weights.
        best: Of a run, take the checkpoint of the best validation instead of the newest.
        sort: Which patches to keep; what the run was trained with if None.

    Raises:
        ValueError: nothing of that kind is there, or there is no moving average, or no validation yet.
    """
    path = Path(source)
    if not source.startswith(hub.PREFIX) and not hub.is_model(path) and (path.exists() or not _names_weights(source)):
        return load_run(path, device, ema=ema, best=best, sort=sort)
    if ema or best:
        raise ValueError(f"{source} holds one set of weights; leave out {'--ema' if ema else '--best'}")
    if source.startswith(hub.PREFIX) or hub.is_model(path):
        published = hub.load(source)
        model, data, classes, step = published.model, published.data, published.classes, published.step
        settings = ModelConfig(name=published.name, **published.settings)
        model.sort = sort or model.sort
    else:
        model, data = _plain_model(source, sort or "magnitude")
        classes, step = None, 0
        settings = ModelConfig(name=source.removeprefix("timm:").partition("=")[0])
    config = Config(recipe=source, method=methods.PLAIN.name, model=replace(settings, sort=model.sort), data=data)
    method = methods.PLAIN(model, config, 1)
    return Run(Path(source).name, config, classes, step, method.to(device).eval())


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
    config = Config.from_json(folder / "config.json")
    if best and folder != source:
        raise ValueError(f"{source} is one checkpoint; name the run's folder, or leave out --best")
    if best:
        path = checkpoint.best(folder / "checkpoints")
        if path is None:
            raise ValueError(f"{folder} holds no validated checkpoint yet; let pss-train finish an epoch")
        state = checkpoint.load(path)
    elif folder == source:
        found = checkpoint.load_latest(folder / "checkpoints")
        if found is None:
            raise ValueError(f"{folder} holds no checkpoint yet; let pss-train finish at least one epoch")
        state = found[0]
    else:
        state = checkpoint.load(source)
    weights = state["ema" if ema else "method"]
    if weights is None:
        raise ValueError(f"{folder} kept no moving average; train with --set train.ema_decay=0.999, or leave out --ema")
    if sort is not None:
        config = replace(config, model=replace(config.model, sort=sort))
    method = methods.build(config, len(state["classes"]), steps_per_epoch=1)
    method.load_state_dict(weights)
    return Run(folder.name, config, state["classes"], state["step"], method.to(device).eval(), folder)


def _names_weights(source: str) -> bool:
    return source.startswith("timm:") or "=" in source


def _plain_model(source: str, sort: Sort) -> tuple[VisionTransformer, DataConfig]:
    """A timm model with its published weights, or with those of a file, and the images it takes."""
    name, _, file = source.removeprefix("timm:").partition("=")
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    data = DataConfig()
    if known is not None:
        data = DataConfig(
            img_size=known.input_size[-1],
            crop_pct=known.crop_pct or data.crop_pct,
            interpolation="bilinear" if known.interpolation == "bilinear" else "bicubic",
            mean=known.mean,
            std=known.std,
        )
    num_classes = num_classes_of(file) if file else known.num_classes if known is not None else 1000
    model = create_model(name, num_classes=num_classes, img_size=data.img_size, sort=sort)
    start_from(model, file or source)
    return model, data
