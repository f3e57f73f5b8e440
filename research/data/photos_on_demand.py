"""Photos of a split that are read and decoded each time a batch needs them."""

from __future__ import annotations

import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tqdm

from research.data.decode import DamagedImageError, decode_image
from research.data.source import Example, Source, checked
from research.system.errors import UserError
from research.system.machine import processors

NAMED = 10  # damaged photos that are named; all are counted


class PhotosOnDemand:
    """The decoded photos of a split, which are read as an array but are not kept.

    A photo that cannot be read or decoded is black, and has the weight 0 until it can. If photos
    cannot be read that were read before, the storage is lost, and an error ends the run.

    Args:
      source: reads single photos; see `Source.read`.
      split: name of the split.
      indices: of the photos in the split, int64 (photos,).
      size: height and width in pixels.
      resize: how photos become squares, see `decode_image`.

    Attributes:
      shape, dtype: of the array: (photos, size, size, 3), uint8.
      weights: float32 (photos,), 0 for each damaged photo that was read so far.

    Raises:
      UserError: in `take`, if photos cannot be read that were read before.
    """

    def __init__(
        self, source: Source, split: str, indices: np.ndarray, size: int, resize: str
    ) -> None:
        self.shape = (len(indices), size, size, 3)
        self.dtype = np.dtype(np.uint8)
        self.weights = np.ones(len(indices), np.float32)
        self._source, self._split, self._indices = source, split, indices
        self._size, self._resize = size, resize
        self._damaged: dict[int, tuple[str, str, int]] = {}
        self._read_before: int | None = None  # the photo that was read last
        self._pool = ThreadPoolExecutor(processors())
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        warnings.filterwarnings("ignore", module=r"PIL\.")  # about unusual but readable photos

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def damaged(self) -> tuple[tuple[str, str, int], ...]:
        """Name, reason and index of each damaged photo that was read so far, in their order."""
        return tuple(one for _, one in sorted(self._damaged.copy().items()))

    def subset(self, rows: np.ndarray) -> PhotosOnDemand:
        """Returns the photos with these indices."""
        return PhotosOnDemand(
            self._source, self._split, self._indices[rows], self._size, self._resize
        )

    def take(self, rows: np.ndarray, axis: int = 0) -> np.ndarray:
        """Decodes photos on all processors; returns uint8 (rows, size, size, 3)."""
        pixels = np.zeros((len(rows), *self.shape[1:]), np.uint8)
        tasks = [
            self._pool.submit(self._decode, int(row), out)
            for row, out in zip(rows, pixels, strict=True)
        ]
        for task in tasks:
            task.result()
        return pixels

    def _decode(self, row: int, out: np.ndarray) -> None:
        index = int(self._indices[row])
        example = checked(self._source.read(self._split, index))
        try:
            if example.image is None:
                self._check_storage(example, index)
                raise DamagedImageError(example.problem)
            self._read_before = index
            out[:] = decode_image(example.image, self._size, self._resize)
            self.weights[row] = 1
            self._damaged.pop(row, None)
        except DamagedImageError as damage:
            self.weights[row] = 0
            is_new = row not in self._damaged
            self._damaged[row] = example.name, str(damage), index
            if is_new:
                self._report(example.name, str(damage))

    def _check_storage(self, unreadable: Example, index: int) -> None:
        """Raises `UserError` if a photo that was read before cannot be read either."""
        before = self._read_before
        if before in (None, index) or self._source.read(self._split, before).image is not None:
            return
        raise UserError(
            f"{unreadable.name!r} {unreadable.problem}; another photo that was read before cannot "
            "be read either; give the same command again when the photos can be read"
        )

    def _report(self, name: str, reason: str) -> None:
        count = len(self._damaged)
        if count <= NAMED:
            end = "; further ones are not named" if count == NAMED else ""
            tqdm.tqdm.write(
                f"skipped a damaged {self._split} photo ({count} so far): {name}: {reason}{end}"
            )
