"""What is done to many encoded images at once, outside the interpreter's lock: checksums, and asking for their pages.

Images that are given by address are gone through in loops that numba compiles. For arrays, zlib is called once an
image: it works without the interpreter's lock but has to get it back each time, which a busy training thread may delay.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
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
    """`differing` for images at places in memory, (B,), where `knows_addresses`."""
    crc32, _ = _compiled()

    def search(begin: int, end: int) -> int:
        found: int = crc32(address[begin:end], length[begin:end], expected[begin:end])
        return found if found < 0 else begin + found

    return _first(search, len(address), readers)


def fetch_at(address: NDArray[np.int64], length: NDArray[np.int64]) -> None:
    """Have the system read the pages of a mapped file at these places in memory, (B,), where `knows_addresses`."""
    _, fetch = _compiled()
    fetch(address, length)


def knows_addresses() -> bool:
    """Whether numba and the zlib library are there for the functions above, which then are compiled: half a second."""
    try:
        _compiled()
    except (ImportError, OSError):
        return False
    return True


@functools.cache
def crc32_at() -> Any:
    """zlib's crc32 for code that numba compiles: of a sum so far, an address and a length. `OSError` without zlib."""
    crc32 = ctypes.CDLL("libz.so.1").crc32
    # An address is as large as a pointer, and numba makes none of a number.
    crc32.restype, crc32.argtypes = ctypes.c_ulong, (ctypes.c_ulong, ctypes.c_size_t, ctypes.c_uint)
    return crc32


@functools.cache
def _compiled() -> tuple[Any, Any]:
    import numba

    crc32, madvise = crc32_at(), ctypes.CDLL(None).madvise
    madvise.restype, madvise.argtypes = ctypes.c_int, (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
    page, needed = mmap.PAGESIZE, mmap.MADV_WILLNEED

    def search(address: Any, length: Any, expected: Any) -> int:
        for place in range(len(address)):
            if crc32(0, address[place], length[place]) != expected[place]:
                return place
        return -1

    def fetch(address: Any, length: Any) -> None:
        for place in range(len(address)):
            before = address[place] % page
            madvise(address[place] - before, before + length[place], needed)  # advice: it may be refused

    return (
        numba.njit("int64(int64[::1], int64[::1], uint32[::1])", nogil=True)(search),
        numba.njit("void(int64[::1], int64[::1])", nogil=True)(fetch),
    )


def _first(search: Search, count: int, readers: Readers) -> int | None:
    shares = max(1, min(readers.count, count // _LEAST))
    bounds = [count * number // shares for number in range(shares + 1)]
    if shares == 1:
        found = [search(0, count)]
    else:
        found = readers.map(lambda share: search(*share), list(itertools.pairwise(bounds)))
    return next((place for place in found if place >= 0), None)
