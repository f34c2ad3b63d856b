"""What a run writes down: `log.jsonl` (one JSON object a line), and the same rows for TensorBoard and other loggers.

The log is the source and TensorBoard's events are a picture of it: a run that is resumed makes them anew from the rows
that count, so each step and epoch is shown once however often the run was killed. What other loggers were shown stays:
they are given the rows that were not in the log before.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pss.runs import loggers, records
from pss.runs.board import Board
from pss.runtime import files

LOG = "log.jsonl"
ABANDONED = "log.abandoned.jsonl"
BOARD = "tensorboard"
AUGMENTED = "augmented.png"

_EVENTS = "TensorBoard events"
_log = logging.getLogger(__name__)


class RunLog:
    """Appends rows to `log.jsonl` and shows them to loggers. A resumed run first takes out what came after its
    checkpoint, which goes to `log.abandoned.jsonl`: steps were trained, and perhaps a loss diverged in them.

    Rows that cannot be written are kept and tried again with the next one; none is written in part.
    """

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        """Raises `OSError` where the log of a resumed run cannot be rewritten."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._resume_step = folder / LOG, resume_step
        kept: list[dict[str, Any]] = []
        self._shown: set[tuple[str, int]] = set()
        if self._path.exists():
            rows = read_rows(folder)
            kept = [row for row in rows if row["step"] <= resume_step]
            before = [*rows, *read_rows(folder, name=ABANDONED)]
            self._shown = {(row["kind"], row["step"]) for row in before if row["kind"] != "start"}
            _keep_aside(folder / ABANDONED, [row for row in rows if row["step"] > resume_step])
            files.write(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._size = os.fstat(self._file).st_size
        self._waiting: list[bytes] = []
        self._told: set[str] = set()
        self._kept = kept
        self._board: Board | None = None
        self._loggers: list[tuple[loggers.Apart, set[tuple[str, int]]]] = []
        """Each with the rows that it has been shown."""

    def show(self, names: Sequence[str], config: Mapping[str, Any], say: loggers.Say = loggers.nowhere) -> None:
        """Show what there is, and what will be written, to loggers (`train.loggers`); `say` prints a line."""
        folder, known = self._path.parent, loggers.keys_of(self._path.parent)
        for name in dict.fromkeys(names):
            run = loggers.Run(folder, config, known.get(name) or None, say)
            if name == loggers.TENSORBOARD:
                self._attempt(_EVENTS, partial(self._begin_board, run))
                continue
            logger = loggers.Apart(name, run)
            self._loggers.append((logger, self._shown if name in known else set()))
            if name not in known:  # it is new to the run, which may not be
                for row in self._kept:
                    logger.add(row)
                if self._resume_step > 0 and (picture := folder / AUGMENTED).is_file():
                    logger.picture(picture, 0)
        self._kept = []

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Add a row. What keeps it from being written is told once, and ends nothing."""
        # JSON has no NaN: a mean over steps that were all skipped is null.
        row = {"kind": kind, "step": step, "time": round(time.time(), 3), **records.without_nan(values)}
        self._waiting.append(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._attempt(LOG, self._flush)
        if (board := self._board) is not None:
            self._attempt(_EVENTS, lambda: board.add(row))
        for logger, shown in self._loggers:
            if (kind, step) not in shown:
                logger.add(row)

    def picture(self, content: bytes, step: int) -> None:
        """Keep a PNG of the images that the run begins with, and show it. Raises `OSError`."""
        path = self._path.parent / AUGMENTED
        files.write(path, content)
        if (board := self._board) is not None:
            self._attempt(_EVENTS, lambda: board.picture(path.stem, content, step))
        for logger, shown in self._loggers:
            if not shown:
                logger.picture(path, step)

    @property
    def unwritten(self) -> int:
        """Rows that the file does not have yet."""
        return len(self._waiting)

    def _flush(self) -> None:
        while self._waiting:
            line = self._waiting[0]
            try:
                written = os.write(self._file, line)
                if written < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                os.ftruncate(self._file, self._size)  # a full disk takes a part of a row
                raise
            self._size += len(line)
            self._waiting.pop(0)

    def _begin_board(self, run: loggers.Run) -> None:
        picture = run.folder / AUGMENTED
        known = self._resume_step > 0 and picture.is_file()
        pictures = {picture.stem: picture.read_bytes()} if known else {}
        self._board = Board(run.folder / BOARD, self._kept, settings=run.flat(), pictures=pictures)

    def _attempt(self, what: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever reports, the run goes on
            if what not in self._told:
                self._told.add(what)
                reason, folder = files.in_words(error), self._path.parent
                _log.warning("%s cannot be written to %s (%s); the run goes on", what, folder, reason)
            if what == _EVENTS:
                self._board = None  # a resume makes them anew

    def close(self) -> None:
        if self._waiting:
            self._attempt(LOG, self._flush)
        os.close(self._file)
        if self._board is not None:
            self._attempt(_EVENTS, self._board.close)
        for logger, _ in self._loggers:
            logger.close()


def read_rows(folder: Path, kind: str | None = None, *, name: str = LOG) -> list[dict[str, Any]]:
    """The rows of a run's `log.jsonl`, all or of one kind; none if there is no log. Logs which lines are no rows."""
    try:
        content = (folder / name).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return []
    rows, odd = [], []
    for number, row in _rows(content):
        if row is None:
            odd.append(number)
        elif kind in (None, row["kind"]):
            rows.append(row)
    if odd:
        lines = f"line {odd[0]}" + (f" and {len(odd) - 1} more" if len(odd) > 1 else "")
        _log.warning("%s: %s left out, cut short or damaged", folder / name, lines)
    return rows


def _rows(content: bytes) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Number and row of each line that is not empty; None for one that is no row."""
    for number, line in enumerate(content.split(b"\n"), start=1):
        stripped = line.strip(b"\0 \t\r")  # a power cut leaves NULs where blocks were not written
        if not stripped:
            continue
        try:
            row: dict[str, Any] = json.loads(stripped)
            records.check(row, records.Row, LOG, remedy="leave it out")
        except (ValueError, RecursionError):
            yield number, None
        else:
            yield number, row


def _keep_aside(path: Path, rows: list[dict[str, Any]]) -> None:
    if rows:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
