"""Every field of every section of a configuration, and values inside and outside what each declares."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from hypothesis import strategies as st

from pipelines.settings import OneOf, Parsed, hints_of, is_section, read_ifs, sections_of
from pss import methods, recipes
from pss.sections import RunSettings

GIVEN_BY_NAME = ("recipe", "own", "spare")  # of a run's settings, those that no `--set` reaches


@dataclass(frozen=True)
class Field:
    """A setting as people write it, and its annotation."""

    name: str
    hint: Any

    @property
    def read_ifs(self) -> tuple[Any, ...]:
        return read_ifs(self.hint)


def all_fields() -> list[Field]:
    """Found by walking the dataclasses, so that a new field is there by itself."""
    kinds: list[Any] = [type(section) for section in sections_of(recipes.get("digits"))]
    kinds += [kind for method in methods.METHODS.values() for kind in method.sections]
    run: Any = RunSettings
    fields = [Field(name, hint) for name, hint in hints_of(run).items() if name not in GIVEN_BY_NAME]
    for kind in dict.fromkeys(kinds):
        fields += [Field(f"{kind.section}.{name}", hint) for name, hint in hints_of(kind).items()]
    return [field for field in fields if not is_section(field.hint)]


FIELDS = all_fields()


@dataclass(frozen=True)
class Shape:
    """An annotation, taken apart."""

    kind: Any
    optional: bool
    limits: tuple[Any, ...]

    def limit(self, *kinds: Any) -> Any:
        return next(
            (getattr(part, type(part).__name__.lower()) for part in self.limits if isinstance(part, kinds)), None
        )

    def find(self, kind: Any) -> Any:
        return next((part for part in self.limits if isinstance(part, kind)), None)

    def holds(self, value: float) -> bool:
        """Whether a number lies within the limits."""
        low, high = self.limit(Ge, Gt), self.limit(Le, Lt)
        chosen = self.find(OneOf)
        return (
            (low is None or value > low or (value == low and self.find(Ge) is not None))
            and (high is None or value < high or (value == high and self.find(Le) is not None))
            and (chosen is None or value in chosen.choices)
        )


def shape_of(hint: Any, optional: bool = False, limits: tuple[Any, ...] = ()) -> Shape:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return shape_of(args[0], optional, (*limits, *hint.__metadata__))
    if origin in (Union, types.UnionType):
        (inner,) = (arg for arg in args if arg is not type(None))
        return shape_of(inner, True, limits)
    return Shape(hint, optional, limits)


def elements_of(shape: Shape) -> list[Shape] | None:
    """Of a tuple; one for a tuple of any length, None for what is no tuple."""
    if get_origin(shape.kind) is not tuple:
        return None
    return [shape_of(arg) for arg in get_args(shape.kind) if arg is not Ellipsis]


WORDS = st.sampled_from(["x", "three", "1e", "--", "0x10", "1,2,3,4,5,6,7", "{}", "yes please", "ρ"])


def outside(hint: Any) -> st.SearchStrategy[str]:
    """Texts that the field must refuse: beyond each of its limits, and of another kind."""
    shape = shape_of(hint)
    if (parts := elements_of(shape)) is not None:
        wrong = outside_of(parts[0])
        if Ellipsis in get_args(shape.kind):
            if parts[0].kind is str:  # which of them it takes, only it knows
                return wrong.filter(str.strip)
            return st.tuples(inside_of(parts[0]), wrong).map(lambda both: f"{both[0]},{both[1]}")
        right = [inside_of(part) for part in parts]
        too_few = st.tuples(*right[1:]).map(",".join)
        too_many = st.tuples(*right, right[0]).map(",".join)
        return st.one_of(too_few, too_many, st.tuples(wrong, *right[1:]).map(",".join))
    return outside_of(shape)


def outside_of(shape: Shape) -> st.SearchStrategy[str]:
    if get_origin(shape.kind) is Literal:
        return WORDS
    if shape.kind is bool:
        return st.sampled_from(["2", "-1", "maybe", "0.5", "nan"])
    if shape.kind is str:
        refused = ["", " ", "\x00", "a\tb", "x" * 5000, "\x1b[31m", "rand-m9\n"]
        return st.sampled_from([text for text in refused if not _parses(shape, text.strip())])
    whole = shape.kind is int
    beyond: list[st.SearchStrategy[str]] = [WORDS, st.sampled_from(["nan", "inf", "-inf", "1e999", "1.5j"])]
    numbers: Any = st.integers() if whole else st.floats(allow_nan=False, allow_infinity=False)
    beyond.append(numbers.filter(lambda value: not shape.holds(value)).map(repr))
    if whole:
        beyond.append(st.floats(0.1, 0.9).map(lambda part: repr((shape.limit(Ge) or 0) + part)))
    return st.one_of(*beyond)


def _parses(shape: Shape, text: str) -> bool:
    try:
        shape.find(Parsed).parse(text)
    except ValueError:
        return False
    return True


def inside(hint: Any) -> st.SearchStrategy[str]:
    """Texts that the field takes, whatever the others are; small numbers are likelier than large ones."""
    shape = shape_of(hint)
    if (parts := elements_of(shape)) is None:
        found = inside_of(shape)
    elif Ellipsis in get_args(shape.kind):
        found = st.lists(inside_of(parts[0]), min_size=1, max_size=3).map(",".join)
    else:
        found = st.tuples(*map(inside_of, parts)).map(",".join)
    return st.one_of(st.just("none"), found) if shape.optional else found


def inside_of(shape: Shape) -> st.SearchStrategy[str]:
    if get_origin(shape.kind) is Literal:
        return st.sampled_from(get_args(shape.kind))
    if shape.kind is bool:
        return st.sampled_from(["true", "false"])
    assert shape.kind in (int, float), f"there is no text that every field of {shape} takes"
    if (chosen := shape.find(OneOf)) is not None:
        return st.sampled_from(chosen.choices).map(repr)
    low, high = (shape.limit(Ge, Gt), shape.limit(Le, Lt))
    if shape.kind is int:
        return st.integers(low, min(high, low + 40)).map(repr)
    spread = st.floats(low, min(high, low + 10), allow_nan=False).filter(shape.holds)
    return spread.map(repr)
