"""Decode every image of a source strictly, before anything is written."""

from __future__ import annotations

import errno
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipelines.base import DataError, in_words
from pipelines.conversion.jpeg_warnings import jpeg_warning
from pipelines.conversion.processes import Kept, beat
from pipelines.conversion.work import Finished
from pipelines.sources.sample import Sample
from pipelines.storage.images import open_image

# What torchvision, Pillow and DALI all decode to the same colours. MPO is a JPEG with more pictures behind it.
_KEPT = {"JPEG": ("L", "RGB", "CMYK"), "MPO": ("L", "RGB", "CMYK"), "PNG": ("L", "RGB")}

_OF_THE_IMAGE = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENAMETOOLONG)
"""What the system says of a file for its own sake, and not for want of something."""

CHECKED = np.dtype(
    [("height", "<i4"), ("width", "<i4"), ("crc32", "<u4"), ("bytes", "<i8"), ("transcode", "?"), ("good", "?")]
)


@dataclass(frozen=True, slots=True)  # there are a million of them
class ImageFile:
    """A readable image."""

    sample: Sample
    height: int
    width: int
    crc32: int
    size: int
    """Of the encoded image."""
    transcode: bool
    """No loader reads this format: store it as PNG."""
    warning: str | None = None
    """What the JPEG library finds wrong with it, though it decodes."""

    def read(self) -> bytes:
        """The encoded bytes, which must be those that were checked."""
        try:
            encoded = self.sample.read()
        except FileNotFoundError:
            encoded = b""
        except OSError as error:
            raise Kept(
                f"{self.sample.name} could be read before and cannot now ({in_words(error)}); mend that, and the same "
                "command continues"
            ) from error
        if zlib.crc32(encoded) != self.crc32:
            raise Kept(
                f"{self.sample.name} changed while it was being converted; restore it, and the same command continues, "
                "or begin again with --restart"
            )
        return encoded


@dataclass(frozen=True)
class Unreadable:
    """A sample that cannot be used, and why."""

    name: str
    reason: str


def check_chunk(samples: Sequence[Sample]) -> Finished:
    """Check some images: a row of `CHECKED` for each, the reasons against those that are not good, and warnings."""
    rows = np.zeros(len(samples), dtype=CHECKED)
    reasons, warned = {}, {}
    for i, sample in enumerate(samples):
        image = check_image(sample)
        beat()
        if isinstance(image, ImageFile):
            rows[i] = (image.height, image.width, image.crc32, image.size, image.transcode, True)
            if image.warning:
                warned[str(i)] = image.warning
        else:
            reasons[str(i)] = image.reason
    return Finished(rows, {"reasons": reasons, "warned": warned})


def checked_images(samples: Sequence[Sample], finished: Finished) -> tuple[list[ImageFile], list[Unreadable]]:
    """What `check_chunk` found out about `samples`."""
    warned = finished.notes["warned"]
    images = [
        ImageFile(sample, height, width, crc32, size, transcode, warned.get(str(i)))
        for i, (sample, (height, width, crc32, size, transcode, good)) in enumerate(
            zip(samples, finished.rows.tolist(), strict=True)
        )
        if good
    ]
    bad = [Unreadable(samples[int(i)].name, reason) for i, reason in finished.notes["reasons"].items()]
    return images, bad


def check_image(sample: Sample) -> ImageFile | Unreadable:
    """Read and fully decode one image."""
    encoded = _read(sample)
    if isinstance(encoded, Unreadable):
        return encoded
    try:
        with open_image(encoded) as image:
            image.load()
            if image.mode in ("I", "F"):
                return Unreadable(sample.name, "its 32-bit pixels have no known range")
            kept = image.mode in _KEPT.get(image.format or "", ())
            warning = jpeg_warning(encoded) if image.format in ("JPEG", "MPO") else None
            return ImageFile(sample, image.height, image.width, zlib.crc32(encoded), len(encoded), not kept, warning)
    except UnidentifiedImageError:
        return Unreadable(sample.name, "not an image of a kind that is read" if encoded else "empty file")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return Unreadable(sample.name, f"more than {Image.MAX_IMAGE_PIXELS} pixels")
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        return Unreadable(sample.name, in_words(error))


def _read(sample: Sample) -> bytes | Unreadable:
    """The encoded bytes. Raises `Kept` for what is no fault of the image: it is gone, or the machine cannot read."""
    try:
        return sample.read()
    except FileNotFoundError as error:
        raise Kept(
            f"{sample.name} is not there any more; restore it, and the same command continues, or begin again with "
            "--restart"
        ) from error
    except OSError as error:
        if error.errno in _OF_THE_IMAGE:
            return Unreadable(sample.name, in_words(error))
        raise Kept(
            f"{sample.name} cannot be read ({in_words(error)}); mend that, and the same command continues"
        ) from error
    except DataError as error:
        return Unreadable(sample.name, str(error))


def decode_rgb(encoded: bytes) -> NDArray[np.uint8]:
    """The pixels, (height, width, 3)."""
    with open_image(encoded) as picture:
        if picture.mode.startswith("I;16"):  # Pillow would cut everything above 255
            gray = (np.asarray(picture) >> 8).astype(np.uint8)
            return np.repeat(gray[:, :, None], 3, axis=2)
        return np.array(picture.convert("RGB"))
