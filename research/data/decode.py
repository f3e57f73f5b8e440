"""Decodes image files to pixels, or reports why a file cannot be decoded."""

from __future__ import annotations

import contextlib
import io
import threading

import numpy as np
from PIL import Image

from research.data.formats import readable_formats, unknown_format
from research.data.resampling import opaque, to_square
from research.data.resizing import RESIZES, draft_size
from research.data.stored_pixels import ordinary_jpeg_pixels, upright_pixels
from research.system.errors import one_line

MAX_PIXELS = 120_000_000  # photos of the largest cameras; a pixel takes up to six bytes of memory
LARGE_PIXELS = 30_000_000  # larger photos are decoded one at a time, to limit the peak memory

_one_large = threading.Lock()


class DamagedImageError(Exception):
    """The bytes hold no usable image. The message is a short reason."""


def decode_image(
    encoded: bytes | np.ndarray | None, size: int | None = None, resize: str = "squash"
) -> np.ndarray:
    """Decodes a photo of any format in `readable_formats` and rotates it by its EXIF orientation.

    16-bit values are scaled to 8 bits. Transparent parts become white. Of several frames, the
    first is used.

    Args:
      encoded: the content of an image file; or decoded pixels, uint8 RGB (height, width, 3); or
        None for a file that could not be read.
      size: height and width of the result in pixels. None keeps the size of the photo.
      resize: how the photo becomes a square: `squash`, `crop` or `pad`, see `place`.

    Returns:
      uint8 RGB of shape (height, width, 3).

    Raises:
      DamagedImageError: the content is missing, empty, truncated or not an image, the image has
        more than `MAX_PIXELS` pixels, or its pixel values have an unknown range.
      ValueError: `resize` is none of `RESIZES`.
    """
    if resize not in RESIZES:
        raise ValueError(f"resize is {resize!r}; expected one of: {', '.join(RESIZES)}")
    if encoded is None:
        raise DamagedImageError("cannot be read")
    if isinstance(encoded, np.ndarray):
        if encoded.dtype != np.uint8 or encoded.shape[2:] != (3,) or not encoded.size:
            raise DamagedImageError(
                f"an array of {encoded.dtype} {encoded.shape}, not of uint8 (height, width, 3)"
            )
        if size is None:
            return encoded
        return to_square(encoded, size, resize)
    if not encoded:
        raise DamagedImageError("empty file")
    try:
        if size and (ordinary := ordinary_jpeg_pixels(encoded, size, resize)) is not None:
            return to_square(ordinary, size, resize)
        with Image.open(io.BytesIO(encoded), formats=readable_formats()) as image:
            # The header gives the size, before any pixel takes memory.
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise DamagedImageError(
                    f"{image.width:,} x {image.height:,} is more than {MAX_PIXELS:,} pixels"
                )
            if size is not None:
                image.draft("RGB", draft_size(image.width, image.height, size, resize))
                pixels = image.width * image.height
            with _one_large if pixels > LARGE_PIXELS else contextlib.nullcontext():
                decoded = upright_pixels(encoded, image)
                return opaque(decoded) if size is None else to_square(decoded, size, resize)
    except DamagedImageError:
        raise
    except Image.UnidentifiedImageError:
        raise DamagedImageError(unknown_format(encoded)) from None
    except Image.DecompressionBombError:
        raise DamagedImageError(f"more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow's decoders raise nearly every type on malformed bytes
        raise DamagedImageError(one_line(error)) from error
