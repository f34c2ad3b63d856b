"""The one place where encoded images are opened, and which kinds of them are.

Pillow goes by the first bytes of a file, whatever it is called, and knows kinds that run programs (EPS is handed to
Ghostscript) or read other files. Here it may take those that a data set of photographs consists of.
"""

from __future__ import annotations

import io

from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Of Pillow; MPO is a JPEG with more pictures behind it."""


def open_image(encoded: bytes | memoryview) -> Image.Image:
    """The first picture in `encoded`, whose pixels are not yet decoded.

    Raises:
        Image.DecompressionBombError: it has more than `Image.MAX_IMAGE_PIXELS`.
        Exception: what Pillow raises for what is no image of these kinds, see `pipelines.storage.unreadable`.
    """
    image: Image.Image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        image.close()
        raise Image.DecompressionBombError(f"more than {most} pixels")
    return image
