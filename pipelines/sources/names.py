"""Which split a file belongs to, by its name or its folder's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pipelines.base import DataError
from pipelines.sources.sample import UNSPLIT
from pipelines.storage.manifest import SPLIT_ALIASES


def by_split(source: Path, paths: Sequence[Path]) -> dict[str, list[Path]]:
    """`train-*`, `validation-*` and so on by split; if no name says anything, all are `UNSPLIT`.

    Where validation and test files are both present, validation it is: the labels of test files are often secret.
    """
    found: dict[str, list[Path]] = {}
    for path in paths:
        found.setdefault(_alias(source, path) or UNSPLIT, []).append(path)
    if UNSPLIT in found and len(found) > 1:
        raise DataError(f"{found[UNSPLIT][0]} is of no known split, others in {source} are; rename or move it")
    splits: dict[str, list[Path]] = {}
    for split, aliases in SPLIT_ALIASES.items():
        if named := next((alias for alias in aliases if alias in found), None):
            splits[split] = found[named]
    return splits or found


def _alias(source: Path, path: Path) -> str | None:
    aliases = {alias for names in SPLIT_ALIASES.values() for alias in names}
    parts = path.relative_to(source).parts if source.is_dir() else (path.name,)
    for part in reversed(parts):
        word = re.split(r"[-_.0-9]", part, maxsplit=1)[0].lower()
        if word in aliases:
            return word
    return None
