"""Resizes decoded photos to squares, with all of their pixels."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from PIL import Image

from research.data.resizing import BARS, Placement, place

try:
    import cykooz_resizer as fast
except ImportError:  # there is no package of it for Linux on ARM
    fast = None

WHITE = np.float32(255)  # replaces transparent parts


def to_square(pixels: np.ndarray, size: int, resize: str) -> np.ndarray:
    """Resizes a photo to a square, see `place`. Transparent parts become white.

    The filter is bilinear. For a smaller result it is wider, so that it uses all pixels.

    Args:
      pixels: uint8 (height, width, 3) RGB or (height, width, 4) RGBA.
      size: height and width of the result in pixels.
      resize: one of `RESIZES`.

    Returns:
      uint8 RGB (size, size, 3).
    """
    height, width, _ = pixels.shape
    placed = place(width, height, size, resize)
    wide, high = placed.size
    part = (_resized if fast is None else _resized_fast)(pixels, placed)
    if (wide, high) == (size, size):
        return opaque(part)
    square = np.empty((size, size, 3), np.uint8)
    square[:] = BARS
    top, side = (size - high) // 2, (size - wide) // 2
    square[top : top + high, side : side + wide] = opaque(part)
    return square


def _resized(pixels: np.ndarray, placed: Placement) -> np.ndarray:
    """Returns the part of a photo at its size in the square, uint8 (height, width, 3 or 4)."""
    image = Image.fromarray(pixels)
    return np.asarray(image.resize(placed.size, Image.Resampling.BILINEAR, placed.box))


def _resized_fast(pixels: np.ndarray, placed: Placement) -> np.ndarray:
    """Does the same with vector instructions in a quarter of the time, rounded differently."""
    height, width, channels = pixels.shape
    left, upper, right, lower = placed.box
    options = fast.ResizeOptions(
        resize_alg=fast.ResizeAlg.convolution(fast.FilterType.bilinear),
        crop_box=fast.CropBox(left, upper, right - left, lower - upper),
    )
    kind = fast.PixelType.U8x3 if channels == 3 else fast.PixelType.U8x4
    photo = fast.ImageData(width, height, kind, pixels.tobytes())
    part = fast.ImageData(*placed.size, kind)
    _of_thread.resizer.resize(photo, part, options)
    return np.frombuffer(part.get_buffer(), np.uint8).reshape(*placed.size[::-1], channels)


class _OfThread(threading.local):
    """The resizer of each thread, which keeps its memory for the next photo."""

    def __init__(self) -> None:
        self.resizer: Any = fast.Resizer() if fast else None


_of_thread = _OfThread()


def opaque(pixels: np.ndarray) -> np.ndarray:
    """Returns RGB or RGBA pixels, uint8 (height, width, 3 or 4), as RGB on white."""
    if pixels.shape[2] == 3:
        return pixels
    alpha = pixels[:, :, 3:] / np.float32(255)
    blended = pixels[:, :, :3] * alpha + WHITE * (1 - alpha)
    return np.rint(blended).astype(np.uint8)
