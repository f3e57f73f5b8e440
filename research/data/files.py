"""Finds image files on disk."""

from __future__ import annotations

import os
from pathlib import Path

# The formats that Pillow reads, and HEIC, so that photos of phones are reported as unusable.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif"),
)


def image_files(folder: Path) -> list[Path]:
    """Returns the paths in a folder and its subfolders that have an image suffix, sorted.

    Hidden files are left out. Links to folders are not followed, because they can form a cycle.

    Raises:
      OSError: a folder cannot be read.
    """

    def stop(error: OSError) -> None:
        raise error

    return sorted(
        Path(parent, name)
        for parent, folders, files in os.walk(folder, onerror=stop)
        for name in (*folders, *files)
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
    )
