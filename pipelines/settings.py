"""Settings: frozen dataclasses whose values are checked against their annotations when they are made.

A field says what it takes where it is declared, and when anything reads it: `epochs: Always[Positive] = 300`. pydantic
does the checking, and converts what is written the same way in JSON or on a command line (a list to a tuple, "0.5" to a
number). A value that is refused is a `ValueError` in one sentence that names the setting.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeVar, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, ValidationError

T = TypeVar("T")
Json = dict[str, Any]


class SettingError(ValueError):
    """A setting has a value that it cannot have, whatever the others are, or one that nothing reads."""


# What a field takes.

Positive = Annotated[int, Ge(1), Le(10**9)]
Natural = Annotated[int, Ge(0), Le(10**9)]
Probability = Annotated[float, Ge(0), Le(1)]
Share = Annotated[float, Gt(0), Le(1)]
"""Of something that cannot be left out entirely, such as the patches of an image."""
Below1 = Annotated[float, Ge(0), Lt(1)]
AboveZero = Annotated[float, Gt(0), Le(1e30)]
NotNegative = Annotated[float, Ge(0), Le(1e30)]


@dataclass(frozen=True)
class OneOf:
    """In an annotation: the numbers that a field takes."""

    choices: tuple[float, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        def check(value: float) -> float:
            if value not in self.choices:
                raise _Unfit(f"; it must be one of {', '.join(map(str, self.choices))}")
            return value

        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(check, handler(source))


@dataclass(frozen=True)
class Parsed:
    """In an annotation: what makes something of the text that a field takes; it raises `ValueError` where it cannot."""

    parse: Callable[[str], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        def check(value: str) -> str:
            try:
                self.parse(value)
            except ValueError as error:
                raise _Unfit(f": {error}") from None
            return value

        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(check, handler(source))


def _plain_text(text: str) -> None:
    if not text.strip() or not text.isprintable() or len(text) > 4096:
        raise ValueError("write a name, of at most 4,096 printable characters")


Text = Annotated[str, Parsed(_plain_text)]
"""A name or a path."""


@dataclass(frozen=True)
class Remedy:
    """In an annotation: what to say beside the range to one who missed it."""

    text: str


class _Unfit(ValueError):
    """The end of the sentence about a value, after the value."""


# Who reads a field.


@dataclass(frozen=True)
class Context:
    """What decides whether a setting is read."""

    own: Any
    """The section that it is in."""
    run: Any = None
    """All settings of the run."""
    method: Any = None
    """The class of the run's method."""
    preset: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the model's name brings along beside a plain model."""
    device: str | None = None
    """The kind of device, `cuda` or `cpu`; None while it is not known."""
    backends: frozenset[str] | None = None
    """Of the loaders; None while they are not known."""


@dataclass(frozen=True)
class ReadIf:
    """In an annotation: whether anything reads the field. One that nothing reads has its default, or is refused."""

    holds: Callable[[Context], Any]
    reader: str
    """What would read it, as the end of a sentence says it."""


ALWAYS = ReadIf(lambda at: True, "")
Always = Annotated[T, ALWAYS]


@dataclass(frozen=True)
class Unread:
    """A setting that nothing reads."""

    section: Section
    name: str
    default: Any
    reader: str

    @property
    def full_name(self) -> str:
        return f"{self.section.section}.{self.name}"

    @property
    def value(self) -> Any:
        return getattr(self.section, self.name)

    @property
    def asks(self) -> bool:
        """Whether one who wrote the value can have meant anything by it: to leave off what is off is no mistake."""
        return bool(self.value != self.default or self.value)

    def error(self) -> SettingError:
        return SettingError(
            f"{self.full_name} is {_shown(self.value)}, which nothing reads in this run: {self.reader} would read it; "
            f"set that too, or leave {self.full_name} out"
        )


def unread(run: Section, **known: Any) -> Iterator[Unread]:
    """The settings of a run that nothing reads, whatever their values; `known` is the rest of `Context`."""
    for section in sections_of(run):
        yield from unread_at(Context(section, run, **known))


def unread_at(at: Context) -> Iterator[Unread]:
    """Of the section `at.own`, the settings that nothing reads."""
    kind: Any = type(at.own)
    hints = hints_of(kind)
    for field in dataclasses.fields(at.own):
        for condition in read_ifs(hints[field.name]):
            if not condition.holds(at):
                yield Unread(at.own, field.name, field.default, condition.reader)
                break


def sections_of(section: Section) -> Iterator[Section]:
    """The sections within one, and those within them."""
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        value = getattr(section, field.name)
        if field.name == "spare":
            continue
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, Section):
                yield one
                yield from sections_of(one)


def read_ifs(hint: Any) -> tuple[ReadIf, ...]:
    """What an annotation says of who reads the field."""
    return tuple(part for part in getattr(hint, "__metadata__", ()) if isinstance(part, ReadIf))


def forget(found: Unread) -> None:
    """Give a setting of a draft its default."""
    object.__setattr__(found.section, found.name, found.default)


class Section:
    """Base of settings; subclasses are dataclasses, `@dataclass(frozen=True, kw_only=True)`."""

    section: ClassVar[str] = ""
    """What stands before the names of the fields: `train` in `--set train.epochs=10`."""
    in_epochs: ClassVar[tuple[str, ...]] = ()
    """Which fields count epochs of the run: they take the same share of a longer or a shorter one."""

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
        nested = cls._nested(raw)
        return cls(**{name: nested[name].from_dict(value) if name in nested else value for name, value in raw.items()})

    @classmethod
    def draft(cls, raw: Any) -> Self:
        """As `from_dict`, with values that are checked one by one, and not compared. Raises `ValueError`."""
        nested, made = cls._nested(raw), object.__new__(cls)
        values = {}
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            if field.name in raw:
                value = raw[field.name]
                values[field.name] = nested[field.name].draft(value) if field.name in nested else value
            elif field.default_factory is not dataclasses.MISSING:
                values[field.name] = field.default_factory()
            else:
                values[field.name] = field.default
        for name, value in _validated(cls, values).items():
            object.__setattr__(made, name, value)
        return made

    @classmethod
    def _nested(cls, raw: Any) -> dict[str, Any]:
        """The fields that are sections, by name. Raises `ValueError` where `raw` is not what a section is made from."""
        if not isinstance(raw, Mapping):
            raise ValueError(f"{cls.section or 'the configuration'} is {raw!r}; it must be an object of settings")
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for key in raw:
            if key not in names:
                full = f"{cls.section}.{key}" if cls.section else str(key)
                raise ValueError(f"there is no setting {full!r}{nearest(str(key), names)}")
        own: Any = cls
        return {name: kind for name, kind in hints_of(own).items() if is_section(kind)}


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
    problems = error.errors(include_url=False)
    problem = next((one for one in problems if one["type"] in ("missing", "too_long")), problems[0])
    name = str(problem["loc"][0])
    full = f"{kind.section}.{name}" if kind.section else name
    begin = f"{full} is {_shown(given[name])}"
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, _Unfit):
        return f"{begin}{cause}"
    if isinstance(cause, ValueError):
        return str(cause)
    hint = hints_of(kind)[name]
    within = any(isinstance(place, int) for place in problem["loc"][1:])
    remedy = next((f" ({part.text})" for part in getattr(hint, "__metadata__", ()) if isinstance(part, Remedy)), "")
    return f"{begin}; {'each' if within else 'it'} must be {_wanted(problem, _bare(hint))}{remedy}"


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}…"


def _bare(hint: Any) -> Any:
    """An annotation without what is said beside its type."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


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
        "greater_than_equal": f"at least {_number(limits.get('ge'))}",
        "greater_than": f"above {_number(limits.get('gt'))}",
        "less_than_equal": f"at most {_number(limits.get('le'))}",
        "less_than": f"below {_number(limits.get('lt'))}",
        "missing": several,
        "too_long": several,
    }
    fitting = [word for start, word in words.items() if kind == start or kind.startswith(f"{start}_")]
    return fitting[0] if fitting else str(problem["msg"]).removeprefix("Input should be ")


def _number(limit: Any) -> str:
    return f"{limit:g}" if isinstance(limit, float) else f"{limit}"
