"""Recipes in files: all settings of a run, or a base and what differs from it, as YAML, TOML or JSON."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.base import in_words
from pipelines.settings import hints_of, is_section
from pss import methods, overrides
from pss.config import Config, unread_in
from pss.recipes.own import SUFFIXES
from pss.runs import records

_MOST_BYTES = 1 << 20


class _Malformed(Exception):
    """What is wrong with a text, without its file."""


_BASE, _RECIPE = "base", "recipe"


def read(path: Path, find: Callable[[str], Config], within: tuple[Path, ...] = ()) -> Config:
    """The configuration that a file describes.

    A file either says `base: NAME` and what differs, where NAME is what `find` knows, or another file beside this one;
    or it holds all sections of a run, as `config.json` does and what `pss-train RECIPE --show` prints. A value is
    written as after `--set KEY=`: `1e-3`, `none`, `true`; several as a list.

    Args:
        path: the file; its stem becomes the recipe's name, unless it says another.
        find: returns the configuration of a recipe by its name.
        within: files that have this one as their base.

    Raises:
        ValueError: it cannot be read, or says something that there is not; the message names the file.
    """
    if path.resolve() in within:
        raise ValueError(f"{path} is its own base, by way of {within[-1]}; name another base")
    raw = _parse(path)
    name = raw.pop(_RECIPE, path.stem)
    base = raw.pop(_BASE, None)
    if not isinstance(name, str) or not name.isprintable() or not name:
        raise ValueError(f"{path}: recipe is {str(name)[:80]!r}; write a name")
    if base is None:
        return _complete(path, name, raw)
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path}: base is {str(base)[:80]!r}; write the name of a recipe, or of another file")
    beside = path.parent / base
    if beside.suffix in SUFFIXES:
        config = read(beside, find, (*within, path.resolve()))
    pairs = list(_pairs(path, raw))
    try:
        if beside.suffix not in SUFFIXES:
            config = find(base)
        config = config.with_pairs(pairs, "") if pairs else config
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return dataclasses.replace(config, recipe=name)


def write(config: Config) -> str:
    """A YAML file of all settings that something reads in this run; `read` makes the same configuration of it."""
    import yaml

    tree = config.to_dict()
    for found in unread_in(config):
        *sections, name = found.full_name.split(".")
        branch = tree
        for section in sections:
            branch = branch[section]
        del branch[name]
    tree = {name: value for name, value in tree.items() if value != {}}
    text: str = yaml.dump(tree, Dumper=_dumper(), sort_keys=False, allow_unicode=True, width=4096)
    return text


def _complete(path: Path, name: str, raw: dict[str, Any]) -> Config:
    this: Any = Config
    parts = {key: hint for key, hint in hints_of(this).items() if is_section(hint)}
    if missing := [key for key in ("method", *parts) if key not in raw]:
        raise ValueError(
            f"{path} has no {missing[0]}, and no base that would say it; add base: and the name of a recipe, such as "
            "base: deit-s-224"
        )
    method = raw["method"]
    try:
        parts |= {kind.section: kind for kind in methods.find(str(method)).sections}
        typed = {
            key: _typed(value, parts[key]) if key in parts and isinstance(value, dict) else value
            for key, value in raw.items()
        }
        return Config.from_dict({_RECIPE: name, **typed})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _typed(raw: dict[str, Any], kind: Any) -> dict[str, Any]:
    """What a file says of a section, with texts in the form that their fields take."""
    hints, typed = hints_of(kind), {}
    for key, value in raw.items():
        hint = hints.get(key)
        if is_section(hint) and isinstance(value, dict):
            typed[key] = _typed(value, hint)
        else:
            typed[key] = overrides.value_of(value, hint) if isinstance(value, str) and hint is not None else value
    return typed


def _pairs(path: Path, raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Keys and texts, as `--set` has them. Raises `ValueError` for what no setting can be."""
    for key, value in raw.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _pairs(path, value, f"{name}.")
            continue
        parts = value if isinstance(value, list) else [value]
        if any(isinstance(part, Mapping | list) or part == "" for part in parts):
            raise ValueError(f"{path}: {name} is {str(value)[:80]!r}; write one value, or a list of values")
        yield name, overrides.written(parts)


# Files.


def _parse(path: Path) -> dict[str, Any]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} is no recipe file; call it *{', *'.join(SUFFIXES)}")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{path} is larger than {_MOST_BYTES >> 20} MiB, so it is no recipe; name another file")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path} not found; name a recipe (pss-train --list) or a file of one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({in_words(error)}); name another file") from error
    try:
        raw: Any = tomllib.loads(text) if suffix == ".toml" else (_from_json if suffix == ".json" else _from_yaml)(text)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply; write section, setting and value") from None
    except (ValueError, _Malformed) as error:
        raise ValueError(f"{path} is no {suffix[1:].upper()} file ({' '.join(str(error).split())}); mend it") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds no settings by name; write base: and a recipe's name, and what differs")
    records.refuse_later(raw, path)
    return {str(key): value for key, value in raw.items() if key not in records.STAMP}


def _from_json(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise _Malformed(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
        return found

    return json.loads(text, object_pairs_hook=once)


def _from_yaml(text: str) -> Any:
    """All values as the text that is there: YAML's own rules make no number of 1e-3, and `off` false."""
    import yaml

    class Loader(yaml.BaseLoader):  # type: ignore[misc, unused-ignore]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise _Malformed(f"{twice[0]!r} is there twice")
            found: dict[Hashable, Any] = super().construct_mapping(node, deep)
            return found

    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.BaseLoader)):
            raise _Malformed("it has aliases, which a recipe has no use for")
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise _Malformed(str(error)) from None


def _dumper() -> Any:
    import yaml

    class Dumper(yaml.SafeDumper):  # type: ignore[misc, unused-ignore]
        """Several numbers on one line."""

    Dumper.add_representer(
        tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", list(value), flow_style=True)
    )
    return Dumper
