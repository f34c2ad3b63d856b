"""`pss.convert`: images turned into the files that training loaders read, as `pss-convert` does it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.conversion import convert as conversion
from pipelines.conversion.options import PROFILES, Options
from pipelines.conversion.processes import Progress
from pipelines.remote.store import is_url
from pipelines.storage.manifest import Manifest


@dataclass(frozen=True)
class Converted:
    """A converted data set."""

    folder: Path | str
    """Or the address."""
    manifest: Manifest
    """`dataset.json`: splits, classes, files with their checksums, and the account of what was found."""

    def table(self) -> str:
        """Images by split and class, tab-separated."""
        splits = self.manifest.splits
        lines = ["\t".join(["class", *splits])]
        for label, name in enumerate(self.manifest.classes):
            lines.append("\t".join([name, *(str(part.per_class[label]) for part in splits.values())]))
        return "\n".join(lines) + "\n"


class _Silent:
    def start(self, phase: str, total: int) -> None:
        pass

    def advance(self, images: int) -> None:
        pass


def convert(
    source: str | Path,
    dest: str | Path,
    formats: str | Sequence[str] = "dali",
    *,
    profile: str | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> Converted:
    """Check every image of a source and write it for DALI (tars, original bytes) or FFCV (.beton).

    Args:
        source: a folder, an archive, an address of one such as s3://bucket/photos, or the word `digits`.
        dest: the new folder, or an address.
        formats: `dali`, `ffcv`, or both with a comma between them.
        profile: for FFCV, one of `pipelines.conversion.options.PROFILES`.
        progress: hears how it is getting on.
        say: hears what is worth a line; it goes to stderr by default.
        options: the others of `pipelines.conversion.options.Options`; all cores work unless `jobs` says otherwise.

    Raises:
        DataError: what is wrong with the source.
        ValueError: an option that there is not, or that cannot be.
    """
    if isinstance(formats, str):
        formats = formats.split(",")
    if profile is not None:
        if profile not in PROFILES or options.keys() & {"max_size", "store"}:
            raise ValueError(f"profile is {profile!r}; use {', '.join(PROFILES)}, without max_size and store")
        options["max_size"], options["store"] = PROFILES[profile]
    known = [name for name in Options.__dataclass_fields__ if name not in ("formats", "part")]
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"there is no option {unknown[0]!r}; options are {', '.join(known)}")
    if options.get("work_dir") is not None:
        options["work_dir"] = Path(options["work_dir"])
    options.setdefault("jobs", len(os.sched_getaffinity(0)))
    chosen: Any = tuple(dict.fromkeys(formats))
    tell = say if say is not None else (lambda line: print(line, file=sys.stderr))
    where = str(dest) if is_url(dest) else Path(dest)
    made = conversion.convert(str(source), where, Options(formats=chosen, **options), progress or _Silent(), tell)
    assert made is not None, "only a part of a conversion ends without a manifest"
    return Converted(where, made)
