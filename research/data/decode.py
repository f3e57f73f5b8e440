"""Decodes image files to pixels, or reports why a file cannot be decoded."""

from __future__ import annotations

import contextlib
import io
import threading

import numpy as np
from PIL import Image, ImageOps

from research.data.formats import readable_formats, unknown_format
from research.data.resizing import RESIZES, draft_size, opaque, to_square
from research.system.errors import one_line

MAX_PIXELS = 120_000_000  # photos of the largest cameras; a pixel takes four bytes of memory
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
        return _to_rgb(Image.fromarray(np.ascontiguousarray(encoded)), size, resize)
    if not encoded:
        raise DamagedImageError("empty file")
    try:
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
                return _to_rgb(image, size, resize)
    except DamagedImageError:
        raise
    except Image.UnidentifiedImageError:
        raise DamagedImageError(unknown_format(encoded)) from None
    except Image.DecompressionBombError:
        raise DamagedImageError(f"more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow's decoders raise nearly every type on malformed bytes
        raise DamagedImageError(one_line(error)) from error


def _to_rgb(image: Image.Image, size: int | None, resize: str) -> np.ndarray:
    """Decodes an open image; see `decode_image`."""
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF data does not make the pixels unusable
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow would clip 16-bit values at 255, so that nearly all of them would become white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise DamagedImageError("its pixels are 32-bit numbers, whose range is unknown")
    mode = "RGBA" if image.has_transparency_data else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    return np.asarray(opaque(image) if size is None else to_square(image, size, resize))
