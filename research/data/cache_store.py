"""`CacheStore`: arrays on disk that later runs find by a description of their origin."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import filelock
import ml_dtypes
import numpy as np

from research.data.rows import Rows
from research.system.errors import UserError

# Only numeric types: an array of Python objects in a mapped file would hold arbitrary pointers.
NUMBER_FORMATS = {
    np.dtype(kind).name: np.dtype(kind)
    for kind in (
        np.uint8,
        np.int32,
        np.int64,
        ml_dtypes.bfloat16,
        np.float16,
        np.float32,
        np.float64,
    )
}

UNUSED_DAYS = 60  # entries that are not used for so long are removed when another one is written

MakeRows = Callable[[tuple[int, ...], np.dtype], Rows]


class CacheStore:
    """A folder of entries. Each entry is a folder of raw arrays and of `contents.json`.

    An entry is written to a folder `*.partial` and renamed when it is complete and on disk. A lock
    protects the folder; it is released when the process ends. The next run that writes an entry
    removes the partial folders of killed runs. The time of `contents.json` is that of the last use.

    Args:
      folder: contains the entries; need not exist.
      name: of the cache, for messages: 'trunk cache' or 'photo cache'.
    """

    def __init__(self, folder: Path, name: str = "trunk cache") -> None:
        self.folder = folder
        self._name = name
        self._is_tidy = False

    @property
    def has_entries(self) -> bool:
        """Whether the folder contains an entry."""
        return any(self.folder.glob("*/contents.json"))

    def find(self, description: Mapping[str, Any]) -> tuple[np.ndarray, ...] | None:
        """Returns the arrays with this description; None if there are none or they are damaged."""
        entry = self._entry(description)
        try:
            contents = json.loads((entry / "contents.json").read_text(encoding="utf-8"))
            if contents["made_from"] != dict(description):
                return None
            arrays = tuple(
                _open(entry / f"{index}.bin", array)
                for index, array in enumerate(contents["arrays"])
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        with contextlib.suppress(OSError):  # the folder may be read-only
            os.utime(entry / "contents.json")
        return arrays

    def find_or_make(
        self,
        description: Mapping[str, Any],
        make: Callable[[MakeRows], Sequence[Rows]],
        is_valid: Callable[[Sequence[np.ndarray]], bool] = lambda _: True,
    ) -> tuple[np.ndarray, ...]:
        """Returns the arrays with this description, and computes them if there are none.

        If another process is computing them, this method waits for it.

        Args:
          description: the origin of the arrays; a JSON object.
          make: computes the arrays. Its argument is a function that creates empty rows.
          is_valid: checks arrays that were found. If it returns False, they are computed again.

        Raises:
          UserError: the folder cannot be written.
        """
        found = self.find(description)
        if found is not None and is_valid(found):
            return found
        entry = self._entry(description)
        with self._writing(), self.lock(description):
            found = self.find(description)
            if found is not None and is_valid(found):
                return found
            if not self._is_tidy:  # reading all entries for each new one would take long
                self._remove_leftovers()
                self._remove_unused()
                self._is_tidy = True
            partial = entry.with_name(entry.name + ".partial")
            for leftover in (entry, partial):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir()
            try:
                self._make(partial, description, make)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            os.replace(partial, entry)
            found = self.find(description)
        if found is None:
            raise UserError(f"{str(entry)!r} cannot be read back after it was written")
        return found

    @contextlib.contextmanager
    def lock(self, description: Mapping[str, Any]) -> Iterator[None]:
        """Waits until no other process writes the arrays with this description."""
        lock = filelock.FileLock(f"{self._entry(description)}.lock")
        try:
            lock.acquire(timeout=0.1)
        except filelock.Timeout:
            print(f"{self._name}  waiting for another run that fills the same cache", flush=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def is_being_made(self, description: Mapping[str, Any]) -> bool:
        """Returns whether another process writes the arrays with this description now."""
        try:
            with filelock.FileLock(f"{self._entry(description)}.lock", timeout=0):
                return False
        except (filelock.Timeout, OSError):
            return True

    def _remove_leftovers(self) -> None:
        """Removes the folders of killed runs: partial folders whose lock is free."""
        for partial in self.folder.glob("*.partial"):
            with (
                contextlib.suppress(filelock.Timeout),
                filelock.FileLock(partial.with_suffix(".lock"), timeout=0),
            ):
                shutil.rmtree(partial, ignore_errors=True)

    def _remove_unused(self) -> None:
        removed = remove_entries(unused_entries(entries_of(self.folder), UNUSED_DAYS))
        if removed:
            print(
                f"{self._name}  removed {removed / 1e6:,.0f} MB that no run used for "
                f"{UNUSED_DAYS} days",
                flush=True,
            )

    def _make(
        self,
        folder: Path,
        description: Mapping[str, Any],
        make: Callable[[MakeRows], Sequence[Rows]],
    ) -> None:
        with contextlib.ExitStack() as stack:
            files: list[IO[bytes]] = []

            def make_rows(shape: tuple[int, ...], dtype: np.dtype) -> Rows:
                file = stack.enter_context((folder / f"{len(files)}.bin").open("wb+"))
                files.append(file)
                way_out = f"make room in {str(self.folder)!r}, or give another --cache_dir"
                return Rows(shape, dtype, file, way_out)

            arrays = [rows.finish() for rows in make(make_rows)]
            contents = {
                "made_from": dict(description),
                "arrays": [{"shape": array.shape, "dtype": array.dtype.name} for array in arrays],
            }
            listing = stack.enter_context((folder / "contents.json").open("w", encoding="utf-8"))
            json.dump(contents, listing, indent=2)
            listing.flush()
            for number in [file.fileno() for file in files] + [listing.fileno()]:
                os.fsync(number)

    def _entry(self, description: Mapping[str, Any]) -> Path:
        text = json.dumps(dict(description), sort_keys=True)
        return self.folder / hashlib.sha256(text.encode()).hexdigest()[:32]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            off = "--photo_cache=memory" if self._name == "photo cache" else "--trunk_cache=off"
            raise UserError(
                f"cache_dir {str(self.folder)!r} cannot be written ({error.strerror or error}); "
                f"give another --cache_dir, or {off}"
            ) from error


class Entry(NamedTuple):
    """An entry of a store.

    Attributes:
      folder: contains its files.
      made_from: its description, see `CacheStore`; empty if it cannot be read.
      size: of its files, in bytes.
      used: when a run used it last, in seconds since 1970.
    """

    folder: Path
    made_from: Mapping[str, Any]
    size: int
    used: float


def entries_of(folder: Path) -> list[Entry]:
    """Returns the entries of the store in a folder, from the least to the most recently used."""
    entries = []
    for contents in folder.glob("*/contents.json"):
        if not re.fullmatch("[0-9a-f]{32}", contents.parent.name):
            continue  # not of a store
        with contextlib.suppress(OSError):  # another process removed it
            size = sum(file.stat().st_size for file in contents.parent.iterdir())
            try:
                made_from = dict(json.loads(contents.read_text(encoding="utf-8"))["made_from"])
            except (ValueError, KeyError, TypeError, RecursionError):
                made_from = {}
            entries.append(Entry(contents.parent, made_from, size, contents.stat().st_mtime))
    return sorted(entries, key=lambda entry: entry.used)


def unused_entries(entries: Iterable[Entry], days: float) -> list[Entry]:
    """Returns the entries that no run used in the last days."""
    return [entry for entry in entries if entry.used < time.time() - days * 86400]


def surplus_entries(entries: Sequence[Entry], size: float) -> list[Entry]:
    """Returns the least recently used entries, without which the others take at most `size` bytes.

    Args:
      entries: as `entries_of` returns them.
      size: in bytes.
    """
    kept = list(itertools.accumulate(entry.size for entry in reversed(entries)))
    return list(entries[: sum(one > size for one in kept)])


def remove_entries(entries: Iterable[Entry]) -> int:
    """Removes entries, except those that are being written; returns the number of bytes.

    A run that uses an entry keeps its arrays, because their files stay until it ends.
    """
    removed = 0
    for entry in entries:
        with (
            contextlib.suppress(filelock.Timeout, OSError),
            filelock.FileLock(f"{entry.folder}.lock", timeout=0),
        ):
            shutil.rmtree(entry.folder)
            removed += entry.size
    return removed


def _open(file: Path, array: Mapping[str, Any]) -> np.ndarray:
    """Maps a file; raises ValueError or KeyError if it does not contain the described array."""
    dtype = NUMBER_FORMATS[array["dtype"]]
    shape = tuple(array["shape"])
    if not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(f"{shape} is not a shape")
    expected = math.prod(shape) * dtype.itemsize
    if file.stat().st_size != expected:
        raise ValueError(f"{str(file)!r} does not have {expected} bytes")
    if not expected:  # an empty file cannot be mapped
        return np.zeros(shape, dtype)
    return np.memmap(file, dtype, "r", shape=shape)
