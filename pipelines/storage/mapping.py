"""Whole files in memory without a file descriptor for each, so that a set may have more files than may be open at once.

Python's own `mmap` keeps one for as long as the mapping is there; the system does not need it.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.base import DataError, in_words


def map_file(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file that is not empty, read-only. It is unmapped when the last view of them is gone.

    Raises:
        DataError: it cannot be opened or mapped.
    """
    library = _library()
    try:
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            address = library.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({in_words(error)}); restore it, or change who may read it") from error
    if address == _FAILED:
        why = os.strerror(ctypes.get_errno()).lower()
        raise DataError(f"{path} cannot be read into memory ({why}); restore it, or lower the use of memory")
    content = (ctypes.c_ubyte * length).from_address(address)
    weakref.finalize(content, library.munmap, address, length).atexit = False
    found: NDArray[np.uint8] = np.frombuffer(memoryview(content), dtype=np.uint8)
    found.flags.writeable = False
    return found


def will_need(content: NDArray[np.uint8]) -> None:
    """Have the system read the pages of a part of such a file; it may refuse."""
    before = content.ctypes.data % mmap.PAGESIZE
    _library().madvise(content.ctypes.data - before, len(content) + before, mmap.MADV_WILLNEED)


_FAILED = ctypes.c_void_p(-1).value


@functools.cache
def _library() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    number, pointer, size = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t
    library.mmap.restype = pointer
    library.mmap.argtypes = [pointer, size, number, number, number, ctypes.c_int64]
    library.munmap.argtypes = [pointer, size]
    library.madvise.argtypes = [pointer, size, number]
    return library
