"""Images encoded for FFCV and put into a `.beton` file, so that the same images always give the same bytes.

FFCV's own writer fills pages in whatever order its processes reach them, and waits for ever for one that has died.
"""

from __future__ import annotations

import os
import uuid
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.conversion.processes import beat
from pipelines.conversion.scan import ImageFile, decode_rgb
from pipelines.conversion.shards import write_rows
from pipelines.conversion.work import Finished, load_finished
from pipelines.extras import require
from pipelines.sources.columns.samples import reading
from pipelines.storage.beton import (
    FIELD,
    HEADER,
    JPEG,
    METADATA,
    RAW,
    STORED,
    allocation_table,
    header,
    metadata,
    page_size,
    stored_path,
)
from pipelines.storage.manifest import FileEntry

Store = Literal["jpg", "mix", "raw"]


@dataclass(frozen=True)
class Piece:
    """Consecutive samples to be encoded."""

    data: str  # file for the encoded images, one behind the other
    images: Sequence[ImageFile]
    raw: NDArray[np.bool_]  # which of them are stored as pixels
    max_size: int
    quality: int


def plan_raw(num_samples: int, store: Store, seed: int) -> NDArray[np.bool_]:
    """Which samples are stored as pixels: none, all, or in `mix` each with probability one half."""
    if store != "mix":
        return np.full(num_samples, store == "raw")
    drawn: NDArray[np.bool_] = np.random.Generator(np.random.Philox(key=[seed, 2])).random(num_samples) < 0.5
    return drawn


def encode_piece(piece: Piece) -> Finished:
    """Decode, scale down and encode as FFCV's writer does; rows of STORED without the place in the file."""
    rows = np.zeros(len(piece.images), dtype=STORED)
    data = Path(piece.data)
    unfinished = data.with_name(f"{data.name}.{uuid.uuid4().hex}.unfinished")
    with unfinished.open("wb") as file:
        reads = reading([image.sample for image in piece.images], beat)
        for i, (image, raw, read) in enumerate(zip(piece.images, piece.raw.tolist(), reads, strict=True)):
            pixels = _scaled(image, image.read(read), piece.max_size)
            payload = pixels.tobytes() if raw else _jpeg(pixels, piece.quality)
            file.write(payload)
            height, width = pixels.shape[:2]
            rows[i] = (0, len(payload), RAW if raw else JPEG, width, height, zlib.crc32(payload))
            beat()
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(data)
    return Finished(rows)


def opencv() -> Any:
    """The module; `DataError` where it is missing."""
    cv2 = require("cv2", "ffcv", "--format ffcv")
    cv2.setNumThreads(0)
    return cv2


def too_narrow(rows: NDArray[Any], max_size: int) -> NDArray[np.bool_]:
    """Of which images nothing would be left of the shorter side; `rows` with `height` and `width`."""
    height, width = rows["height"].astype(np.int64), rows["width"].astype(np.int64)
    narrow: NDArray[np.bool_] = np.minimum(height, width) * max_size < np.maximum(height, width)
    return narrow


def _scaled(image: ImageFile, encoded: bytes, max_size: int) -> NDArray[np.uint8]:
    height, width = image.height, image.width
    pixels = decode_rgb(encoded)
    ratio = max_size / max(height, width)
    if ratio >= 1:
        return pixels
    cv2 = opencv()
    # float64 first, as FFCV has it: the products decide which way a size is cut
    size = (ratio * np.array([width, height])).astype(int).tolist()
    scaled: NDArray[np.uint8] = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return scaled


def _jpeg(pixels: NDArray[np.uint8], quality: int) -> bytes:
    cv2 = opencv()
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    content: bytes = encoded.tobytes()
    return content


class BetonFile:
    """Puts pieces together in their order as they get finished.

    A piece's data is deleted once it is on the disk in the file. Its result stays, and from it its place is known:
    after an interruption, the pieces that still have data are written to where they belong.
    """

    def __init__(self, path: Path, results: Sequence[Path], data: Sequence[Path], num_samples: int, max_size: int):
        self.path, self._results, self._data = path, results, data
        self._page = page_size(max_size)
        start = HEADER.itemsize + 3 * FIELD.itemsize + num_samples * METADATA.itemsize
        self._first = self._end = -(-start // self._page) * self._page
        self._num_samples, self._done = num_samples, 0

    def advance(self) -> None:
        """Append the next pieces, as far as they are finished."""
        while self._done < len(self._results) and (result := self._results[self._done]).exists():
            rows = load_finished(result).rows
            self._end = self._place(rows, self._end)
            data = self._data[self._done]
            if data.exists():
                self._copy(data, rows)
            self._done += 1

    def _place(self, rows: NDArray[Any], end: int) -> int:
        """Fill in where the next images go, behind those that end at `end`, and say where they end."""
        for i, size in enumerate(rows["size"].tolist()):
            if end % self._page + size > self._page:
                end = -(-end // self._page) * self._page
            rows["ptr"][i] = end
            end += size
        return end

    def _placed(self) -> Iterator[NDArray[Any]]:
        """The rows of every piece."""
        end = self._first
        for result in self._results:
            rows = load_finished(result).rows
            end = self._place(rows, end)
            yield rows

    def _copy(self, data: Path, rows: NDArray[Any]) -> None:
        new_page = rows["ptr"][1:] != rows["ptr"][:-1] + rows["size"][:-1]
        starts = [0, *(np.flatnonzero(new_page) + 1).tolist()]
        out = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            with data.open("rb") as file:
                for first, last in zip(starts, [*starts[1:], len(rows)], strict=True):
                    os.lseek(out, int(rows["ptr"][first]), os.SEEK_SET)
                    left = int(rows["size"][first:last].sum())
                    while left:
                        left -= os.sendfile(out, file.fileno(), None, left)
            os.fsync(out)
        finally:
            os.close(out)
        data.unlink()

    def finish(self, labels: NDArray[np.signedinteger]) -> FileEntry:
        """Write header, metadata and table, and beside the file what `verify` compares it with."""
        self.advance()
        assert self._done == len(self._results)
        table = -(-self._end // self._page) * self._page
        with self.path.open("r+b") as file:
            file.write(header(self._num_samples, self._page, table))
            first = 0
            for rows in self._placed():
                file.write(metadata(rows, labels[first : first + len(rows)], first).tobytes())
                first += len(rows)
            file.truncate(table)
            file.seek(table)
            first = 0
            for rows in self._placed():
                file.write(allocation_table(rows, first).tobytes())
                first += len(rows)
            file.flush()
            os.fsync(file.fileno())
        return write_rows(stored_path(self.path), STORED, self._num_samples, self._placed())
