"""Which encoded images DALI decodes to the pixels that the torch loader shows, and the others in a form that it reads.

DALI has no decoder for GIF, and an image that it refuses ends its pipeline. It has some for TIFF that turn no image
whose tags say so and guess at palettes, and some for BMP that are as good as the file is plain. So what it gets itself
is listed here, by the first bytes of a file, and all else is decoded as the torch loader does it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.loaders.torch_loader import decode
from pipelines.storage.reading import Readers
from pipelines.storage.source import Bytes, Source

_PNG, _RIFF, _WEBP = b"\x89PNG\r\n\x1a\n", b"RIFF", b"WEBP"
_JPEG = b"\xff\xd8"
_NOT_FRAMES = (0xC4, 0xC8, 0xCC)  # within the range of the JPEG markers that begin a frame
_HUFFMAN_DCT = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive; the others are lossless or arithmetic


def dali_decodes(encoded: Bytes) -> bool:
    """Whether DALI gets this image as it is; a few microseconds. It need not be whole."""
    start = encoded[:16].tobytes()
    if start[:2] == _JPEG:
        return _usual_jpeg(encoded)
    return start[:8] == _PNG or (start[:4] == _RIFF and start[8:12] == _WEBP)


def _usual_jpeg(encoded: Bytes) -> bool:
    """Eight bits, Huffman coding (ITU-T T.81, annex B). A damaged one is DALI's to complain of."""
    data, at = encoded.data, 2
    while at + 4 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF:
            return True
        if marker == 0xFF:  # filling
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in _NOT_FRAMES:
            return marker in _HUFFMAN_DCT and (at + 4 == len(data) or data[at + 4] == 8)
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return True


class ForDali:
    """The images of a source, each in a form that DALI decodes; `num_threads` work on those that are not."""

    def __init__(self, source: Source, num_threads: int) -> None:
        self._source = source
        self._threads = Readers(max(1, num_threads), "decode")

    def read(self, samples: NDArray[np.int64]) -> list[Bytes]:
        """Encoded images; `DataError` names one that is damaged, if it is not DALI that decodes it."""
        encoded = self._source.read_many(samples)
        others = [place for place, image in enumerate(encoded) if not dali_decodes(image)]

        def decoded(place: int) -> Bytes:
            return as_ppm(encoded[place], self._source.name(int(samples[place])))

        if others:
            for place, image in zip(others, self._threads.map(decoded, others), strict=True):
                encoded[place] = image
        return encoded

    def stop(self) -> None:
        """Stop threads; reading starts them again."""
        self._threads.stop()


def as_ppm(encoded: Bytes, name: str) -> Bytes:
    """The same image with nothing left to decode; `DataError` naming it if it is damaged."""
    pixels = decode(encoded, name)
    head = f"P6 {pixels.shape[2]} {pixels.shape[1]} 255\n".encode()
    return np.concatenate([np.frombuffer(head, np.uint8), pixels.permute(1, 2, 0).contiguous().view(-1).numpy()])
