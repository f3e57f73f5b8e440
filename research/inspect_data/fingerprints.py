"""What a photo is recognised by: its bytes, its pixels, and how it looks."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import imagehash
import numpy as np
from PIL import Image

from research.data.decode import decode_image
from research.data.split_arrays import digest_of

HASH_SIDE = 16  # of the perceptual hash, in bits: 64 bits confuse different photos too often
THUMBNAIL_SIDE = 16
REDUCED_SIDE = 128  # of the shorter side at least, if it is reduced before it is hashed


class Fingerprint(NamedTuple):
    """A photo without its pixels.

    Attributes:
      width: in pixels, upright.
      height: the same.
      file_digest: SHA-256 of the stored bytes, hexadecimal.
      pixel_digest: SHA-256 of the decoded pixels and their shape.
      look: uint64 (4,), the 256 bits of its perceptual hash.
      thumbnail: uint8 (256,), a grey picture of 16 x 16.
    """

    width: int
    height: int
    file_digest: str
    pixel_digest: str
    look: np.ndarray
    thumbnail: np.ndarray


def fingerprint(image: bytes | np.ndarray) -> Fingerprint:
    """Decodes a photo in full and returns what it is recognised by.

    The perceptual hash is `imagehash.phash`: the signs of the lowest frequencies of the cosine
    transform (Zauner 2010, Implementation and benchmarking of perceptual image hash functions).

    Raises:
      DamagedImageError: as `decode_image`.
    """
    pixels = decode_image(image)
    height, width, _ = pixels.shape
    of_pixels = hashlib.sha256(repr(pixels.shape).encode())
    of_pixels.update(np.ascontiguousarray(pixels).data)
    grey = Image.fromarray(pixels).convert("L")
    grey = grey.reduce(max(1, min(width, height) // REDUCED_SIDE))  # halves the time
    bits = imagehash.phash(grey, hash_size=HASH_SIDE).hash
    small = grey.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)
    return Fingerprint(
        width,
        height,
        digest_of(image),
        of_pixels.hexdigest(),
        np.packbits(bits).view(np.uint64),
        np.asarray(small).ravel(),
    )
