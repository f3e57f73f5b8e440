"""From the bytes of an image file to pixels, or to the reason why not."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps


class DamagedImageError(Exception):
    """The bytes hold no image that can be used; the message is the reason, in a few words."""


def decode_image(encoded: bytes | None, size: int | None = None) -> np.ndarray:
    """Decodes a photo of any format that Pillow reads, upright by its EXIF orientation.

    Args:
      encoded: the content of an image file, None if it could not be read; of several frames the
        first is taken.
      size: height and width of the result in pixels; the photo's own if None.

    Returns:
      uint8 RGB of shape (height, width, 3).

    Raises:
      DamagedImageError: the bytes are missing, empty, truncated, no image, or implausibly large.
    """
    if encoded is None:
        raise DamagedImageError("cannot be read")
    if not encoded:
        raise DamagedImageError("empty file")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if size is not None:
                # A JPEG far larger than asked is decoded at a half, a quarter or an eighth, but at
                # least half as large again as asked: then it differs from one decoded in full by
                # 41 dB, no more than two good filters for resizing do.
                image.draft("RGB", (3 * size // 2, 3 * size // 2))
            ImageOps.exif_transpose(image, in_place=True)
            upright = image if image.mode == "RGB" else image.convert("RGB")
            if size is not None:
                upright = upright.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(upright)
    except Image.UnidentifiedImageError:
        raise DamagedImageError("not an image") from None
    except Exception as error:  # Pillow's readers raise nearly every type on malformed bytes
        raise DamagedImageError(" ".join(str(error).split()) or type(error).__name__) from error
