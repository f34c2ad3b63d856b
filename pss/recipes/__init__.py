"""Recipes: functions that return the settings of a run. `--list` shows the first line of each docstring."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING

from pss.plugins import is_plugin
from pss.recipes.avit import avit_s, avit_ti
from pss.recipes.deit import (
    deit_s_224,
    deit_s_224_lowres,
    deit_s_224_plain,
    deit_s_384,
    deit_ti_224,
    vit_b_simmim,
)
from pss.recipes.dynamicvit import dynamicvit_b, dynamicvit_s
from pss.recipes.lvvit import lvvit_m, lvvit_s, lvvit_ti
from pss.recipes.small import cifar10, digits, mnist
from pss.recipes.sparsifiner import sparsifiner_s, sparsifiner_s_release
from pss.recipes.svite import (
    s2vite_b,
    s2vite_plus_s,
    s2vite_s,
    s2vite_ti,
    svite_b,
    svite_plus_s,
    svite_s,
    svite_ti,
)
from pss.recipes.toe import toe_b, toe_s, toe_ti
from pss.sections import RunSettings

if TYPE_CHECKING:
    from pss.config import Config

RECIPES: dict[str, Callable[[], RunSettings]] = {
    "digits": digits,
    "mnist": mnist,
    "cifar10": cifar10,
    "deit-ti-224": deit_ti_224,
    "deit-s-224": deit_s_224,
    "deit-s-224-plain": deit_s_224_plain,
    "deit-s-224-lowres": deit_s_224_lowres,
    "deit-s-384": deit_s_384,
    "vit-b-simmim": vit_b_simmim,
    "dynamicvit-s": dynamicvit_s,
    "dynamicvit-b": dynamicvit_b,
    "sparsifiner-s": sparsifiner_s,
    "sparsifiner-s-release": sparsifiner_s_release,
    "lvvit-ti": lvvit_ti,
    "lvvit-s": lvvit_s,
    "lvvit-m": lvvit_m,
    "toe-ti": toe_ti,
    "toe-s": toe_s,
    "toe-b": toe_b,
    "avit-ti": avit_ti,
    "avit-s": avit_s,
    "svite-ti": svite_ti,
    "svite-s": svite_s,
    "svite-b": svite_b,
    "svite-plus-s": svite_plus_s,
    "s2vite-ti": s2vite_ti,
    "s2vite-s": s2vite_s,
    "s2vite-b": s2vite_b,
    "s2vite-plus-s": s2vite_plus_s,
}


def get(name: str) -> Config:
    """The configuration of a recipe.

    Args:
        name: one of `RECIPES`; a file (`*.yaml`, `*.toml`, `*.json`); the folder of a run, whose settings it means;
            `package.module:function` for one of your own; or what a package, or a file in a folder of recipes, is
            called (`pss.recipes.own`).

    Raises:
        ValueError: there is none, with the nearest name; or several have it; or it cannot be read.
    """
    from pss.config import Config  # with torch and timm behind it, which a list of recipes can do without
    from pss.recipes import files, own

    if is_plugin(name):
        return own.made_by(name)
    found = list(own.candidates(name))
    if name in RECIPES:
        if found:
            raise ValueError(f"{name} is a recipe of pss, and {_where(found[0])} has its name; give that another one")
        return Config.of(RECIPES[name]())
    if len(found) > 1:
        raise ValueError(f"{_where(found[0])} and {_where(found[1])} are both called {name}; rename one of them")
    if found:
        (one,) = found
        return files.read(one, get) if isinstance(one, Path) else own.made_by(one.value)
    known = [*RECIPES, *own.listed()]
    near = difflib.get_close_matches(name.replace("_", "-"), known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"there is no recipe {name!r}; {hint}recipes are {', '.join(known)}")


def summaries() -> dict[str, str]:
    """A line on every recipe, by name: those of pss, then one's own with where they are from."""
    from pss.recipes import own

    told = {name: (recipe.__doc__ or "").strip().splitlines()[0] for name, recipe in RECIPES.items()}
    return told | {name: ", ".join(map(_where, found)) for name, found in own.listed().items()}


def _where(found: Path | EntryPoint) -> str:
    return str(found) if isinstance(found, Path) else found.value
