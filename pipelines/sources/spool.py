"""Sources whose images do not lie in their files as they are: copied once into a file in which they do.

Training images are written in shuffled order, so every one of them must be within reach at any time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pipelines.base import DataError
from pipelines.sources.sample import Sample
from pipelines.storage.locks import NoLocks, lock


class Spool:
    """A folder for such files. A finished one is used again by a conversion that continues."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self, split: str, images: Iterable[tuple[str, int, bytes]], expected_bytes: int = 0) -> list[Sample]:
        """Write the (name, label, encoded image) of `images`, or find that it has been done."""
        data, index = self.folder / f"spool-{split}", self.folder / f"spool-{split}.json"
        with (self.folder / f"spool-{split}.lock").open("w") as file:
            with suppress(NoLocks):  # then there are no other parts of the same conversion that may be at it
                lock(file)
            if not index.exists():
                self._write(data, index, images, expected_bytes)
        rows = json.loads(index.read_text())
        return [Sample(name, label, str(data), offset, length) for name, label, offset, length in rows]

    def _write(self, data: Path, index: Path, images: Iterable[tuple[str, int, bytes]], expected_bytes: int) -> None:
        if (free := shutil.disk_usage(self.folder).free) < expected_bytes:
            raise DataError(
                f"{self.folder.parent.parent} has {free >> 20} MiB left, but a copy of the source needs "
                f"{expected_bytes >> 20} MiB beside the result; make room"
            )
        rows, at = [], 0
        with data.open("wb") as file:
            for name, label, encoded in images:
                file.write(encoded)
                rows.append((name, label, at, len(encoded)))
                at += len(encoded)
            file.flush()
            os.fsync(file.fileno())
        unfinished = index.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(rows))
        unfinished.replace(index)
