"""A run's folder, read back: its configuration and its trained method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pss import checkpoint, methods
from pss.config import Config
from pss.methods import Method


@dataclass(frozen=True)
class Run:
    """A trained method and where it came from."""

    name: str
    config: Config
    classes: list[str]
    step: int
    method: Method


def load_run(folder: Path, device: torch.device, *, ema: bool = False) -> Run:
    """The method of the newest whole checkpoint in `folder`, in evaluation mode on `device`.

    Args:
        folder: the `--output` of a `pss-train` run.
        ema: take the moving average of the weights instead of the weights.

    Raises `ValueError` where the folder holds no run, or no moving average was kept.
    """
    config = Config.from_json(folder / "config.json")
    found = checkpoint.load_latest(folder / "checkpoints")
    if found is None:
        raise ValueError(f"{folder} holds no checkpoint yet; let pss-train finish at least one epoch")
    state, _ = found
    weights = state["ema" if ema else "method"]
    if weights is None:
        raise ValueError(f"{folder} kept no moving average; train with --set train.ema_decay=0.999, or leave out --ema")
    method = methods.build(config, len(state["classes"]), steps_per_epoch=1)
    method.load_state_dict(weights)
    return Run(folder.name, config, state["classes"], state["step"], method.to(device).eval())
