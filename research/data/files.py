"""Image files on disk: which there are, what they contain, and how their names are printed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from research.data.decode import DamagedImageError

# Those that Pillow reads, and HEIC, so that a phone's photos are named as what cannot be used.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif"),
)
BYTES_AT_MOST = 2**28


def image_files(folder: Path) -> list[Path]:
    """Returns what is named like an image in a folder and below, in order.

    Folders that are links are not entered, so that no circle of them is; hidden files are left out.

    Raises:
      OSError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    return sorted(
        Path(parent, name)
        for parent, folders, files in os.walk(folder, onerror=refuse)
        for name in (*folders, *files)
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
    )


def read_image_file(path: str | os.PathLike[str]) -> bytes:
    """Returns the content of a file.

    Raises:
      DamagedImageError: it cannot be read, is larger than `BYTES_AT_MOST`, or is a folder, a pipe
        or something else than a file.
    """
    try:
        # A pipe would be waited for, and looking at a device may set it going.
        kind = os.stat(path)
        if stat.S_ISDIR(kind.st_mode):
            raise DamagedImageError("a folder, not a file")
        if not stat.S_ISREG(kind.st_mode):
            raise DamagedImageError("a pipe, socket or device, not a file")
        if kind.st_size > BYTES_AT_MOST:
            raise DamagedImageError(f"a file of more than {BYTES_AT_MOST:,} bytes")
        return Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DamagedImageError(f"cannot be read: {reason}") from error
