"""Every setting in words: what it takes, what it is, and what it does, as its declaration says it."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

from pipelines.settings import OneOf, Section, hints_of, is_section
from pss.config import Config, unread_in
from pss.overrides import written

_LARGE = 10**5
"""Limits beyond it keep accidents out and tell a reader nothing."""


@dataclass(frozen=True)
class Setting:
    """One setting of a configuration."""

    name: str
    """As in `--set NAME=VALUE`."""
    takes: str
    """What it may be set to, in words."""
    value: str
    """What it is set to, as `--set` would write it."""
    doc: str
    """What it does: what is written below its declaration, on one line."""
    reader: str | None
    """What would read it, where nothing does in this run."""


def explain(config: Config) -> Iterator[Setting]:
    """All settings of a run, in the order of its file; those of its method are last."""
    unread = {found.full_name: found.reader for found in unread_in(config)}
    yield Setting("method", "text", config.method, _docs_of(Config)["method"], None)
    sections = [value for value in vars(config).values() if isinstance(value, Section)]
    for section in (*sections, *config.own):
        yield from _of_section(section, unread)


def _of_section(section: Section, unread: dict[str, str]) -> Iterator[Setting]:
    kind: Any = type(section)
    docs = _docs_of(kind)
    for name, hint in hints_of(kind).items():
        value = getattr(section, name)
        if is_section(hint):
            yield from _of_section(value, unread)
            continue
        full = f"{kind.section}.{name}"
        yield Setting(full, takes(hint), written(value), docs.get(name, ""), unread.get(full))


def takes(hint: Any) -> str:
    """What a field of that annotation may be set to, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        for part in hint.__metadata__:
            if isinstance(part, OneOf):
                return ", ".join(f"{choice:g}" for choice in part.choices)
        low, high = (_limit(hint.__metadata__, *kinds) for kinds in ((Ge, Gt), (Le, Lt)))
        within = f" in {low[0]}, {high[1]}" if low and high else f" {low[2]}" if low else f" {high[2]}" if high else ""
        return takes(arguments[0]) + within
    if origin in (Union, types.UnionType):
        inner = next(part for part in arguments if part is not type(None))
        words = takes(inner)
        return words if "none" in words.split(", ") else f"{words}, or none"
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is tuple:
        parts = [takes(part) for part in arguments if part is not Ellipsis]
        return f"{parts[0]}, …" if Ellipsis in arguments else f"{len(parts)} × {parts[0]}"
    return {int: "integer", float: "number", bool: "true, false", str: "text"}.get(hint, str(hint))


def _limit(parts: Iterable[Any], closed: type[Any], open: type[Any]) -> tuple[str, str, str] | None:
    """A limit as the beginning of an interval, as its end, and alone; None where there is none that tells anything."""
    for part in parts:
        if isinstance(part, closed | open):
            value = getattr(part, type(part).__name__.lower())
            if abs(value) >= _LARGE:
                return None
            shut, sign = isinstance(part, closed), {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}[type(part)]
            return f"{'[' if shut else '('}{value:g}", f"{value:g}{']' if shut else ')'}", f"{sign} {value:g}"
    return None


@cache
def _docs_of(kind: type[Any]) -> dict[str, str]:
    """What is written below each field of a class, bases included."""
    docs: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if not issubclass(one, Section) or one is Section:
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(tree, ast.ClassDef)
        for declared, below in zip(tree.body, tree.body[1:], strict=False):
            if not isinstance(declared, ast.AnnAssign) or not isinstance(declared.target, ast.Name):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                docs[declared.target.id] = " ".join(str(below.value.value).split())
    return docs
