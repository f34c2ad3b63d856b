"""Which encoded images DALI decodes to the pixels that the torch loader shows, and the others in a form that it reads.

DALI has no decoder for GIF, and an image that it refuses ends its pipeline. It has some for TIFF that turn no image
whose tags say so and guess at palettes, and some for BMP that are as good as the file is plain. So what it gets itself
is listed here, by the first bytes of a file, and all else is decoded as the torch loader does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.base import DataError, choose_loader
from pipelines.loaders.dali_memory import AddressReader
from pipelines.loaders.torch_loader import decode
from pipelines.storage.images import open_image
from pipelines.storage.reading import Readers
from pipelines.storage.source import Bytes, Source, TarSource
from pipelines.storage.unreadable import UNREADABLE, unreadable

_UNKNOWN, _FOR_DALI, _OTHER = 0, 1, 2


def dali_decodes(data: Any) -> bool:
    """Whether DALI gets this image, a sequence of bytes, as it is. It need not be whole.

    A few microseconds, and next to nothing compiled: numba knows all that is used here.
    """
    length = len(data)
    if length < 2:
        return False
    if data[0] != 0xFF or data[1] != 0xD8:  # not JPEG
        png = length >= 8 and data[0] == 0x89 and data[1] == 0x50 and data[2] == 0x4E and data[3] == 0x47
        if png:
            return bool(data[4] == 0x0D and data[5] == 0x0A and data[6] == 0x1A and data[7] == 0x0A)
        riff = length >= 12 and data[0] == 0x52 and data[1] == 0x49 and data[2] == 0x46 and data[3] == 0x46
        return bool(riff and data[8] == 0x57 and data[9] == 0x45 and data[10] == 0x42 and data[11] == 0x50)  # WebP
    # Eight bits, Huffman coding (ITU-T T.81, annex B). A damaged one is DALI's to complain of.
    at = 2
    while at + 4 <= length:
        marker = data[at + 1]
        if data[at] != 0xFF:
            return True
        if marker == 0xFF:  # filling
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC:  # begins a frame:
            # baseline, extended or progressive; the others are lossless or arithmetic
            return bool(marker <= 0xC2 and (at + 4 == length or data[at + 4] == 8))
        else:
            at += 2 + int(data[at + 2]) * 256 + int(data[at + 3])
    return True


class ForDali:
    """The images of a source, each in a form that DALI decodes; `num_threads` work on those that are not."""

    def __init__(self, source: Source, num_threads: int) -> None:
        self._source = source
        self._threads = Readers(max(1, num_threads), "decode")
        self._kind = np.zeros(source.num_samples, dtype=np.uint8)  # of each sample, once it has been looked at

    def read(self, samples: NDArray[np.int64]) -> list[Bytes]:
        """Encoded images; `DataError` names one that is damaged, if it is not DALI that decodes it."""
        encoded = self._source.read_many(samples)
        for place in np.flatnonzero(self._kind[samples] == _UNKNOWN).tolist():
            self._kind[samples[place]] = _FOR_DALI if dali_decodes(encoded[place].data) else _OTHER
        others = np.flatnonzero(self._kind[samples] == _OTHER)
        for place, image in zip(others.tolist(), self._decoded(samples[others]), strict=True):
            encoded[place] = image
        return encoded

    def input(self, samples: NDArray[np.int64], reader: AddressReader | None) -> tuple[Any, Any]:
        """What DALI is fed for these images: what `reader` wants, or arrays where there is none; and what that is in.

        With a reader and tars, this takes a number of calls that does not grow with the batch.
        """
        if reader is None:
            return self.read(samples), ()
        if not isinstance(self._source, TarSource):
            encoded = self.read(samples)
            address, length = np.array([_place(image) for image in encoded], dtype=np.int64).T
            return reader.table(address, length), encoded
        address, length = self._source.locate(samples)
        if (new := np.flatnonzero(self._kind[samples] == _UNKNOWN)).size:
            known = reader.which(address[new], length[new])
            self._kind[samples[new]] = np.where(known, _FOR_DALI, _OTHER)
        others = np.flatnonzero(self._kind[samples] == _OTHER)
        images = self._decoded(samples[others])
        for place, image in zip(others.tolist(), images, strict=True):
            address[place], length[place] = _place(image)
        return reader.table(address, length), images

    def _decoded(self, samples: NDArray[np.int64]) -> Sequence[Bytes]:
        def decoded(i: int) -> Bytes:
            return as_ppm(self._source.read(i), self._source.name(i))

        return self._threads.map(decoded, samples.tolist()) if len(samples) else ()

    def stop(self) -> None:
        """Stop threads; reading starts them again."""
        self._threads.stop()


def as_ppm(encoded: Bytes, name: str) -> Bytes:
    """The same image with nothing left to decode; `DataError` naming it if it is damaged."""
    pixels = decode(encoded, name)
    head = f"P6 {pixels.shape[2]} {pixels.shape[1]} 255\n".encode()
    return np.concatenate([np.frombuffer(head, np.uint8), pixels.permute(1, 2, 0).contiguous().view(-1).numpy()])


def undecodable(source: Source, samples: NDArray[np.int64], error: RuntimeError) -> DataError:
    """DALI seldom says which image it could not decode: Pillow tries those it may have been."""
    for i in samples.tolist():
        encoded = source.read(i)
        try:
            with open_image(encoded.data) as image:
                image.load()
        except UNREADABLE as reason:
            return unreadable(source.name(i), len(encoded), reason)
    names = ", ".join(source.name(i) for i in samples[:3].tolist())
    return DataError(
        f"DALI cannot decode one of {len(samples)} images ({names}, ...): {str(error).splitlines()[0]}; "
        f"use {choose_loader('torch')}"
    )


def _place(image: Bytes) -> tuple[int, int]:
    return image.__array_interface__["data"][0], len(image)
