"""Recipes: functions that return a complete `Config`. `--list` shows the first line of each docstring."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from pss.config import Config
from pss.recipes.deit import (
    deit_s_224,
    deit_s_224_lowres,
    deit_s_224_plain,
    deit_s_384,
    deit_ti_224,
    vit_b_simmim,
)
from pss.recipes.small import cifar10, digits

RECIPES: dict[str, Callable[[], Config]] = {
    "digits": digits,
    "cifar10": cifar10,
    "deit-ti-224": deit_ti_224,
    "deit-s-224": deit_s_224,
    "deit-s-224-plain": deit_s_224_plain,
    "deit-s-224-lowres": deit_s_224_lowres,
    "deit-s-384": deit_s_384,
    "vit-b-simmim": vit_b_simmim,
}


def get(name: str) -> Config:
    """The configuration of recipe `name`. Raises `ValueError` that suggests the nearest name."""
    if name in RECIPES:
        return RECIPES[name]()
    near = difflib.get_close_matches(name.replace("_", "-"), RECIPES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"there is no recipe {name!r}; {hint}recipes are {', '.join(RECIPES)}")
