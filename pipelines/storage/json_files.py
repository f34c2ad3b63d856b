"""temporary"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines.base import DataError


def parse_json(content: bytes, kind: Any, what: str, *, remedy: str) -> Any:
    import pydantic

    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is damaged; {remedy}") from error
    try:
        return pydantic.TypeAdapter(
            pydantic.with_config(pydantic.ConfigDict(extra="allow", strict=True))(kind)
        ).validate_python(raw)
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "it"
        raise DataError(f"{what} is damaged ({where}: {problem['msg'].lower()}); {remedy}") from None


def read_json(path: Path, kind: Any, *, remedy: str) -> Any:
    return parse_json(path.read_bytes(), kind, str(path), remedy=remedy)
