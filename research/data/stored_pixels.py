"""The pixels of an image file as they are stored, before they are resized."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import simplejpeg
from PIL import Image
from PIL.ExifTags import Base
from PIL.TiffImagePlugin import BITSPERSAMPLE as BITS_PER_SAMPLE
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, TiffImageFile

from research.data.resizing import draft_size

JPEG_START = b"\xff\xd8"
START_OF_SCAN = b"\xff\xda"
# Markers of segments with a length: not of restarts, of a second image, or reserved.
WITH_LENGTH = bytes([*range(0xC0, 0xC8), *range(0xC9, 0xD0), *range(0xDB, 0xF0), 0xFE])
ORIENTATION = (b"Exif", b"Orientation")  # of a photo, in EXIF or XMP


def ordinary_jpeg_pixels(encoded: bytes, size: int, resize: str) -> np.ndarray | None:
    """Decodes an ordinary JPEG to the same pixels as Pillow, in half of the time.

    Args:
      encoded: the content of a file.
      size: height and width of the square that the photo becomes.
      resize: how it becomes a square.

    Returns:
      uint8 RGB (height, width, 3), in memory that the next call in this thread overwrites. None if
      the file is no JPEG, or has an orientation, other colours than YCbCr, faults, or so many
      pixels that it can be decoded at a half of its size.
    """
    if encoded[:2] != JPEG_START:
        return None
    header = _before_scan(encoded)
    if any(mark in header for mark in ORIENTATION):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
        needed = draft_size(width, height, size, resize)
        is_large = width >= 2 * needed[0] and height >= 2 * needed[1]
        if is_large or colours != "YCbCr" or 3 * height * width > len(_of_thread.memory):
            return None
        return simplejpeg.decode_jpeg(encoded, buffer=_of_thread.memory)
    except (ValueError, KeyError):  # the second for rare sampling of the colours
        return None


def _before_scan(encoded: bytes) -> bytes:
    """Returns the segments of a JPEG before its first scan, which hold its EXIF and XMP data.

    They are a few percent of the file. The whole file is returned if there are other bytes between
    them, or markers without a length.
    """
    end = len(JPEG_START)
    while encoded[end : end + 2] != START_OF_SCAN:
        marker, length = encoded[end : end + 2], encoded[end + 2 : end + 4]
        if marker[:1] != b"\xff" or marker[1:] not in WITH_LENGTH or len(length) < 2:
            return encoded
        end += len(marker) + int.from_bytes(length, "big")
    return encoded[:end]


class _OfThread(threading.local):
    """The memory of each thread for decoded pixels.

    The C library would return it to the system after each photo and request it again.
    """

    def __init__(self) -> None:
        self.memory = np.empty(2**22, np.uint8)


_of_thread = _OfThread()


def upright_pixels(encoded: bytes, image: Image.Image) -> np.ndarray:
    """Decodes an image and turns it by its EXIF orientation.

    Args:
      encoded: the content of the file.
      image: the same, open but not decoded. Its size is the size of the result.

    Returns:
      uint8 (height, width, 3) RGB, or (height, width, 4) RGBA if parts can be transparent.

    Raises:
      ValueError: the range of the pixel values is unknown.
      Exception: of nearly every type, from Pillow's decoders.
    """
    pixels = _jpeg_pixels(encoded, image)
    if pixels is None:
        image.load()
        pixels = _pillow_pixels(image)
    with contextlib.suppress(Exception):  # damaged EXIF data does not make the pixels unusable
        return _turned(pixels, image.getexif().get(Base.Orientation, 1))
    return pixels


def _jpeg_pixels(encoded: bytes, image: Image.Image) -> np.ndarray | None:
    """Decodes an RGB JPEG to the same pixels as Pillow, in two thirds of the time.

    The result is None if it is no RGB JPEG or has faults. Pillow then decides whether it can be
    used.
    """
    if image.format != "JPEG" or image.mode != "RGB":
        return None
    try:
        pixels = simplejpeg.decode_jpeg(encoded, min_height=image.height, min_width=image.width)
    except ValueError:
        return None
    return pixels if pixels.shape[:2] == (image.height, image.width) else None


def _pillow_pixels(image: Image.Image) -> np.ndarray:
    """Returns the pixels of a decoded image, uint8 (height, width, 3), or 4 with transparency."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _grey_pixels(image)
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers, whose range is unknown")
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return np.asarray(image if image.mode == mode else image.convert(mode))


def _grey_pixels(image: Image.Image) -> np.ndarray:
    """Returns the pixels of a grey image of 9 to 16 bits, uint8 (height, width, 3 or 4).

    Pillow would clip the values at 255, so that nearly all of them would become white.
    """
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    values = np.asarray(image)
    grey = (values >> (bits - 8)).astype(np.uint8)
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:  # 0 is white
        grey = 255 - grey
    channels = [grey] * 3
    if "transparency" in image.info:
        channels.append(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8))
    return np.stack(channels, axis=-1)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns pixels by an EXIF orientation from 1 to 8, of which 5 to 8 exchange the axes."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels
