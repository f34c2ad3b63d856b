"""JSON that others may have written: bounded in size, and checked as a whole before anything of it is used."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import is_typeddict

from pipelines.base import DataError, in_words

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MAX_BYTES = 256 << 20
"""Of a file; the manifest of ten thousand tars has two million."""


def read_json(path: Path, kind: Any, *, remedy: str) -> Any:
    """The content of a file, if it is of `kind`, a type that pydantic knows; further keys are let be.

    Raises:
        DataError: it cannot be read, is too large, or is not of that kind; `remedy` says what to do then.
    """
    try:
        content = bounded(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({in_words(error)}); {remedy}") from error
    if content is None:
        raise DataError(f"{path} is no plain file of at most {MAX_BYTES >> 20} MiB; {remedy}")
    return parse_json(content, kind, f"{path}", remedy=remedy)


def bounded(path: Path, most: int = MAX_BYTES) -> bytes | None:
    """The content of a plain file of at most so many bytes; None for another one, and for what is no file: a pipe would
    be waited for, and a device read, for ever."""
    if not path.is_file():
        path.stat()  # raises where it is not there
        return None
    with path.open("rb") as file:
        content = file.read(most + 1)
    return content if len(content) <= most else None


def parse_json(content: bytes, kind: Any, what: str, *, remedy: str) -> Any:
    """`content` as JSON, if it is of `kind`; `DataError` as `read_json`, of `what`."""
    try:
        raw = json.loads(content, parse_constant=int)  # which NaN and Infinity are not
    except RecursionError as error:
        raise DataError(f"{what} is damaged (nested too deeply); {remedy}") from error
    except ValueError as error:
        raise DataError(f"{what} is damaged ({in_words(error)}); {remedy}") from error
    return checked(raw, kind, what, remedy=remedy)


def checked(raw: Any, kind: Any, what: str, *, remedy: str) -> Any:
    """`raw`, if it is of `kind`; `DataError` as `read_json`, of `what`."""
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_python(raw)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "it"
        raise DataError(f"{what} is damaged ({where}: {problem['msg'].lower()}); {remedy}") from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    import pydantic

    config = pydantic.ConfigDict(extra="allow", strict=True)
    if is_typeddict(kind):
        return pydantic.TypeAdapter(pydantic.with_config(config)(kind))
    return pydantic.TypeAdapter(kind, config=config)
