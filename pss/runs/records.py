"""What the files of a run hold beside tensors, and what is said of one that does not.

`config.json`, `best.json`, `summary.json`, each row of `log.jsonl` and the plain part of a checkpoint have one schema
each. All carry the number of their format: a file of a later one is refused, not misread.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired

from annotated_types import Ge
from typing_extensions import TypedDict  # pydantic reads that of typing from Python 3.12 on only

from pss.runtime import files
from pss.version import __version__

if TYPE_CHECKING:
    from pydantic import TypeAdapter

FORMAT = 1
"""Of everything that a run writes. Files from before there were numbers are read as of the first one."""

_Natural = Annotated[int, Ge(0)]
_Positive = Annotated[int, Ge(1)]

STAMP: dict[str, Any] = {"format": FORMAT, "version": __version__}
"""What every file begins with."""


class Versioned(TypedDict):
    """What every file has."""

    format: NotRequired[_Positive]
    version: NotRequired[str]


class Checkpoint(Versioned):
    """The state of a run. Tensors are in `method`, `ema` and `optimizer`."""

    config: dict[str, Any]
    classes: list[str]
    step: _Natural
    epoch: _Natural
    phase: _Natural
    world_size: _Positive
    continuation: NotRequired[_Natural]
    """How often the run went back to an epoch's end because other processes or another loader went on with it."""
    loader: dict[str, Any]
    skipped: Any
    teachers: NotRequired[dict[str, str]]
    method: dict[str, Any]
    ema: dict[str, Any] | None
    optimizer: dict[str, Any]
    measured: NotRequired[dict[str, Any]]
    """Times and sums for the log (`pss.training.reporting`): the one part that differs between equal runs."""


class Best(Versioned):
    """`best.json`: the checkpoint of the best validation."""

    file: str
    step: _Natural
    score: float
    weights: NotRequired[Literal["method", "ema"]]
    """Whether the weights scored so, or their moving average."""


class Row(TypedDict):
    """A line of `log.jsonl`; what else is in it depends on its kind."""

    kind: str
    step: _Natural


class LaterVersion(ValueError):
    """A file was written by a later version; it is neither damaged nor edited."""


def check(raw: Any, kind: Any, path: str | Path, *, remedy: str) -> Any:
    """`raw`, which was read from `path`, if it is of a kind that this version knows.

    Raises:
        ValueError: it was written by a later version, or has been edited or damaged; `remedy` says what to do then.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"{path} holds no object of named values; {remedy}")
    refuse_later(raw, path)
    from pydantic import ValidationError

    try:
        return _checker(kind).validate_python(raw)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "it"
        raise ValueError(f"{path} was edited or damaged ({where}: {problem['msg'].lower()}); {remedy}") from None


def refuse_later(raw: Mapping[Any, Any], path: str | Path) -> None:
    """Raise `LaterVersion` for what one wrote."""
    number = raw.get("format", FORMAT)
    if isinstance(number, int) and number > FORMAT:
        raise LaterVersion(
            f"{path} was written by a later version of pss ({raw.get('version', 'unknown')}, format {number}; this is "
            f"{__version__}, format {FORMAT}); update pss to read it"
        )


def read(path: Path, kind: Any, *, remedy: str) -> Any:
    """A JSON file of that kind. Raises `ValueError` as `check` does, and `FileNotFoundError`."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}); {remedy}") from None
    return check(raw, kind, path, remedy=remedy)


def write(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file, stamped, whole or not at all. Raises `OSError`."""
    text = json.dumps({**STAMP, **without_nan(values)}, indent=2, ensure_ascii=False, allow_nan=False)
    files.write(path, text + "\n")


def without_nan(value: Any) -> Any:
    """`value` with None in the place of numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: without_nan(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@cache
def _checker(kind: Any) -> TypeAdapter[Any]:
    import pydantic

    return pydantic.TypeAdapter(pydantic.with_config(pydantic.ConfigDict(extra="allow", strict=True))(kind))
