"""Photos in a zip or tar file, which is read without unpacking it."""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import io
import lzma
import shutil
import tarfile
import tempfile
import threading
import weakref
import zipfile
import zlib
from collections.abc import Callable
from typing import IO, Any, NamedTuple

from research.data.files import has_image_content, is_hidden, is_image
from research.data.folder.photo_tree import ListedFolders, PhotoTree, parents, state_of_file
from research.data.source import MAX_FILE_BYTES, Example
from research.system.errors import UserError, one_line
from research.system.printable import printable

# `tarfile` and `zipfile` raise all of these for damaged archives.
DAMAGED = (
    *(tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, OSError, EOFError),
    *(NotImplementedError, RuntimeError, ValueError, KeyError, zlib.error),
)
COMPRESSIONS: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}


class Member(NamedTuple):
    """A file in an archive: its size in bytes, and a function that opens it."""

    size: int
    open: Callable[[], IO[bytes] | None]


def is_archive(path: str) -> bool:
    """Returns whether a file is a zip or tar file, by its content."""
    with contextlib.suppress(*DAMAGED):
        return tarfile.is_tarfile(path) or zipfile.is_zipfile(path)
    return False


class ArchiveTree(ListedFolders, PhotoTree):
    """The folders and images of a zip or tar file.

    A compressed tar file is decompressed into a temporary file, because photos are not read in the
    order in which they are stored.

    Raises:
      UserError: the archive is damaged, or the temporary file cannot be written.
    """

    def __init__(self, path: str) -> None:
        self._lock = threading.Lock()  # the members share one position in the file
        files = contextlib.ExitStack()
        weakref.finalize(self, files.close)
        try:
            self._members, folders = _open(path, files)
        except DAMAGED as error:
            raise UserError(
                f"image_folder is {path!r}, an archive that cannot be read ({one_line(error)}); "
                "unpack it, and give the folder"
            ) from error
        for member in self._members:
            folders.update(parents(member))
        # As on disk, a folder with the name of an image is reported as unreadable.
        images = [name for name in {*self._members, *folders} if self._is_image(name)]
        super().__init__(path, images, folders)
        self._state = state_of_file(path)

    def size(self, path: str) -> int | None:
        if path not in self._members:
            return None
        size = self._members[path].size
        if not size:  # links in a tar file have no size of their own
            with contextlib.suppress(*DAMAGED):
                size = len(self._content(path))
        return size

    def place(self, path: str) -> str:
        return path

    def read(self, path: str, label: Any) -> Example:
        name = printable(path)
        if path not in self._members:
            return Example(None, label, name, "a folder, not a file")
        try:
            content = self._content(path)
        except DAMAGED as error:
            return Example(None, label, name, f"cannot be read: {one_line(error)}")
        if len(content) > MAX_FILE_BYTES:
            return Example(None, label, name, f"a file of more than {MAX_FILE_BYTES:,} bytes")
        return Example(content, label, name)

    def state(self, path: str) -> str:
        return self._state

    def _content(self, path: str) -> bytes:
        with self._lock:
            file = self._members[path].open()
            if file is None:
                raise ValueError("a link to a folder")
            with file:
                return file.read(MAX_FILE_BYTES + 1)

    def _is_image(self, path: str) -> bool:
        name = path.rpartition("/")[2]
        if "." in name or is_hidden(name):
            return is_image(name)
        with contextlib.suppress(*DAMAGED):
            return has_image_content(io.BytesIO(self._content(path)))
        return False


def _open(path: str, files: contextlib.ExitStack) -> tuple[dict[str, Member], set[str]]:
    """Opens an archive until `files` is closed. Returns its files by path, and its folders."""
    members, folders = {}, set()
    # `is_zipfile` only looks at the end of a file, which in a tar file may be a zip file.
    if not tarfile.is_tarfile(path):
        archive = files.enter_context(zipfile.ZipFile(path))
        for info in archive.infolist():
            name = _normal(info.filename.replace("\\", "/"))  # as some Windows programs write it
            if info.is_dir():
                folders.add(name)
            else:
                opener = functools.partial(archive.open, info)
                members[name] = Member(info.file_size, opener)
    else:
        plain = _plain(path, files)
        tar = files.enter_context(tarfile.open(fileobj=plain))  # noqa: SIM115
        listed = tar.getmembers()
        plain.seek(tar.offset)
        if len(plain.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends too early")
        for one in listed:
            if one.isdir():
                folders.add(_normal(one.name))
            elif not one.isdev():  # pipes and devices
                members[_normal(one.name)] = Member(
                    one.size, functools.partial(tar.extractfile, one)
                )
    return members, folders - {""}


def _plain(path: str, files: contextlib.ExitStack) -> IO[bytes]:
    """Opens a tar file, decompressed."""
    with open(path, "rb") as file:
        start = file.read(8)
    for magic, decompress in COMPRESSIONS.items():
        if start.startswith(magic):
            plain = files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            with decompress(path, "rb") as compressed:
                shutil.copyfileobj(compressed, plain)
            plain.seek(0)
            return plain
    return files.enter_context(open(path, "rb"))


def _normal(name: str) -> str:
    """Returns a path in an archive without "." and "..", which may name the same folder."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))
