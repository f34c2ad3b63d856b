"""Training methods by name. Each is one file behind the contract of `pss.methods.contract`; a file that is put here is
found.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules

from pss.methods.contract import Method
from pss.methods.teacher import Teacher
from pss.methods.vocabulary import Cost, DenseTargets, Phase, Point, Progress, Stage, Step, mean_tokens
from pss.models.create import create_model
from pss.plugins import is_plugin, load
from pss.sections import RunSettings

__all__ = [
    "METHODS",
    "PLAIN",
    "Cost",
    "DenseTargets",
    "Method",
    "Phase",
    "Point",
    "Progress",
    "Stage",
    "Step",
    "Teacher",
    "build",
    "find",
    "mean_tokens",
]


def _discover() -> Mapping[str, type[Method]]:
    found: dict[str, type[Method]] = {}
    for module in iter_modules(__path__, f"{__name__}."):
        for one in vars(import_module(module.name)).values():
            own = isinstance(one, type) and issubclass(one, Method) and one.__module__ == module.name
            if own and "name" in vars(one):  # others are what methods are built on
                assert one.name not in found, f"{one} and {found[one.name]} are both called {one.name}"
                found[one.name] = one
    return found


METHODS = _discover()
"""The methods that pss brings along."""

PLAIN = METHODS["dense"]
"""What weights are opened as that no run of ours is behind."""


def find(name: str) -> type[Method]:
    """The method of that name, or a class of the user's own, `package.module:Class`.

    Raises:
        ValueError: there is none, or the class is no method.
    """
    if is_plugin(name):
        found = load(name)
        if not (isinstance(found, type) and issubclass(found, Method)):
            raise ValueError(f"method is {name}, which is no subclass of pss.methods.Method; see docs/methods.md")
        return found
    if name not in METHODS:
        raise ValueError(
            f"method is {name!r}; use one of {', '.join(METHODS)}, or package.module:Class for one of your own"
        )
    return METHODS[name]


def build(config: RunSettings, num_classes: int, steps_per_epoch: int) -> Method:
    """The configured method around a freshly initialised model. Raises `ValueError` for what cannot be built."""
    model = create_model(
        config.model.name, num_classes=num_classes, img_size=config.data.img_size, **config.model.overrides()
    )
    for epoch in range(config.train.epochs):
        model.grid_of(config.data.train_size(epoch))  # raises where the sizes do not suit the patches
    return find(config.method)(model, config, steps_per_epoch)
