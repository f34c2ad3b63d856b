"""A conversion of class folders, up to the plan of its tars. The images are not looked at: a stand-in says of every one
of them what checking it would."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from pipelines.conversion import work
from pipelines.conversion.convert import convert
from pipelines.conversion.options import Options
from pipelines.conversion.scan import CHECKED
from tools.scale.processes import Task, serve


class _Planned(BaseException):
    """The tars are planned; they are not written."""


class _Silent:
    def start(self, phase: str, total: int) -> None:
        pass

    def advance(self, images: int) -> None:
        pass


def planned(task: Task, mark: Callable[[str], None]) -> Task:
    """Convert until the first tar would be written."""
    shards = 0

    def run(crew: work.Crew, phase: str, function: Any, tasks: Sequence[Any], *_: Any, **__: Any) -> None:
        nonlocal shards
        mark(phase.partition("-")[0])
        if not phase.startswith("check"):
            shards = len(tasks)
            raise _Planned
        for path, chunk in zip(crew.paths(phase, len(tasks)), tasks, strict=True):
            path.write_bytes(_checked(len(chunk)))
        mark("checked")

    # What is measured is the rest: no process checks images, and there is always room.
    work.Crew.run = run
    shutil.disk_usage = lambda _: shutil._ntuple_diskusage(1 << 60, 0, 1 << 60)
    dest = Path(task["dest"])
    try:
        convert(task["source"], dest, Options(formats=("dali",)), _Silent(), lambda _: mark("told"))
        _missed()
    except _Planned:
        listing = (dest.with_name(f".{dest.name}.partial") / "work" / "listing.sha256").read_text()
    finally:
        shutil.rmtree(dest.with_name(f".{dest.name}.partial"))
    return {"shards": shards, "listing": listing}


def _checked(count: int) -> bytes:
    random = np.random.default_rng(0)
    rows = np.zeros(count, dtype=CHECKED)
    rows["height"], rows["width"], rows["crc32"] = random.integers(300, 500, (3, count))
    rows["bytes"], rows["good"] = random.integers(10_000, 200_000, count), True
    content = io.BytesIO()
    np.save(content, rows)
    return content.getvalue() + b'{"reasons": {}, "warned": {}}'


def _missed() -> NoReturn:
    raise AssertionError("no tar was planned")


if __name__ == "__main__":
    serve(planned)
