"""Opens a file of weights from somebody else, without trusting it.

What is read is numbers in HDF5. Nothing in the file is executed or built; its configuration is not
even looked at, links out of it are not followed, and it takes no more memory than its numbers need.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import h5py

from research.system.errors import UserError, one_line
from research.system.machine import memory_limit

ARCHIVE_MEMBER = "model.weights.h5"
# What zipfile and h5py raise on damaged files, as far as `tests/fuzzing/fuzz_files.py` shows.
UNREADABLE = (
    OSError,
    RuntimeError,
    EOFError,
    KeyError,
    ValueError,
    TypeError,
    OverflowError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)
# What a small file may grow to in memory, whatever it claims: Keras compresses nothing, and
# trained weights hardly shrink.
LEAST_GROWTH, MOST_GROWTH = 2**26, 16
DEEPEST = 100  # groups in groups; models in models in a saved model are a handful


@contextmanager
def open_weights(path: str, wanted: int) -> Iterator[h5py.File]:
    """Opens the HDF5 of a file for reading so many bytes of numbers.

    Raises:
      UserError: it cannot be read, or not in several times the memory of the file and the numbers.
    """
    if not os.path.exists(path):
        raise UserError(
            f"weights is {path!r}, which does not exist; expected imagenet, none or a file"
        )
    if os.path.isdir(path):
        raise UserError(f"weights is {path!r}, a folder; expected a file of Keras weights in it")
    if not os.path.isfile(path):  # a pipe, which would be waited for, or a device without an end
        raise UserError(f"weights is {path!r}, which is no regular file; expected Keras weights")
    try:
        source: str | io.BytesIO = path
        # In HDF5, thousands of names can be one long text, and attributes can be compressed.
        with memory_limit(4 * (os.path.getsize(path) + wanted) + LEAST_GROWTH * MOST_GROWTH):
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    source = io.BytesIO(_member(archive, path))
            with h5py.File(source, "r") as file:
                yield file
    except UNREADABLE as error:
        reason = one_line(error)
        raise UserError(
            f"weights file {path} cannot be read ({reason}); expected Keras weights in HDF5 or a "
            ".keras archive: it may be cut off, or be something else"
        ) from error


def _member(archive: zipfile.ZipFile, path: str) -> bytes:
    """Returns the weights in an archive of Keras 3; raises `UserError` if they are no such."""
    if ARCHIVE_MEMBER not in archive.namelist():
        raise UserError(
            f"weights file {path} is an archive without {ARCHIVE_MEMBER}; expected one that Keras "
            "3 saved"
        )
    member = archive.getinfo(ARCHIVE_MEMBER)
    # Other compressions are expanded without a bound.
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(
            f"weights file {path} is compressed in a way that Keras does not use; expected an "
            "archive that Keras 3 saved"
        )
    if member.file_size > max(MOST_GROWTH * os.path.getsize(path), LEAST_GROWTH):
        raise UserError(
            f"weights file {path} would grow from {os.path.getsize(path):,} to "
            f"{member.file_size:,} bytes when unpacked, which no trained weights do; expected an "
            "archive that Keras 3 saved"
        )
    return archive.read(member)


def groups_and_arrays(
    file: h5py.File, path: str
) -> tuple[dict[str, h5py.Group], dict[str, h5py.Dataset]]:
    """Returns all groups and arrays by path. Links out of the file are not followed."""
    groups: dict[str, h5py.Group] = {"": file}
    arrays: dict[str, h5py.Dataset] = {}

    def visit(name: str | bytes, item: h5py.Group | h5py.Dataset | h5py.Datatype) -> None:
        if isinstance(name, bytes):
            raise ValueError(f"the name {name!r} is damaged")
        if name.count("/") > DEEPEST:
            raise ValueError("its groups are nested too deeply")
        if isinstance(item, h5py.Group):
            groups[name] = item
        elif isinstance(item, h5py.Dataset):
            if item.external or item.is_virtual:
                raise UserError(
                    f"weights file {path} takes {name!r} from another file; expected a file that "
                    "holds its numbers itself"
                )
            arrays[name] = item

    file.visititems(visit)
    return groups, arrays
