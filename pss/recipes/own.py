"""Recipes of one's own: files in a folder, functions of installed packages, or either by its name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from pss.plugins import load
from pss.sections import RunSettings

if TYPE_CHECKING:
    from pss.config import Config

SUFFIXES = (".yaml", ".yml", ".toml", ".json")
"""Of files that hold a recipe."""
FOLDERS = "PSS_RECIPES"
"""Environment variable: folders of recipe files, separated as in PATH."""
GROUP = "pss.recipes"
"""Entry points of packages that bring recipes along: functions that return `RunSettings`, by the recipes' names."""


def folders() -> list[Path]:
    """Where recipe files are looked for by their stems."""
    if given := os.environ.get(FOLDERS):
        return [Path(one).expanduser() for one in given.split(os.pathsep) if one]
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return [Path(home).expanduser() / "pss" / "recipes"]


def listed() -> dict[str, list[Path | EntryPoint]]:
    """All there are, by name, sorted: more than one under a name that several have."""
    found: dict[str, list[Path | EntryPoint]] = {}
    for folder in folders():
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                if path.suffix in SUFFIXES and path.is_file():
                    found.setdefault(path.stem, []).append(path)
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, []).append(point)
    return dict(sorted(found.items()))


def candidates(name: str) -> Iterator[Path | EntryPoint]:
    """What a name may mean beside the recipes of pss: a file, a run's folder, or one of `listed`."""
    from pss.runs.lock import CONFIG  # with torch behind it, which a list of recipes can do without

    path = Path(name)
    if path.suffix in SUFFIXES:
        yield path
    elif (path / CONFIG).is_file():
        yield path / CONFIG
    else:
        yield from listed().get(name, ())


def made_by(name: str) -> Config:
    """The configuration that `package.module:function` returns. Raises `ValueError` where it does not."""
    from pss.config import Config

    made = load(name)
    settings = made() if callable(made) else made
    if not isinstance(settings, RunSettings):
        raise ValueError(
            f"the recipe {name} made a {type(settings).__name__}; a recipe is a function that returns a "
            "pss.sections.RunSettings"
        )
    return settings if isinstance(settings, Config) else Config.of(settings)
