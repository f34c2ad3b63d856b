"""A frozen model that training asks, and does not train."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pss.models.create import create_model
from pss.models.flops import macs
from pss.models.settings import KEY, TrainedOn
from pss.models.vit import VisionTransformer
from pss.models.weights import Remedies, start_from
from pss.sections import RunSettings, model_of

_TIMM = "timm:"
_REMEDIES = Remedies(
    no_file="name a teacher that is there",
    other_head="name a teacher of the classes that the run has",
    other_model="name the teacher's run, or one with the settings of the model that is trained",
    other_bias="name the teacher's run, or one with the settings of the model that is trained",
)


@dataclass(frozen=True)
class Answer:
    """What a teacher says of a batch."""

    logits: Tensor  # (B, classes); of the class token alone where patches are classified, too
    tokens: Tensor  # (B, N, D), after the last norm, prefix first
    patches: Tensor | None = None  # (B, N - prefix, classes), where it has a classifier for them


class Teacher:
    """Weights that are outside the method's parameters: in no checkpoint, no average, no wrapper of several processes.

    It is always in evaluation mode and records no gradient; copies of a method share it.
    """

    def __init__(self, source: str, config: RunSettings, num_classes: int) -> None:
        """Nothing is read yet but the shape of a run's model.

        Args:
            source: `timm:NAME` with its pretrained weights, the folder of a run, or a weights file of a model with the
                same settings as the one that is trained.
            config: Of the run that asks.
            num_classes: That the logits are to be of.

        Raises:
            ValueError: a folder that holds no run.
        """
        self.source = source
        settings: dict[str, Any] = {"num_classes": num_classes, "img_size": config.data.img_size}
        model, self._data = config.model, config.data
        if source.startswith(_TIMM):
            self._settings = settings | {"name": source.removeprefix(_TIMM)}
        else:
            if Path(source).is_dir():
                model = model_of(Path(source))
            self._settings = settings | model.overrides() | {"name": model.name, "drop_path_rate": 0.0}
        self.model: VisionTransformer | None = None
        self.digest: str | None = None
        """SHA-256 of its weights, once they are loaded."""

    def __deepcopy__(self, memo: Any) -> Teacher:
        return self

    @cached_property
    def blank(self) -> VisionTransformer:
        """Its shapes, and nothing else."""
        with torch.device("meta"):
            return create_model(**self._settings)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of its forward pass, for one image."""
        return macs(self.blank)

    def load(self, device: torch.device) -> None:
        """Read its weights.

        Raises:
            ValueError: they are not there, or do not fit.
        """
        with torch.random.fork_rng(devices=[]):  # whether there is a teacher decides nothing about the student
            model = create_model(**self._settings)
        model.trained_on = TrainedOn(mean=self._data.mean, std=self._data.std)  # it sees what the student sees
        start_from(model, self.source, remedies=_REMEDIES)
        content = hashlib.sha256()
        for name, value in sorted(model.state_dict().items()):
            if name != KEY:
                content.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        self.digest = content.hexdigest()
        self.model = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Answer:
        """What it says of the images (B, 3, S, S) that the student sees, of lower resolution too."""
        assert self.model is not None, "a teacher is loaded before training begins"
        tokens = self.model.trunk(*self.model.see(images, 1.0, low_resolution=True))
        logits, patches = self.model.answers(tokens)
        return Answer(logits, tokens, patches)
