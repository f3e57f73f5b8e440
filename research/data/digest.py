"""The hash of a photo's content."""

from __future__ import annotations

import hashlib

import numpy as np


def digest_of(image: bytes | np.ndarray) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 of a photo as it is stored.

    The decoded pixels of a file are not hashed, because they can differ between decoder versions.
    """
    if isinstance(image, np.ndarray):
        image = f"{image.shape}".encode() + image.tobytes()
    return hashlib.sha256(image).hexdigest()[:16]
