"""FFCV itself, kept at arm's length, and its .beton files, checked before they are read.

FFCV 1.0.2 reads damaged files without complaint or crashes on them. Only its loader imports it besides.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.base import DataError

FFCV_VERSION = "1.0.2"
_MODES = 2  # of storing an image: 0 JPEG, 1 raw pixels


def import_ffcv() -> None:
    """Import FFCV; raises `DataError` where it is missing or of another version.

    It sets torch's thread count when it is imported, and again with every loader. Only numba's is meant to change.
    """
    try:
        found = importlib.metadata.version("ffcv")
    except importlib.metadata.PackageNotFoundError:
        raise DataError("FFCV is not installed; install the headers it needs, then run `make setup`") from None
    if found != FFCV_VERSION:
        raise DataError(f"FFCV {found} is installed; the loader is written for {FFCV_VERSION}: run `make setup`")
    import numba
    import torch

    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it imports distutils
            from ffcv.pipeline.compiler import Compiler
    except ImportError as error:
        raise DataError(f"FFCV cannot be imported ({error}); run `make setup`") from error
    torch.set_num_threads(threads)

    def set_num_threads(count: int) -> None:
        Compiler.num_threads = count
        numba.set_num_threads(count)

    Compiler.set_num_threads = set_num_threads


def open_beton(path: Path, labels: NDArray[np.int64]) -> Any:
    """FFCV's reader of `path`, after checking that following its pointers stays inside the file."""
    from ffcv.reader import Reader

    damaged = DataError(f"{path} is damaged or belongs to another data set; copy it again or convert anew")
    try:
        reader = Reader(str(path))
    except (AssertionError, ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
        raise damaged from error
    images, (ptr, size) = reader.metadata, (reader.alloc_table["ptr"], reader.alloc_table["size"])
    if list(reader.handlers) != ["image", "label", "index"] or len(images) != len(labels):
        raise damaged
    picture, end = images["f0"], reader.header["alloc_table_ptr"]
    order = np.argsort(ptr)
    sound = (
        end + reader.alloc_table.nbytes == path.stat().st_size
        and len(ptr) == len(labels)
        and bool((ptr + size <= end).all())
        and bool((picture["width"] > 0).all() and (picture["height"] > 0).all())
        and bool((picture["mode"] < _MODES).all())
        and np.array_equal(np.sort(picture["data_ptr"]), ptr[order])
        and np.array_equal(images["f1"], labels)
        and np.array_equal(images["f2"], np.arange(len(labels)))
    )
    if not sound:
        raise damaged
    return reader
