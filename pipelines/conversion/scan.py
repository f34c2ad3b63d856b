"""Decode every image of a source strictly, before anything is written."""

from __future__ import annotations

import errno
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipelines.base import DataError, in_words
from pipelines.conversion.jpeg_warnings import jpeg_warning
from pipelines.conversion.processes import Kept, beat
from pipelines.conversion.work import Finished
from pipelines.remote.store import StoreError
from pipelines.sources.columns.samples import Numbers, Sample, Samples, chosen, column, reading
from pipelines.storage.images import open_image

# What torchvision, Pillow and DALI all decode to the same colours. MPO is a JPEG with more pictures behind it.
_KEPT = {"JPEG": ("L", "RGB", "CMYK"), "MPO": ("L", "RGB", "CMYK"), "PNG": ("L", "RGB")}

_OF_THE_IMAGE = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENAMETOOLONG)
"""What the system says of a file for its own sake, and not for want of something."""

CHECKED = np.dtype(
    [("height", "<i4"), ("width", "<i4"), ("crc32", "<u4"), ("bytes", "<i8"), ("transcode", "?"), ("good", "?")]
)


@dataclass(frozen=True, slots=True)
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

    def read(self, read: Callable[[], bytes] | None = None) -> bytes:
        """The encoded bytes, which must be those that were checked; `read` is that of the sample, or what `reading`
        has for it."""
        try:
            encoded = self.sample.read() if read is None else read()
        except FileNotFoundError:
            encoded = b""
        except StoreError as error:
            raise Kept(str(error)) from error
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
    for i, (sample, read) in enumerate(zip(samples, reading(samples, beat), strict=True)):
        image = check_image(sample, read)
        beat()
        if isinstance(image, ImageFile):
            rows[i] = (image.height, image.width, image.crc32, image.size, image.transcode, True)
            if image.warning:
                warned[str(i)] = image.warning
        else:
            reasons[str(i)] = image.reason
    return Finished(rows, {"reasons": reasons, "warned": warned})


class Images(Sequence[ImageFile]):
    """Readable images as rows of columns, each made when it is asked for. Slices are views. What is sent to another
    process is a plain list of its own images."""

    __slots__ = ("_numbers", "_rows", "_samples", "_warned")

    def __init__(self, samples: Samples, rows: NDArray[Any], warned: Mapping[int, str], numbers: Numbers) -> None:
        """Those of `samples` with the given `numbers`; `rows` of CHECKED and warnings are of all samples."""
        self._samples, self._rows, self._warned, self._numbers = samples, rows, warned, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, at: int) -> ImageFile: ...
    @overload
    def __getitem__(self, at: slice) -> Images: ...
    def __getitem__(self, at: int | slice) -> ImageFile | Images:
        if isinstance(at, slice):
            return Images(self._samples, self._rows, self._warned, self._numbers[at])
        number = int(self._numbers[at])
        height, width, crc32, size, transcode, _ = self._rows[number].item()
        return ImageFile(self._samples[number], height, width, crc32, size, transcode, self._warned.get(number))

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)

    def take(self, at: NDArray[np.int32]) -> Images:
        """Those at the places `at`."""
        return Images(self._samples, self._rows, self._warned, chosen(self._numbers, at))

    def column(self, name: str) -> NDArray[Any]:
        """What CHECKED has under `name`, (len(self),)."""
        return column(self._rows[name], self._numbers)

    @property
    def labels(self) -> NDArray[np.int32]:
        """(len(self),)"""
        return column(self._samples.labels, self._numbers)

    def transcoded(self) -> Iterator[str]:
        """Names of the images that are stored as PNG."""
        return (self._name(at) for at in np.flatnonzero(self.column("transcode")).tolist())

    def warnings(self) -> Iterator[tuple[str, str]]:
        """Names of the images that look damaged, and the warnings."""
        found = np.flatnonzero(np.isin(self._numbers, list(self._warned))) if self._warned else np.zeros(0, np.int64)
        return ((self._name(at), self._warned[int(self._numbers[at])]) for at in found.tolist())

    def _name(self, at: int) -> str:
        return self._samples.name(int(self._numbers[at]))


def checked_images(
    samples: Samples, results: Iterable[Finished], unfit: Callable[[NDArray[Any]], NDArray[np.bool_]] | None, why: str
) -> tuple[Images, list[Unreadable]]:
    """What `check_chunk` found out about `samples`, from its results in order.

    `unfit` says of rows of CHECKED which images cannot be used though they are good, and `why`.
    """
    rows, first = np.zeros(len(samples), dtype=CHECKED), 0
    warned: dict[int, str] = {}
    bad: list[Unreadable] = []
    for finished in results:
        some = rows[first : first + len(finished.rows)]
        some[:] = finished.rows
        warned.update({first + int(i): warning for i, warning in finished.notes["warned"].items()})
        bad += [Unreadable(samples.name(first + int(i)), why) for i, why in finished.notes["reasons"].items()]
        if unfit is not None:
            left = some["good"] & unfit(some)
            bad += [Unreadable(samples.name(first + i), why) for i in np.flatnonzero(left).tolist()]
            some["good"] &= ~left
        first += len(some)
    assert first == len(samples)
    good = rows["good"]
    return Images(samples, rows, warned, range(first) if good.all() else np.flatnonzero(good).astype(np.int32)), bad


def check_image(sample: Sample, read: Callable[[], bytes] | None = None) -> ImageFile | Unreadable:
    """Read and fully decode one image; `read` is as of `ImageFile.read`."""
    encoded = _read(sample, read or sample.read)
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


def _read(sample: Sample, read: Callable[[], bytes]) -> bytes | Unreadable:
    """The encoded bytes. Raises `Kept` for what is no fault of the image: it is gone, or the machine cannot read."""
    try:
        return read()
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
    except StoreError as error:
        raise Kept(str(error)) from error
    except DataError as error:
        return Unreadable(sample.name, str(error))


def decode_rgb(encoded: bytes) -> NDArray[np.uint8]:
    """The pixels, (height, width, 3)."""
    with open_image(encoded) as picture:
        if picture.mode.startswith("I;16"):  # Pillow would cut everything above 255
            gray = (np.asarray(picture) >> 8).astype(np.uint8)
            return np.repeat(gray[:, :, None], 3, axis=2)
        return np.array(picture.convert("RGB"))
