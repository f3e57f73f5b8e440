"""Finds image files on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from PIL import Image

from research.data.formats import readable_formats
from research.data.thread_pool import pillow_warnings_hidden
from research.system.printable import path_of

# The formats that Pillow reads, and HEIC, the format of many phones.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif"),
)


# Folders of operating systems and storage devices, with copies or thumbnails of photos.
SYSTEM_FOLDERS = {
    *("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "#recycle"),
}


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder is hidden or belongs to the system."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def is_image(name: str) -> bool:
    """Returns whether a file name has an image suffix and is not hidden."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name)


def image_files(folder: Path) -> list[Path]:
    """Returns the paths in a folder and its subfolders that have an image suffix, sorted.

    Files without a suffix are included if their content is an image. Hidden files and folders are
    left out. Links to folders are not followed, because they can form a cycle.

    Raises:
      OSError: a folder cannot be read.
    """
    return sorted(folder / path_of(name) for name in walk_images(folder))


def walk_images(folder: Path, deep: bool = True) -> Iterator[str]:
    """Yields the paths of `image_files` relative to the folder, as text, in any order.

    Args:
      folder: an existing folder.
      deep: whether images in subfolders are included, and folders with the name of an image.
    """

    def stop(error: OSError) -> None:
        raise error

    # `Path` would take three times as long for a hundred thousand photos.
    root = os.fsencode(folder)
    for parent, folders, files in os.walk(root, onerror=stop):
        folders[:] = [name for name in folders if not is_hidden(_text(name))]
        start = _text(os.path.relpath(parent, root)) + "/" if parent != root else ""
        if not deep:
            folders.clear()
        for name in (*folders, *files):
            text = _text(name)
            if is_image(text) or ("." not in text and _is_image_file(os.path.join(parent, name))):
                yield start + text


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _is_image_file(file: bytes) -> bool:
    return os.path.isfile(file) and has_image_content(Path(os.fsdecode(file)))  # not a pipe


def has_image_content(file: Path | IO[bytes]) -> bool:
    """Returns whether a file is an image, by its content."""
    try:
        with pillow_warnings_hidden(), Image.open(file, formats=readable_formats()):
            return True
    except Exception:  # Pillow raises nearly every type; the file may be anything
        return False
