"""Opens an untrusted file of weights.

Only arrays in HDF5 and the names of layers are read. Nothing in the file is executed or built,
links to other files are not followed, and memory is limited by the size of the arrays.
"""

from __future__ import annotations

import io
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import h5py

from research.system.errors import UserError, one_line
from research.system.machine import memory_limit

ARCHIVE_MEMBER = "model.weights.h5"
# zipfile unpacks other compressions without a limit on memory.
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# Exceptions of zipfile and h5py for damaged files, found with `tests/fuzzing/fuzz_files.py`.
UNREADABLE_HDF5 = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError)
UNREADABLE_ARCHIVE = (EOFError, MemoryError, zipfile.BadZipFile, zlib.error)
# An unpacked file may have 16 times the size of the file, and always 64 MiB. Keras does not
# compress weights, and trained weights hardly compress.
MAX_GROWTH, ALLOWED_BYTES = 16, 2**26
EXPORT = "run_export.py --format=keras"
MAX_DEPTH = 100  # of nested groups; a saved model has only a few levels of nested models

GroupsAndArrays = tuple[dict[str, h5py.Group], dict[str, h5py.Dataset]]


@contextmanager
def open_weights(path: str, array_bytes: int) -> Iterator[GroupsAndArrays]:
    """Opens an HDF5 file, or the HDF5 file in a `.keras` archive, with limited memory.

    Yields all groups and all arrays of the file by path. Links to other files are not followed.

    Args:
      path: the file.
      array_bytes: size of the arrays to read, in bytes.

    Raises:
      UserError: if the file cannot be read, or if it needs several times the memory of the file and
        the arrays.
    """
    if known := _other_format(path):
        raise UserError(f"weights is {path!r}, which {known}")
    if not os.path.isfile(path):  # reading a pipe would block, and a device may have no end
        problem = "is a folder" if os.path.isdir(path) else "is not a regular file"
        raise UserError(
            f"weights is {path!r}, which {problem if os.path.exists(path) else 'does not exist'}; "
            "expected imagenet, none or a file of Keras weights"
        )
    try:
        source: str | io.BytesIO = path
        # A small HDF5 file can need much memory: thousands of names can share one long text, and
        # attributes can be compressed.
        with memory_limit(4 * (os.path.getsize(path) + array_bytes) + MAX_GROWTH * ALLOWED_BYTES):
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    source = io.BytesIO(_read_member(archive, path))
            with h5py.File(source, "r") as file:
                yield _groups_and_arrays(file, path)
    except (*UNREADABLE_HDF5, *UNREADABLE_ARCHIVE) as error:
        raise UserError(
            f"weights file {path} cannot be read ({one_line(error)}); expected Keras weights in "
            "HDF5 or a .keras archive: the file may be truncated or have another format"
        ) from error


def _other_format(path: str) -> str | None:
    """Returns what a path is, and what to give instead, if it is a known format of weights."""
    prefix = re.sub(r"\.(index|data-\d+-of-\d+)$", "", path)
    run = os.path.join(path, "config.json"), os.path.join(path, "checkpoints")
    if all(map(os.path.exists, run)):
        return f"is the folder of a training run; give the file that {EXPORT} writes"
    if os.path.exists(f"{prefix}.index"):
        return f"is a TensorFlow checkpoint; give the file that {EXPORT} writes for its run"
    if os.path.exists(os.path.join(path, "saved_model.pb")):
        return "is a SavedModel; save the Keras model that it was made from as FILE.keras"
    if os.path.isfile(path) and _is_pickle(path):
        return (
            "is a Python pickle, as of torch.save, and could run any code; convert it with the "
            "package safetensors: safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
            "'FILE.safetensors')"
        )
    if path.endswith(".weights.json") and os.path.isfile(path):
        return "lists several files; save the weights in one, with save_weights('NAME.weights.h5')"
    return None


def _is_pickle(path: str) -> bool:
    """Returns whether the content is a pickle, or an archive of torch.save, which contains one."""
    with open(path, "rb") as file:
        start = file.read(2)
    if start[:1] == b"\x80" and start[1:] in (b"\2", b"\3", b"\4", b"\5"):
        return True
    if start != b"PK" or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except UNREADABLE_ARCHIVE:
        return False  # the reader of archives reports it


def _read_member(archive: zipfile.ZipFile, path: str) -> bytes:
    """Returns the HDF5 file in a Keras 3 archive; raises `UserError` if there is no valid one."""
    size = os.path.getsize(path)
    if ARCHIVE_MEMBER not in archive.namelist():
        problem = f"is an archive without {ARCHIVE_MEMBER}"
    elif (member := archive.getinfo(ARCHIVE_MEMBER)).compress_type not in COMPRESSIONS:
        problem = "is compressed in a way that Keras does not use"
    elif member.file_size > max(MAX_GROWTH * size, ALLOWED_BYTES):
        problem = f"would grow from {size:,} to {member.file_size:,} bytes, unlike trained weights"
    else:
        return archive.read(member)
    raise UserError(f"weights file {path} {problem}; expected an archive that Keras 3 saved")


def _groups_and_arrays(file: h5py.File, path: str) -> GroupsAndArrays:
    groups: dict[str, h5py.Group] = {"": file}
    arrays: dict[str, h5py.Dataset] = {}

    def visit(name: str | bytes, item: h5py.Group | h5py.Dataset | h5py.Datatype) -> None:
        if isinstance(name, bytes):
            raise ValueError(f"the name {name!r} is damaged")
        if name.count("/") > MAX_DEPTH:
            raise ValueError("its groups are nested too deeply")
        if isinstance(item, h5py.Group):
            groups[name] = item
        elif isinstance(item, h5py.Dataset):
            if item.external or item.is_virtual:
                raise UserError(
                    f"weights file {path} stores {name!r} in another file; expected a file that "
                    "contains all its values"
                )
            arrays[name] = item

    file.visititems(visit)
    return groups, arrays
