"""Training methods by name. Each is one file behind the contract of `pss.methods.contract`."""

from __future__ import annotations

from pss.config import Config
from pss.methods.contract import Method, Phase, Progress
from pss.methods.dense import Dense
from pss.methods.sampled import Sampled
from pss.models.vit import create_model

__all__ = ["METHODS", "Method", "Phase", "Progress", "build"]

METHODS: dict[str, type[Method]] = {"sampled": Sampled, "dense": Dense}


def build(config: Config, num_classes: int, steps_per_epoch: int) -> Method:
    """The configured method around a freshly initialised model. Raises `ValueError` for an unknown method."""
    if config.method not in METHODS:
        raise ValueError(f"method is {config.method!r}; use one of {', '.join(METHODS)}")
    model = create_model(
        config.model.name, num_classes=num_classes, img_size=config.data.img_size, **config.model.overrides()
    )
    for epoch in range(config.train.epochs):
        model.grid_of(config.data.train_size(epoch))  # raises where the sizes do not suit the patches
    return METHODS[config.method](model, config, steps_per_epoch)
