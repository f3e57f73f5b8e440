"""Finds image files on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# The formats that Pillow reads, and HEIC, the format of many phones.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif"),
)


# Folders of operating systems and storage devices, with copies or thumbnails of photos.
SYSTEM_FOLDERS = {
    *("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"),
}


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder is hidden or belongs to the system."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def is_image(name: str) -> bool:
    """Returns whether a file name has an image suffix and is not hidden."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name)


def has_images(folder: Path) -> bool:
    """Returns whether `image_files` would find a path."""
    return next(_walk(folder), None) is not None


def image_files(folder: Path) -> list[Path]:
    """Returns the paths in a folder and its subfolders that have an image suffix, sorted.

    Hidden files and folders are left out. Links to folders are not followed, because they can form
    a cycle.

    Raises:
      OSError: a folder cannot be read.
    """
    return sorted(_walk(folder))


def _walk(root: Path) -> Iterator[Path]:
    def stop(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(root, onerror=stop):
        folders[:] = [name for name in folders if not is_hidden(name)]
        yield from (Path(parent, name) for name in (*folders, *files) if is_image(name))
