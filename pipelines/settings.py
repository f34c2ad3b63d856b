"""Settings: frozen dataclasses whose values are checked against their annotations when they are made.

A field says what it takes where it is declared, `epochs: Positive = 300`. pydantic does the checking, and converts what
is written the same way in JSON or on a command line (a list to a tuple, "0.5" to a number). A value that is refused is
a `ValueError` in one sentence that names the setting.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

if TYPE_CHECKING:
    from pydantic import ValidationError

Positive = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Probability = Annotated[float, Ge(0), Le(1)]
Share = Annotated[float, Gt(0), Le(1)]
"""Of something that cannot be left out entirely, such as the patches of an image."""
Below1 = Annotated[float, Ge(0), Lt(1)]
AboveZero = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]

Json = dict[str, Any]


class SettingError(ValueError):
    """A setting has a value that it cannot have, whatever the others are."""


class Section:
    """Base of settings; subclasses are dataclasses, `@dataclass(frozen=True, kw_only=True)`."""

    section: ClassVar[str] = ""
    """What stands before the names of the fields: `train` in `--set train.epochs=10`."""

    def __init_subclass__(cls, *, section: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        if section:
            cls.section = section

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        for name, value in _validated(type(self), given).items():
            object.__setattr__(self, name, value)  # as the dataclass itself does, being frozen
        self.check()

    def check(self) -> None:
        """Compare the settings with each other. Raises `ValueError`."""

    @classmethod
    def from_dict(cls, raw: Any) -> Self:
        """The settings that JSON holds; what is missing has its default. Raises `ValueError`."""
        if not isinstance(raw, Mapping):
            raise ValueError(f"{cls.section or 'the configuration'} is {raw!r}; it must be an object of settings")
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for key in raw:
            if key not in names:
                full = f"{cls.section}.{key}" if cls.section else str(key)
                raise ValueError(f"there is no setting {full!r}{nearest(str(key), names)}")
        own: Any = cls
        nested = {name: kind for name, kind in hints_of(own).items() if is_section(kind)}
        return cls(**{name: nested[name].from_dict(value) if name in nested else value for name, value in raw.items()})


def as_dict(section: Any) -> Json:
    """A section as dictionaries; `dataclasses.asdict` would copy the method's sections, too."""
    values = {part.name: getattr(section, part.name) for part in dataclasses.fields(section)}
    return {name: as_dict(value) if isinstance(value, Section) else value for name, value in values.items()}


def is_section(hint: Any) -> bool:
    """Whether an annotation is that of settings within settings."""
    return isinstance(hint, type) and issubclass(hint, Section)


@cache
def hints_of(kind: Any) -> dict[str, Any]:
    """The annotations of a dataclass's fields, with what they say of ranges."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def nearest(key: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown key: the nearest known one, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:
        # People often leave the section out: compare the last part on its own as well.
        last = key.split(".")[-1]
        near = [k for k in known if difflib.get_close_matches(last, [k.split(".")[-1]], cutoff=0.6)]
    return f"; did you mean {near[0]}?" if near else f"; keys are {', '.join(known)}"


def _validated(kind: Any, given: Json) -> Json:
    from pydantic import ValidationError

    try:
        checked: Json = _checker_of(kind).validate_python(given)
        return checked
    except ValidationError as error:
        raise SettingError(_sentence(kind, given, error)) from None


@cache
def _checker_of(kind: Any) -> Any:
    """pydantic's checker of a section's values, made once."""
    import pydantic
    import typing_extensions

    instance_of: Any = pydantic.InstanceOf
    typed_dict: Any = typing_extensions.TypedDict
    fields = {name: instance_of[hint] if is_section(hint) else hint for name, hint in hints_of(kind).items()}
    shape = typed_dict(kind.__name__, fields)
    return pydantic.TypeAdapter(pydantic.with_config(pydantic.ConfigDict(allow_inf_nan=False))(shape))


def _sentence(kind: Any, given: Json, error: ValidationError) -> str:
    """What is wrong with the first setting that is."""
    problem = error.errors(include_url=False)[0]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, ValueError):
        return str(cause)
    name = str(problem["loc"][0])
    full = f"{kind.section}.{name}" if kind.section else name
    return f"{full} is {given[name]!r}; it must be {_wanted(problem, hints_of(kind)[name])}"


def _wanted(problem: Any, hint: Any) -> str:
    """What a value must be, in words."""
    limits = problem.get("ctx", {})
    kind: str = problem["type"]
    if kind == "literal_error":
        return "one of " + str(limits["expected"]).replace("'", "").replace(" or ", ", ")
    count = len(get_args(hint)) if get_origin(hint) is tuple and Ellipsis not in get_args(hint) else ""
    several = f"{count} numbers with commas between them".lstrip()
    words = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "string": "a text",
        "tuple": several,
        "finite": "a finite number",
        "greater_than_equal": f"at least {limits.get('ge')}",
        "greater_than": f"above {limits.get('gt')}",
        "less_than_equal": f"at most {limits.get('le')}",
        "less_than": f"below {limits.get('lt')}",
        "missing": several,
        "too_long": several,
    }
    fitting = [word for start, word in words.items() if kind == start or kind.startswith(f"{start}_")]
    return fitting[0] if fitting else str(problem["msg"]).removeprefix("Input should be ")
