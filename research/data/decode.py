"""From the bytes of an image file to pixels, or to the reason why not."""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from research.system.errors import one_line

# Pillow would try all that it knows, among them formats that start another program.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF", "PPM")
PIXELS_AT_MOST = 120_000_000  # what the largest cameras make; in memory four bytes each
LARGE_PIXELS = 30_000_000  # decoded one at a time, so that not every thread needs as much memory
BEHIND_TRANSPARENCY = (255, 255, 255)  # as a page shows it


_one_large = threading.Lock()


class DamagedImageError(Exception):
    """The bytes hold no image that can be used; the message is the reason, in a few words."""


@contextlib.contextmanager
def oddities_ignored() -> Iterator[None]:
    """Hides what Pillow warns of in photos that it reads well; in all threads, so open it once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def decode_image(encoded: bytes | np.ndarray | None, size: int | None = None) -> np.ndarray:
    """Decodes a photo of any format in `FORMATS`, upright by its EXIF orientation.

    Numbers of 16 bits are scaled to 8, and what is transparent becomes white.

    Args:
      encoded: the content of an image file, of several frames the first; or pixels that are
        decoded already, uint8 RGB (height, width, 3); None if the file could not be read.
      size: height and width of the result in pixels; the photo's own if None.

    Returns:
      uint8 RGB of shape (height, width, 3).

    Raises:
      DamagedImageError: the bytes are missing, empty, truncated or no image; or an image of more
        than `PIXELS_AT_MOST`, or of numbers whose range nobody knows.
    """
    if encoded is None:
        raise DamagedImageError("cannot be read")
    if isinstance(encoded, np.ndarray):
        return _resized(encoded, size)
    if not encoded:
        raise DamagedImageError("empty file")
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            _check_size(image)
            if size is not None:
                # A JPEG far larger than asked is decoded at a half, a quarter or an eighth, but at
                # least half as large again as asked: then it differs from one decoded in full by
                # 41 dB, no more than two good filters for resizing do.
                image.draft("RGB", (3 * size // 2, 3 * size // 2))
            is_large = image.width * image.height > LARGE_PIXELS
            with _one_large if is_large else contextlib.nullcontext():
                return _pixels(image, size)
    except DamagedImageError:
        raise
    except Image.UnidentifiedImageError:
        raise DamagedImageError(_what_else(encoded)) from None
    except Image.DecompressionBombError:
        raise DamagedImageError(f"more than {PIXELS_AT_MOST:,} pixels") from None
    except Exception as error:  # Pillow's readers raise nearly every type on malformed bytes
        raise DamagedImageError(one_line(error)) from error


def _resized(pixels: np.ndarray, size: int | None) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise DamagedImageError(
            f"an array of {pixels.dtype} {pixels.shape}, not of uint8 (height, width, 3)"
        )
    if size is None:
        return pixels
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def _pixels(image: Image.Image, size: int | None) -> np.ndarray:
    image.load()
    with contextlib.suppress(Exception):  # EXIF may be damaged where the pixels are not
        ImageOps.exif_transpose(image, in_place=True)
    coloured = _in_colours(image)
    if size is not None:
        coloured = coloured.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(_opaque(coloured))


def _check_size(image: Image.Image) -> None:
    """Looks at what the header says, before any pixel takes memory."""
    width, height = image.size
    if width * height > PIXELS_AT_MOST:
        raise DamagedImageError(f"{width:,} x {height:,} is more than {PIXELS_AT_MOST:,} pixels")


def _in_colours(image: Image.Image) -> Image.Image:
    """Returns the image as RGB, or as RGBA where parts of it are transparent."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow would clip: all but the darkest 256 of 65,536 shades would be white.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DamagedImageError("its pixels are 32-bit numbers, whose range is unknown")
    wanted = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _opaque(image: Image.Image) -> Image.Image:
    """Returns an RGB or RGBA image as RGB."""
    if image.mode == "RGB":
        return image
    flat = Image.new("RGB", image.size, BEHIND_TRANSPARENCY)
    flat.paste(image, mask=image.getchannel("A"))
    return flat


def _what_else(encoded: bytes) -> str:
    """Says what bytes are that are no image: mostly the page that a failed download was given."""
    is_page = encoded[:1000].lstrip().lower().startswith((b"<!doctype html", b"<html"))
    return "not an image but an HTML page" if is_page else "not an image of a known format"
