"""TensorBoard events of a run's rows, written when they are asked for: torch's own writer has a thread that dies of a
full disk with a traceback, and keeps what it has for two minutes.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from pss.runs.loggers import scalars

PATTERN = "events.out.tfevents.*"

_METRICS = ("epoch/top1", "epoch/val_loss")


class Board:
    """One file of events, in the place of all that were there before."""

    def __init__(
        self,
        folder: Path,
        rows: Iterable[Mapping[str, Any]] = (),
        *,
        settings: Mapping[str, Any] | None = None,
        pictures: Mapping[str, bytes] | None = None,
    ) -> None:
        """Write the settings, by their full names, the pictures and those of `rows`, then remove earlier files. Raises
        `OSError`."""
        folder.mkdir(parents=True, exist_ok=True)
        before = list(folder.glob(PATTERN))
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._file = (folder / name).open("wb")
        self._records = RecordWriter(self._file)
        with self._closing_on_error():
            self._records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
            for summary in _of_settings(settings or {}):
                self._put(summary, 0)
            for title, content in (pictures or {}).items():
                self._put(_of_picture(title, content), 0)
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

    def picture(self, title: str, content: bytes, step: int) -> None:
        """Show a PNG. Raises `OSError`; nothing more can be added then."""
        with self._closing_on_error():
            self._put(_of_picture(title, content), step)
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
        if values := [Summary.Value(tag=name, simple_value=value) for name, value in scalars(row).items()]:
            self._put(Summary(value=values), row["step"], row.get("time"))

    def _put(self, summary: Any, step: int, at: float | None = None) -> None:
        event = Event(wall_time=time.time() if at is None else at, step=step, summary=summary)
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        self._file.close()


def _of_settings(settings: Mapping[str, Any]) -> list[Any]:
    """What fills TensorBoard's table of hyper-parameters, and its page of texts."""
    if not settings:
        return []
    import torch.utils.tensorboard.summary as of_torch

    hparams: Any = of_torch.hparams
    text: Any = of_torch.text

    plain = {
        name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in settings.items()
    }
    lines = "".join(f"    {name} = {value}\n" for name, value in plain.items())  # indented, it is shown as it stands
    return [*hparams(plain, dict.fromkeys(_METRICS, 0.0)), text("settings", lines)]


def _of_picture(title: str, content: bytes) -> Any:
    width, height = struct.unpack(">II", content[16:24])  # where every PNG has them
    image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=content)
    return Summary(value=[Summary.Value(tag=title, image=image)])
