"""Arrays that are written by rows, in memory or in a file, and arrays that are joined."""

from __future__ import annotations

import dataclasses
import itertools
import math
import tempfile
import threading
from collections.abc import Sequence
from typing import IO

import numpy as np

from research.system.errors import UserError

MOVED_BYTES = 2**24  # at a time


@dataclasses.dataclass(eq=False)
class Rows:
    """An array whose rows are written one after another, or in any order by several threads.

    Args:
      shape: shape of the array, (maximum number of rows, ...).
      dtype: of the elements.
      file: receives the rows. None keeps the rows in memory.
      way_out: what the user can do if the disk is full; ends the error message.
      closes_file: whether `finish` closes the file. The finished rows stay readable.
    """

    shape: tuple[int, ...]
    dtype: np.dtype | type
    file: IO[bytes] | None = None
    way_out: str = "make room"
    closes_file: bool = False

    def __post_init__(self) -> None:
        in_memory = 0 if self.file else self.shape[0]
        self._memory = np.empty((in_memory, *self.shape[1:]), self.dtype)
        self._row_bytes = math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize
        self._end = 0
        self._lock = threading.Lock()

    def append(self, rows: np.ndarray) -> None:
        """Adds rows of shape (rows, ...) after the last row; raises as `write`."""
        self.write(self._end, rows)

    def write(self, first: int, rows: np.ndarray) -> None:
        """Writes rows of shape (rows, ...), the first of them at the index `first`.

        Raises:
          UserError: there are more rows than the shape has, or they cannot be written.
        """
        end = first + len(rows)
        if end > self.shape[0]:
            raise UserError(
                f"the source yields more photos than its count, {self.shape[0]:,}; correct its "
                "method `count`"
            )
        if self.file is None:
            self._memory[first:end] = rows
        else:
            stored = np.asarray(rows, self.dtype).tobytes()
            try:
                with self._lock:
                    self.file.seek(first * self._row_bytes)
                    self.file.write(stored)
                    self.file.flush()
            except OSError as error:
                raise UserError(
                    "photos or outputs of the frozen layers cannot be written to disk "
                    f"({error.strerror}); {self.way_out}"
                ) from error
        with self._lock:
            self._end = max(self._end, end)

    def finish(self, unused: Sequence[int] = ()) -> np.ndarray:
        """Returns the rows up to the last one. Rows in a file are read from it on each access.

        Args:
          unused: indices of rows that were not written. The rows after them take their places.
        """
        count = self._without_gaps(sorted(row for row in unused if row < self._end))
        finished = self._memory[:count]
        if self.file is not None and count:  # an empty file cannot be mapped
            self.file.truncate(count * self._row_bytes)
            finished = np.memmap(self.file, self.dtype, "r", shape=(count, *self.shape[1:]))
        if self.file is not None and self.closes_file:
            self.file.close()
        return finished

    def _without_gaps(self, gaps: Sequence[int]) -> int:
        """Moves the rows behind each gap to the front; returns the number of rows without gaps."""
        place = gaps[0] if gaps else self._end
        at_once = max(1, MOVED_BYTES // max(1, self._row_bytes))
        for gap, end in itertools.pairwise([*gaps, self._end]):
            for first in range(gap + 1, end, at_once):
                rows = self._read(first, min(first + at_once, end))
                self.write(place, rows)
                place += len(rows)
        return place

    def _read(self, first: int, end: int) -> np.ndarray:
        """Returns rows that were written, (rows, ...)."""
        if self.file is None:
            return self._memory[first:end]
        self.file.seek(first * self._row_bytes)
        stored = self.file.read((end - first) * self._row_bytes)
        return np.frombuffer(stored, self.dtype).reshape(-1, *self.shape[1:])


def rows_in_a_file(shape: tuple[int, ...], dtype: np.dtype | type) -> Rows:
    """Returns rows in a file without a name, which the system removes when the process ends."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the rows are finished)
    way_out = "make room, or set the environment variable TMPDIR to a folder on a larger disk"
    return Rows(shape, dtype, file, way_out, closes_file=True)


class JoinedRows:
    """Several arrays as one array: the rows of the first, then those of the second, and so on.

    Args:
      arrays: of the same dtype, and the same shape except for the number of rows.

    Attributes:
      shape, dtype, nbytes: of the whole.
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = [np.asarray(array) for array in arrays]  # as plain arrays, not memmaps
        self._ends = np.cumsum([len(array) for array in arrays])
        self.shape = (int(self._ends[-1]), *arrays[0].shape[1:])
        self.dtype = arrays[0].dtype
        self.nbytes = sum(array.nbytes for array in arrays)

    def __len__(self) -> int:
        return self.shape[0]

    def take(self, rows: np.ndarray, axis: int = 0) -> np.ndarray:
        """Returns the rows with these indices, (rows, ...)."""
        taken = np.empty((len(rows), *self.shape[1:]), self.dtype)
        places = np.searchsorted(self._ends, rows, side="right")
        for place in np.unique(places):
            array, chosen = self._arrays[place], places == place
            first = self._ends[place] - len(array)
            taken[chosen] = array.take(rows[chosen] - first, axis=axis)
        return taken
