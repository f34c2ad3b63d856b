"""TensorBoard events of a run's rows, written when they are asked for: torch's own writer has a thread that dies of a
full disk with a traceback, and keeps what it has for two minutes.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

PATTERN = "events.out.tfevents.*"

_KINDS = ("step", "epoch")
_NO_SCALARS = ("kind", "step", "time")


class Board:
    """One file of events, in the place of all that were there before."""

    def __init__(self, folder: Path, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        """Write those of `rows`, then remove earlier files. Raises `OSError`."""
        folder.mkdir(parents=True, exist_ok=True)
        before = list(folder.glob(PATTERN))
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._file = (folder / name).open("wb")
        self._records = RecordWriter(self._file)
        with self._closing_on_error():
            self._records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
            for row in rows:
                self._add(row)
            self._file.flush()
        for old in before:
            old.unlink(missing_ok=True)

    def add(self, row: Mapping[str, Any]) -> None:
        """Show a row of the log. Raises `OSError`; nothing more can be added then."""
        with self._closing_on_error():
            self._add(row)
            self._file.flush()

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            with suppress(OSError):  # it tries once more to write what it could not
                self._file.close()
            raise

    def _add(self, row: Mapping[str, Any]) -> None:
        values = [
            Summary.Value(tag=f"{row['kind']}/{name}", simple_value=value)
            for name, value in row.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name not in _NO_SCALARS
        ]
        if row["kind"] in _KINDS and values:
            event = Event(wall_time=row.get("time", time.time()), step=row["step"], summary=Summary(value=values))
            self._records.write(event.SerializeToString())

    def close(self) -> None:
        self._file.close()
