"""What the JPEG library finds odd about an image that it decodes all the same.

Damaged pixel data usually still decodes: to a picture with wrong colours or shifted parts. Pillow stays silent about
it, libjpeg does not: codes that end too early or too late get a warning. Damage that keeps the codes in step cannot be
told from a picture. Warnings come from TurboJPEG, which FFCV needs anyway; where it is missing there are none.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

_LIBRARY = "libturbojpeg.so.0"
_GRAY, _CMYK = 6, 11  # TurboJPEG's numbers of the pixel formats
_CMYK_SPACES = (3, 4)  # and of the colour spaces CMYK and YCCK
_FASTEST = 2048 | 256  # fast DCT, fast upsampling: only the decoding of the codes matters
_EIGHTH = 8
_WARNING = 0  # as opposed to an error


@functools.cache
def _turbojpeg() -> tuple[Any, ctypes.c_void_p] | None:
    """The library and a decompressor; one per process, since this is for processes with a single thread."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_ulong
    library.tjInitDecompress.restype = pointer
    library.tjDecompressHeader3.argtypes = [pointer, ctypes.c_char_p, size, *[ctypes.POINTER(number)] * 4]
    library.tjDecompress2.argtypes = [pointer, ctypes.c_char_p, size, pointer, *[number] * 5]
    library.tjGetErrorCode.argtypes = library.tjGetErrorStr2.argtypes = [pointer]
    library.tjGetErrorStr2.restype = ctypes.c_char_p
    return library, pointer(library.tjInitDecompress())


def turbojpeg_found() -> bool:
    """Whether there can be warnings at all."""
    return _turbojpeg() is not None


def jpeg_warning(encoded: bytes) -> str | None:
    """libjpeg's first warning about a JPEG that Pillow decodes; None if it has none, or is not installed."""
    found = _turbojpeg()
    if found is None:
        return None
    library, handle = found
    width, height, subsampling, space = (ctypes.c_int() for _ in range(4))
    sizes = (width, height, subsampling, space)
    if library.tjDecompressHeader3(handle, encoded, len(encoded), *map(ctypes.byref, sizes)) != 0:
        return None
    # Every code is decoded whatever the size of the picture, and an eighth of it is the quickest to compute.
    small = [-(-side.value // _EIGHTH) for side in (width, height)]
    format, channels = (_CMYK, 4) if space.value in _CMYK_SPACES else (_GRAY, 1)
    pixels = ctypes.create_string_buffer(small[0] * small[1] * channels)
    arguments = (pixels, small[0], 0, small[1], format, _FASTEST)
    if library.tjDecompress2(handle, encoded, len(encoded), *arguments) == 0:
        return None
    if library.tjGetErrorCode(handle) != _WARNING:
        return None
    message: bytes = library.tjGetErrorStr2(handle)
    return message.decode(errors="replace")
