"""The stored images of a split as a teacher sees them: whole, both sides scaled to its square, whatever their shape.

So a place of the teacher's grid is the same share of every image, and a window, which is told in such shares, is one of
the map. The frame is that of `pipelines.base.View`: EXIF orientation is ignored.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.base import DataError
from pipelines.conversion.scan import decode_rgb
from pipelines.storage.beton import RAW, STORED, stored_path
from pipelines.storage.source import ConvertedTable, TarSource
from pipelines.storage.unreadable import UNREADABLE, unreadable

_AHEAD = 3  # batches that are decoded before they are asked for


class SeenImages:
    """Of a converted data set; FFCV's copies are taken only where there are no others."""

    def __init__(self, root: Path, split: str, side: int, resampling: int, *, square: bool) -> None:
        """`side` in pixels; `resampling` is Pillow's number of a filter. `DataError` if there is no such split."""
        self._side, self._square = side, square
        self._resampling = Image.Resampling(resampling)
        table = ConvertedTable(root, split)
        self._tars = TarSource(root, split) if table.entry.shards else None
        self.labels, self.name = table.labels, table.name if self._tars is None else self._tars.name
        if self._tars is None:
            assert table.entry.beton is not None
            self._beton = root / table.entry.beton
            self._rows = table.load_table(stored_path(self._beton).name, STORED)

    def read(self, i: int) -> NDArray[np.uint8]:
        """(side, side, 3)."""
        pixels = self._stored(i)
        height, width = pixels.shape[:2]
        box = (0.0, 0.0, float(width), float(height))
        if self._square:
            shorter = min(height, width)
            box = ((width - shorter) / 2, (height - shorter) / 2, (width + shorter) / 2, (height + shorter) / 2)
        scaled = Image.fromarray(pixels).resize((self._side, self._side), self._resampling, box=box)
        return np.asarray(scaled)

    def _stored(self, i: int) -> NDArray[np.uint8]:
        encoded = self._tars.read(i).tobytes() if self._tars is not None else self._payload(i)
        if self._tars is None and self._rows["mode"][i] == RAW:
            return np.frombuffer(encoded, np.uint8).reshape(self._rows["height"][i], self._rows["width"][i], 3)
        try:
            return decode_rgb(encoded)
        except UNREADABLE as error:
            raise unreadable(self.name(i), len(encoded), error) from error

    def _payload(self, i: int) -> bytes:
        row = self._rows[i]
        with self._beton.open("rb") as file:
            file.seek(int(row["ptr"]))
            content = file.read(int(row["size"]))
        if zlib.crc32(content) != row["crc32"]:
            raise DataError(f"{self._beton}, sample {i} has been damaged since the conversion; copy the file again")
        return content

    def batches(self, batches: Sequence[range], jobs: int) -> Iterator[NDArray[np.uint8]]:
        """(B, side, side, 3) of each batch of samples; `jobs` threads decode some batches ahead."""
        waiting: deque[list[Future[NDArray[np.uint8]]]] = deque()
        pool = ThreadPoolExecutor(jobs)
        try:
            coming = iter(batches)
            for batch in islice(coming, _AHEAD):
                waiting.append([pool.submit(self.read, i) for i in batch])
            while waiting:
                images = np.stack([future.result() for future in waiting.popleft()])
                for batch in islice(coming, 1):
                    waiting.append([pool.submit(self.read, i) for i in batch])
                yield images
        finally:
            pool.shutdown(cancel_futures=True)
