"""`Folders` and `PhotoTree`: the folders and images of a folder or of an archive, by path."""

from __future__ import annotations

import abc
import collections
import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from research.data.files import is_hidden, walk_images
from research.data.source import Example, read_example
from research.system.printable import name_of, path_of, printable

END_BYTES = 4096


class Folders(abc.ABC):
    """The names of folders and images below a root.

    Paths are text, relative to the root, with "/" between names; the root is "".

    Attributes:
      root: the path of the folder or archive, as the user gave it.
    """

    root: str

    @abc.abstractmethod
    def folders(self, path: str) -> list[str]:
        """Returns the names of the folders directly in a folder, sorted.

        Hidden folders are included, and so are links to folders.
        """

    @abc.abstractmethod
    def loose_images(self, path: str) -> list[str]:
        """Returns the paths of the images directly in a folder, sorted."""

    @abc.abstractmethod
    def has_images(self, path: str) -> bool:
        """Returns whether `images` would find an image."""

    @abc.abstractmethod
    def images(self, path: str) -> list[str]:
        """Returns the paths of the images in a folder and in its subfolders, sorted.

        Hidden files and folders are left out, and links to folders are not followed.
        """


class PhotoTree(Folders):
    """Folders and images below a root, whose content can be read."""

    @abc.abstractmethod
    def size(self, path: str) -> int | None:
        """Returns the number of bytes of a file, or None if it cannot be read."""

    @abc.abstractmethod
    def place(self, path: str) -> Hashable:
        """Returns where a file is stored. Files with the same place have the same content."""

    @abc.abstractmethod
    def read(self, path: str, label: Any) -> Example:
        """Returns the content of a file, or the problem if it cannot be read."""

    @abc.abstractmethod
    def state(self, path: str) -> str:
        """Returns a text that changes when a file is written; it is not read."""

    def end(self, path: str) -> bytes | None:
        """Returns the last `END_BYTES` bytes of a file, or all; None if it cannot be read."""
        content = self.read(path, 0).image
        return None if content is None else bytes(content[-END_BYTES:])


class FolderTree(PhotoTree):
    """The folders and images of a folder on disk.

    Methods raise OSError if a folder cannot be read.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._folder = Path(root)
        self._root = os.path.join(os.fsencode(root), b"")

    def folders(self, path: str) -> list[str]:
        with os.scandir(self._folder / path_of(path)) as entries:
            return sorted(
                name_of(Path(entry.name))
                for entry in entries
                # A link may be circular, which `is_dir` of an entry does not ignore.
                if (os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir())
            )

    def loose_images(self, path: str) -> list[str]:
        folder = self._folder / path_of(path)
        return sorted(joined(path, name) for name in walk_images(folder, deep=False))

    def has_images(self, path: str) -> bool:
        return next(walk_images(self._folder / path_of(path)), None) is not None

    def images(self, path: str) -> list[str]:
        return sorted(joined(path, name) for name in walk_images(self._folder / path_of(path)))

    def size(self, path: str) -> int | None:
        try:
            return os.stat(self._file(path)).st_size
        except OSError:
            return None

    def place(self, path: str) -> Hashable:
        try:
            status = os.stat(self._file(path))
        except OSError:
            return path
        return status.st_dev, status.st_ino

    def read(self, path: str, label: Any) -> Example:
        return read_example(self._folder / path_of(path), label, printable(path))

    def state(self, path: str) -> str:
        return state_of_file(self._file(path))

    def end(self, path: str) -> bytes | None:
        try:
            with open(self._file(path), "rb", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - END_BYTES))
                return file.read(END_BYTES)
        except OSError:
            return None

    def _file(self, path: str) -> bytes:
        file = path.encode("utf-8", "surrogateescape")
        return file if file.startswith(b"/") else self._root + file


class ListedFolders(Folders):
    """Folders and images that are known by their paths.

    Args:
      root: see `Folders`.
      images: the paths of all images.
      folders: the paths of further folders, which may be empty.
    """

    def __init__(self, root: str, images: Sequence[str], folders: Iterable[str] = ()) -> None:
        self.root = root
        self._images: dict[str, list[str]] = collections.defaultdict(list)
        self._folders: dict[str, set[str]] = collections.defaultdict(set)
        for image in images:
            self._images[image.rpartition("/")[0]].append(image)
        for path in (*self._images, *folders):
            for folder in (path, *parents(path)):
                parent, _, name = folder.rpartition("/")
                if folder:
                    self._folders[parent].add(name)

    def folders(self, path: str) -> list[str]:
        return sorted(self._folders.get(path, ()))

    def loose_images(self, path: str) -> list[str]:
        folders = {joined(path, name) for name in self._folders.get(path, ())}
        return sorted(set(self._images.get(path, ())) - folders)

    def has_images(self, path: str) -> bool:
        return next(self._walk(path), None) is not None

    def images(self, path: str) -> list[str]:
        return sorted(self._walk(path))

    def _walk(self, path: str) -> Iterator[str]:
        yield from self._images.get(path, ())
        for folder in self._folders.get(path, ()):
            if not is_hidden(folder):
                yield from self._walk(joined(path, folder))


def state_of_file(file: str | bytes) -> str:
    """Returns a text that changes when a file is written, even if its time is then set back."""
    try:
        status = os.stat(file)
    except OSError as error:
        return str(error.strerror)
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def joined(path: str, name: str) -> str:
    """Returns the path of a child of a folder."""
    return f"{path}/{name}" if path else name


def parents(path: str) -> Iterator[str]:
    """Yields the folders that contain a path, from the innermost to the root."""
    while path:
        path = path.rpartition("/")[0]
        yield path
