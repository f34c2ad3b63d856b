"""`section.key=value` as people write it, put into the dictionaries of a configuration."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pipelines.settings import Json, Section, SettingError, hints_of, nearest


def split(setting: str) -> tuple[str, str]:
    """Key and value. Raises `ValueError` where there is no equals sign."""
    key, separator, text = (part.strip() for part in setting.partition("="))
    if not separator:
        raise ValueError(f"--set {setting}: write section.key=value, for example train.epochs=10")
    return key, text


def apply(
    tree: Json,
    kinds: Mapping[str, type[Section]],
    pairs: Sequence[tuple[str, str]],
    whose: Callable[[str], str | None],
    source: str = "--set ",
) -> None:
    """Change `tree`, the dictionaries of a configuration whose sections are of these `kinds`.

    Args:
        tree: Changed in place.
        kinds: The type of every section, by its name.
        pairs: Keys and texts, as `split` returns them.
        whose: What to say of a key that is not in the tree, where it is known elsewhere.
        source: Where the pairs come from, as the beginning of a sentence.

    Raises:
        ValueError: a key that is not in the tree, with the nearest one, or a value of the wrong kind.
    """
    known = [key for key in flatten(tree) if key != "recipe"]
    for key, text in pairs:
        if key not in known:
            raise ValueError(f"{source}{key}={text}: there is no key {key!r}{whose(key) or nearest(key, known)}")
        first, *rest = key.split(".")
        if not rest:
            tree[first] = text
            continue
        *inner, name = rest
        kind: Any = kinds[first]
        branch = tree[first]
        for section in inner:
            kind, branch = hints_of(kind)[section], branch[section]
        branch[name] = value_of(text, hints_of(kind)[name])
        try:
            kind.draft(branch)  # what it clashes with may be set to something else yet
        except SettingError as error:
            raise SettingError(f"{source}{key}={text}: {error}") from None


def flatten(tree: Json, prefix: str = "") -> Json:
    """`{"train.epochs": 10, ...}` of nested dictionaries."""
    flat: Json = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def value_of(text: str, hint: Any) -> Any:
    """`text` in the form that is checked against the annotation `hint`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return value_of(text, args[0])
    if origin in (Union, types.UnionType):
        inner = next(a for a in args if a is not type(None))
        is_choice = get_origin(inner) is Literal and text in get_args(inner)  # model.rel_pos has a choice named none
        if text.lower() in ("none", "null") and type(None) in args and not is_choice:
            return None
        return value_of(text, inner)
    if origin is tuple:
        return [part.strip() for part in text.strip("()[] ").split(",") if part.strip()]
    return text


def written(value: Any) -> str:
    """A value as `--set` takes it."""
    if isinstance(value, tuple | list):
        return ",".join(map(written, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def changes(before: Json, after: Json) -> list[str]:
    """What `--set` would be given to make one configuration, nested as in a file, of the other: `train.epochs=30`."""
    old = flatten(before)
    return [f"{key}={written(value)}" for key, value in flatten(after).items() if value != old.get(key)]
