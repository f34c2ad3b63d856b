"""What a run writes down: `log.jsonl` (one JSON object a line) and TensorBoard events."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """Appends rows to `log.jsonl` and TensorBoard. A resumed run first drops what came after its checkpoint."""

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        self._path = folder / "log.jsonl"
        if self._path.exists():
            _drop_rows_after(self._path, resume_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step or None)

    def write(self, kind: str, step: int, **values: Any) -> None:
        # JSON has no NaN: a mean over steps that were all skipped is null.
        known = {
            name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()
        }
        row = {"kind": kind, "step": step, **known}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_rows(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of a run's `log.jsonl`, all or of one kind."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if kind in (None, row["kind"])]


def _drop_rows_after(path: Path, step: int) -> None:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that was being written when the run was killed
        if row["step"] <= step:
            kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)
    os.sync()
