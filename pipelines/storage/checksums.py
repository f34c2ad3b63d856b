"""Checksums of encoded images, many at a time, in threads that do not wait for the interpreter.

Where the images are given by address, a thread's share is one loop, compiled by numba. Otherwise zlib is called once an
image: it works without the interpreter's lock but has to get it back each time, which a busy training thread may delay.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.storage.reading import Readers

_LEAST = 4
"""Images of a thread's share: with fewer, to wake it takes longer than the work."""

Search = Callable[[int, int], int]
"""The first place between two that holds another image than the expected one, or -1."""


def differing(encoded: Sequence[NDArray[np.uint8]], expected: NDArray[np.uint32], readers: Readers) -> int | None:
    """The place of the first image whose crc32 is not the expected one, (B,); None if there is none."""
    sums = expected.tolist()

    def search(begin: int, end: int) -> int:
        return next((place for place in range(begin, end) if zlib.crc32(encoded[place].data) != sums[place]), -1)

    return _first(search, len(sums), readers)


def differing_at(
    address: NDArray[np.int64], length: NDArray[np.int64], expected: NDArray[np.uint32], readers: Readers
) -> int | None:
    """`differing` for images at places in memory, (B,); `can_check_addresses` says whether it can be had."""
    compiled = _compiled()

    def search(begin: int, end: int) -> int:
        found: int = compiled(address[begin:end], length[begin:end], expected[begin:end])
        return found if found < 0 else begin + found

    return _first(search, len(address), readers)


def can_check_addresses() -> bool:
    """Whether numba and the zlib library are there for `differing_at`, which then is compiled: half a second."""
    try:
        _compiled()
    except (ImportError, OSError):
        return False
    return True


@functools.cache
def _compiled() -> Any:
    import numba

    crc32 = ctypes.CDLL("libz.so.1").crc32
    # An address is as large as a pointer, and numba makes none of a number.
    crc32.restype, crc32.argtypes = ctypes.c_ulong, (ctypes.c_ulong, ctypes.c_size_t, ctypes.c_uint)

    def search(address: Any, length: Any, expected: Any) -> int:
        for place in range(len(address)):
            if crc32(0, address[place], length[place]) != expected[place]:
                return place
        return -1

    return numba.njit("int64(int64[::1], int64[::1], uint32[::1])", nogil=True)(search)


def _first(search: Search, count: int, readers: Readers) -> int | None:
    shares = max(1, min(readers.count, count // _LEAST))
    bounds = [count * number // shares for number in range(shares + 1)]
    if shares == 1:
        found = [search(0, count)]
    else:
        found = readers.map(lambda share: search(*share), list(itertools.pairwise(bounds)))
    return next((place for place in found if place >= 0), None)
