"""Encoded images that DALI takes from memory by their addresses, without the interpreter.

Handed over as arrays, each image costs 7 us of the interpreter's lock, which at 20,000 images a second are seven of the
33 us an image that all threads of a process may share. Given a table of addresses, DALI's own thread copies the images
in a function compiled by numba (20 us an image, of nobody's time), and Python's part does not grow with the batch.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, types

from pipelines.storage.unlocked import knows_addresses

_log = logging.getLogger(__name__)
_UNIT = 4096


class AddressReader:
    """An operator of DALI's that copies images, and a search through them; `ImportError` where numba is missing.

    numba compiles both here, which takes some seconds.
    """

    def __init__(self, is_wanted: Callable[[Any], bool]) -> None:
        import numba
        from nvidia.dali.plugin import numba as plugin

        pointer: Any = plugin.address_as_void_pointer  # type: ignore[attr-defined]

        def copy(encoded: Any, _: Any, units: Any, rest: Any, address: Any) -> None:
            encoded[:] = numba.carray(pointer(address[0]), encoded.shape, np.uint8)

        def lengths(out: Any, given: Any) -> None:
            for i in range(len(out[0])):
                out[0][i][0] = given[0][i][0] * _UNIT + given[1][i][0]
                out[1][i][0] = 1

        wanted = numba.njit(is_wanted)

        def which(address: Any, length: Any) -> Any:
            found = np.zeros(len(address), np.bool_)
            for i in range(len(address)):
                found[i] = wanted(numba.carray(pointer(address[i]), (length[i],), np.uint8))
            return found

        self.which: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]] = numba.njit(
            "boolean[::1](int64[::1], int64[::1])", nogil=True
        )(which)
        """Whether `is_wanted` is true of the bytes at each place in memory, (B,)."""
        # DALI asks for the size of what an operator returns when it knows no more than the shapes of what that is
        # given. So lengths come as shapes, of two blank arrays, since one alone would be as large as the image; and
        # there are two outputs because DALI 2.4 shows as many shapes of inputs as there are outputs.
        self._copy: Any = plugin.NumbaFunction(
            run_fn=copy,
            setup_fn=lengths,
            out_types=[types.UINT8, types.UINT8],
            in_types=[types.UINT8, types.UINT8, types.INT64],
            outs_ndim=[1, 1],
            ins_ndim=[1, 1, 1],
        )

    @staticmethod
    def table(address: NDArray[np.int64], length: NDArray[np.int64]) -> NDArray[np.int64]:
        """What DALI's graph is fed for images at these places, (B,): (B, 3)."""
        return np.stack([address, *np.divmod(length, _UNIT)], axis=1)

    def __call__(self, table: Any) -> Any:
        """In a definition of a graph: the encoded images that the `table` is about."""
        lengths = fn.cast(table[1:3], dtype=types.INT32)
        blanks = (fn.zeros(shape=lengths[i : i + 1], dtype=types.UINT8) for i in range(2))
        return self._copy(*blanks, table[:1])[0]


@functools.cache
def address_reader(is_wanted: Callable[[Any], bool]) -> AddressReader | None:
    """The reader, compiled once for all loaders; None, and the log says so, where it cannot be had."""
    try:
        if not knows_addresses():
            raise ImportError("numba or libz.so.1 is missing")
        return AddressReader(is_wanted)
    except Exception as error:  # of whatever kind: versions of numba and DALI that do not fit each other
        _log.warning(
            "DALI takes every image from Python, 7 us each, and not by itself (%s: %s); with a GPU, install numba",
            type(error).__name__,
            str(error).split("\n")[0],
        )
        return None
