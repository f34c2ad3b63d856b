"""Find the images of a folder and decode every one strictly, before anything is written."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from pipelines.base import DataError
from pipelines.processes import map_processes
from pipelines.source import class_names, image_files

_CHUNK = 64  # images per task

# What torchvision, Pillow and DALI all decode to the same colours. MPO is a JPEG with more pictures behind it.
_KEPT = {"JPEG": ("L", "RGB", "CMYK"), "MPO": ("L", "RGB", "CMYK"), "PNG": ("L", "RGB")}


@dataclass(frozen=True, slots=True)  # there are a million of them
class ImageFile:
    """A readable image."""

    path: str
    label: int
    height: int
    width: int
    crc32: int
    transcode: bool
    """No loader reads this format: store it as PNG."""


@dataclass(frozen=True)
class Unreadable:
    """A file that cannot be used, and why."""

    path: str
    reason: str


def list_split(folder: Path, classes: Sequence[str]) -> list[tuple[str, int]]:
    """(path, label) of every image in `<folder>/<class>/`, by class and name; `DataError` for an empty class."""
    unknown = sorted(set(class_names(folder)) - set(classes))
    if unknown:
        raise DataError(f"{folder} has the class {unknown[0]!r}, which the training split has not")
    files: list[tuple[str, int]] = []
    for label, name in enumerate(classes):
        images = image_files(folder / name) if (folder / name).is_dir() else ()
        if not images:
            raise DataError(f"class {name!r} has no image in {folder / name}; add some or remove the folder")
        files.extend((str(folder / name / image), label) for image in images)
    return files


def check_images(
    files: Sequence[tuple[str, int]], jobs: int, progress: Callable[[int], None]
) -> tuple[list[ImageFile], list[Unreadable]]:
    """Decode all `files` in `jobs` processes; `progress` hears how many more are done."""
    chunks = [files[i : i + _CHUNK] for i in range(0, len(files), _CHUNK)]
    results = map_processes(_check_chunk, chunks, jobs, lambda chunk: progress(len(chunk)))
    checked: Iterable[ImageFile | Unreadable] = chain.from_iterable(results)
    good, bad = [], []
    for result in checked:
        if isinstance(result, ImageFile):
            good.append(result)
        else:
            bad.append(result)
    return good, bad


def _check_chunk(files: Sequence[tuple[str, int]]) -> list[ImageFile | Unreadable]:
    return [check_image(path, label) for path, label in files]


def check_image(path: str, label: int) -> ImageFile | Unreadable:
    """Read and fully decode one file."""
    try:
        encoded = Path(path).read_bytes()
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
            kept = image.mode in _KEPT.get(image.format or "", ())
            return ImageFile(path, label, image.height, image.width, zlib.crc32(encoded), not kept)
    except UnidentifiedImageError:
        return Unreadable(path, "not an image" if encoded else "empty file")
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        return Unreadable(path, str(error))
