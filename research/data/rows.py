"""Arrays that are filled row by row, in memory or in a file."""

from __future__ import annotations

import tempfile
from typing import IO

import numpy as np

from research.system.errors import UserError
from research.system.machine import fits_in_memory


class Rows:
    """An array under construction, written from its first row to its last.

    Args:
      shape: rows at most, and the shape of one.
      dtype: of the elements.
      file: takes the rows one after another; they are kept in memory if None.
      way_out: what a user may do if there is no room for the file.
      closes_file: close the file when the rows are finished, which no longer need it then.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype | type,
        file: IO[bytes] | None = None,
        way_out: str = "make room",
        closes_file: bool = False,
    ) -> None:
        self._dtype = np.dtype(dtype)
        self._shape = shape[1:]
        self._file = file
        self._memory = np.empty(shape if file is None else (0, *shape[1:]), dtype)
        self._way_out = way_out
        self._closes_file = closes_file
        self._count = 0

    def append(self, rows: np.ndarray) -> None:
        """Adds rows, (rows, ...); raises `UserError` where they cannot be written."""
        if self._file is None:
            self._memory[self._count : self._count + len(rows)] = rows
        else:
            try:
                self._file.write(np.asarray(rows, self._dtype).tobytes())
                self._file.flush()
            except OSError as error:
                raise UserError(
                    f"photos, or what the frozen layers make of them, cannot be kept on disk "
                    f"({error.strerror}); {self._way_out}"
                ) from error
        self._count += len(rows)

    def finish(self) -> np.ndarray:
        """Returns the rows that were added; of a file each is read when it is needed."""
        finished = self._memory[: self._count]
        if self._file is not None and self._count:
            finished = np.memmap(self._file, self._dtype, "r", shape=(self._count, *self._shape))
        if self._file is not None and self._closes_file:
            self._file.close()
        return finished


def rows_of_size(shape: tuple[int, ...], dtype: np.dtype | type) -> Rows:
    """Returns rows in memory if they take less than half of what is free, else in a file."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return Rows(shape, dtype) if fits_in_memory(size) else rows_in_a_file(shape, dtype)


def rows_in_a_file(shape: tuple[int, ...], dtype: np.dtype | type) -> Rows:
    """Returns rows in a file without a name: it goes with the process, however that ends."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the rows are finished)
    way_out = "make room, or set the environment variable TMPDIR to a folder on a larger disk"
    return Rows(shape, dtype, file, way_out, closes_file=True)
