"""Fingerprints of photos, and the search for photos that look alike."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import imagehash
import numpy as np
from PIL import Image

from research.data.decode import decode_image
from research.data.digest import digest_of

HASH_SIDE = 16  # the perceptual hash has 16 x 16 bits; 64 bits confuse different photos too often
THUMBNAIL_SIDE = 16
REDUCED_SIDE = 128  # minimum length of the shorter side after the reduction before hashing
MIN_CORRELATION = 0.9  # of two thumbnails; copies reach it, different photos hardly ever
MIN_DEVIATION = 2.0  # of the grey values of a thumbnail; plainer photos are not compared
BLOCK = 256  # photos compared with all others at a time
MAX_PAIRS = 100_000


class Fingerprint(NamedTuple):
    """The size, the hashes and a thumbnail of a photo.

    Attributes:
      width: in pixels, after rotation by the EXIF orientation.
      height: likewise.
      file_digest: hash of the stored bytes, hexadecimal.
      pixel_digest: SHA-256 of the decoded pixels and their shape, hexadecimal.
      perceptual_hash: uint64 (4,), 256 bits.
      thumbnail: uint8 (256,), a greyscale image of 16 x 16 pixels.
    """

    width: int
    height: int
    file_digest: str
    pixel_digest: str
    perceptual_hash: np.ndarray
    thumbnail: np.ndarray


def fingerprint(image: bytes | np.ndarray) -> Fingerprint:
    """Decodes a photo at full size and returns its fingerprint.

    The perceptual hash is `imagehash.phash`: the signs of the lowest frequencies of the cosine
    transform (Zauner 2010, Implementation and benchmarking of perceptual image hash functions).

    Raises:
      DamagedImageError: see `decode_image`.
    """
    pixels = decode_image(image)
    height, width, _ = pixels.shape
    pixel_digest = hashlib.sha256(repr(pixels.shape).encode())
    pixel_digest.update(np.ascontiguousarray(pixels).data)
    grey = Image.fromarray(pixels).convert("L")
    grey = grey.reduce(max(1, min(width, height) // REDUCED_SIDE))  # halves the time
    bits = imagehash.phash(grey, hash_size=HASH_SIDE).hash
    thumbnail = grey.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)
    return Fingerprint(
        width,
        height,
        digest_of(image),
        pixel_digest.hexdigest(),
        np.packbits(bits).view(np.uint64),
        np.asarray(thumbnail).ravel(),
    )


def similar_pairs(
    hashes: np.ndarray, thumbnails: np.ndarray, distance: int
) -> list[tuple[int, int, int]]:
    """Returns the pairs of photos that look alike, at most `MAX_PAIRS`.

    The hashes of a pair differ in few bits, and its thumbnails are correlated. Each criterion alone
    would confuse some drawings or plain photos.

    Args:
      hashes: uint64 (photos, words), perceptual hashes.
      thumbnails: uint8 (photos, pixels).
      distance: maximum number of differing bits.

    Returns:
      For each pair the indices of its photos, and the number of differing bits.
    """
    grey = thumbnails.astype(np.float32)
    grey -= grey.mean(axis=1, keepdims=True)
    min_norm = MIN_DEVIATION * thumbnails.shape[1] ** 0.5
    norms = np.linalg.norm(grey, axis=1, keepdims=True)
    # A plain thumbnail becomes zeros, whose correlation with others is 0.
    grey = np.where(norms >= min_norm, grey / np.maximum(norms, min_norm), 0)
    pairs: list[tuple[int, int, int]] = []
    for start in range(0, len(hashes), BLOCK):
        # The matrix product leaves only a few pairs, for which the bits are then counted.
        correlations = grey[start : start + BLOCK] @ grey[start:].T
        rows, columns = np.nonzero(np.triu(correlations >= MIN_CORRELATION, 1))
        first, second = start + rows, start + columns
        bits = np.bitwise_count(hashes[first] ^ hashes[second]).sum(axis=1, dtype=np.int64)
        near = np.stack([first, second, bits], axis=1)[bits <= distance].tolist()
        pairs += [(one, other, differing) for one, other, differing in near]
        if len(pairs) >= MAX_PAIRS:
            break
    return pairs[:MAX_PAIRS]
