"""What is known of a model that is published, and of the run behind it; None for what is not."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from pipelines.base import DataConfig
from pss import recipes
from pss.config import Config
from pss.inference.opening import Run
from pss.overrides import changes
from pss.runs import records
from pss.runs.lock import SUMMARY
from pss.runs.log import read_rows

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,59}")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a card tells beside the results."""

    architecture: str
    """The name that `pss.create_model` built it by."""
    rel_pos: str
    num_classes: int
    num_parameters: int
    data: DataConfig
    """How images are prepared."""
    dataset: str | None = None
    """What the data set is called that it was evaluated on."""
    split: str | None = None
    licence: str | None = None
    """By its identifier on the hub."""
    base_model: str | None = None
    """On the hub: where its training began."""
    method: str | None = None
    recipe: str | None = None
    command: tuple[str, ...] | None = None
    """What trains such a model again, in the parts that it is to be broken between."""
    epochs: int | None = None
    hours: float | None = None
    """Of training, over all epochs."""
    hardware: str | None = None
    """What it was trained on."""


def of(run: Run, *, dataset: str | None = None, split: str | None = None, licence: str | None = None) -> Facts:
    """What is known of an opened model."""
    model, config = run.method.model, run.config
    told: dict[str, Any] = {
        "architecture": config.model.name,
        "rel_pos": model.rel_pos,
        "num_classes": model.num_classes,
        "num_parameters": sum(one.numel() for one in model.parameters()),
        "data": config.data,
        "dataset": dataset,
        "split": split,
        "licence": licence,
        "base_model": _base_model(config),
    }
    if run.folder is None:
        return Facts(**told)
    summary = _summary(run.folder)
    whole = summary.get("step") == run.step
    return Facts(
        **told,
        method=config.method,
        recipe=config.recipe,
        command=_command(config),
        epochs=config.train.epochs if whole and summary.get("finished") else None,
        hours=summary["train_seconds"] / 3600 if whole and "train_seconds" in summary else None,
        hardware=_hardware(run.folder, run.step),
    )


def check_licence(licence: str | None) -> None:
    """Raise `ValueError` for what is no identifier of a licence on the hub."""
    if licence is not None and not _LICENCE.fullmatch(licence):
        raise ValueError(
            f"--license {licence[:40]!r} is no identifier of a licence on the hub; name one such as apache-2.0, mit or "
            "cc-by-nc-4.0"
        )


def _summary(folder: Path) -> dict[str, Any]:
    """`summary.json`, or nothing where it is not there or cannot be read: a card does without."""
    try:
        found: dict[str, Any] = records.read(folder / SUMMARY, records.Versioned, remedy="train it again")
    except (OSError, ValueError):
        return {}
    return found


def _base_model(config: Config) -> str | None:
    """On the hub, the model whose weights the training began with, or that was evaluated as it is."""
    source = config.model.weights or config.recipe
    if not source.startswith("timm:"):
        return None
    try:
        cfg = timm.get_pretrained_cfg(source.removeprefix("timm:"), allow_unregistered=True)
    except (RuntimeError, ValueError):
        return None
    name = None if cfg is None else cfg.hf_hub_id
    return name if isinstance(name, str) and "/" in name else None


def _command(config: Config) -> tuple[str, ...] | None:
    """The command that makes this configuration of its recipe; None where it is not known to."""
    try:
        base = recipes.get(config.recipe)
    except ValueError:
        return None
    changed = changes(base.to_dict(), config.to_dict())
    try:
        if base.with_settings(changed).to_dict() != config.to_dict():
            return None
    except ValueError:
        return None
    told = [_without_folders(one) for one in changed]
    begin = f"pss-train {shlex.quote(config.recipe)} --data DATA --output RUN"
    return begin, *(f"--set {shlex.quote(one)}" for one in told)


def _without_folders(setting: str) -> str:
    """A setting that names a file of this machine, with the file's name alone."""
    key, _, value = setting.partition("=")
    return f"{key}={Path(value).name}" if Path(value).is_absolute() else setting


def _hardware(folder: Path, step: int) -> str | None:
    """The devices that the run was on until this step."""
    rows = [row for row in read_rows(folder, "start") if row["step"] <= step]
    if not rows or any("device" not in row for row in rows):
        return None
    found = [f"{row['processes']} × {row['device']}" if row["processes"] > 1 else row["device"] for row in rows]
    return ", then ".join(dict.fromkeys(found))
