"""`SplitArrays`: a split whose photos are decoded and resized, in arrays to be indexed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from research.data.decode import DamagedImageError, decode_image, oddities_ignored
from research.data.parallel import in_parallel
from research.data.rows import rows_of_size
from research.data.source import Example, Source
from research.system.errors import UserError

CHUNK_BYTES = 2**21  # of pixels that a thread makes at a time
# What a batch holds besides the arrays of a source.
BATCH_KEYS = ("image", "mirrored", "label", "weight", "partner_label", "partner_share")


@dataclasses.dataclass(frozen=True)
class SplitArrays:
    """A split, ready to be drawn from.

    Attributes:
      inputs: what the model takes; arrays of shape (views * examples, ...). For photos one array of
        uint8 RGB (examples, size, size, 3); for a cached trunk its activations, one or several.
      labels: (examples, ...): int32 for whole numbers such as class indices, or float32.
      names: a name for each example, for people.
      damaged: names of photos that could not be decoded and are left out, with the reasons.
      views: how many views of each example the inputs hold, one after another.
      digests: 16 hexadecimal digits that tell each photo's content from others; none for
        activations.
      arrays: further arrays of the source by name, (examples, ...), int32 or float32.
    """

    inputs: tuple[np.ndarray, ...]
    labels: np.ndarray
    names: tuple[str, ...]
    damaged: tuple[tuple[str, str], ...] = ()
    views: int = 1
    digests: tuple[str, ...] = ()
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)


class _Decoded(NamedTuple):
    pixels: np.ndarray
    digest: str


def load_split(
    source: Source, split: str, size: int, on_progress: Callable[[int, int], None] | None = None
) -> SplitArrays:
    """Decodes and resizes all photos of a split, on all processors.

    Args:
      source: where the photos come from.
      split: its split, such as 'train'.
      size: height and width in pixels to resize to.
      on_progress: called with the number of photos done and their total, now and then.

    Raises:
      UserError: labels or arrays of the source do not have one shape, or are not numbers.
    """
    count = source.count(split)
    pixels = rows_of_size((count, size, size, 3), np.uint8)
    used: list[Example] = []
    digests: list[str] = []
    damaged: list[tuple[str, str]] = []
    photos_a_chunk = max(1, min(CHUNK_BYTES // (3 * size * size), 32))

    def decode(example: Example) -> _Decoded | DamagedImageError:
        if example.image is None:
            return DamagedImageError(example.problem)
        try:
            return _Decoded(decode_image(example.image, size), digest_of(example.image))
        except DamagedImageError as damage:
            return damage

    with (
        oddities_ignored(),
        in_parallel(source.examples(split), decode, photos_a_chunk) as decoded,
    ):
        for done, (example, photo) in enumerate(decoded, start=1):
            if isinstance(photo, DamagedImageError):
                damaged.append((example.name, str(photo)))
            else:
                pixels.append(photo.pixels[np.newaxis])
                used.append(example._replace(image=None))
                digests.append(photo.digest)
            if on_progress:
                on_progress(done, count)
    keys = sorted({key for example in used for key in example.arrays})
    return SplitArrays(
        (pixels.finish(),),
        _stacked("label", [example.label for example in used]),
        tuple(example.name for example in used),
        tuple(damaged),
        digests=tuple(digests),
        arrays={key: _stacked(key, [example.arrays.get(key) for example in used]) for key in keys},
    )


def _stacked(name: str, values: list[Any]) -> np.ndarray:
    """Returns one array of a value for each example, int32 or float32."""
    if name in BATCH_KEYS and name != "label":
        raise UserError(
            f"the source has an array named {name!r}; expected another name than "
            f"{', '.join(BATCH_KEYS)}"
        )
    try:
        array = np.asarray(values if values else np.zeros(0, np.int32))
        kind = np.float32 if array.dtype.kind == "f" else np.int32
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{array.dtype} holds no numbers")
        return array.astype(kind)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the source's {name} cannot be put into one array ({error}); expected numbers of one "
            "fixed shape for each photo"
        ) from error


def digest_of(image: bytes | np.ndarray) -> str:
    """Returns the beginning of the SHA-256 of a photo as it is stored.

    Not of the pixels of a file: they may change a little with the version of the decoder.
    """
    if isinstance(image, np.ndarray):
        image = f"{image.shape}".encode() + image.tobytes()
    return hashlib.sha256(image).hexdigest()[:16]
