"""Keeps decoded photos in memory, in files that later runs find, or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from research.data.cache_store import CacheStore, MakeRows
from research.data.decode import DamagedImageError, decode_image
from research.data.digest import digest_of
from research.data.photos_on_demand import PhotosOnDemand
from research.data.rows import JoinedRows, Rows
from research.data.source import Example, Source, checked, counted
from research.data.split_arrays import (
    SplitArrays,
    decode_examples,
    load_split,
)
from research.data.targets import join_targets, stack_targets
from research.system.errors import UserError
from research.system.machine import fits_in_memory, free_disk

CHUNK_BYTES = 2**26  # pixels of the photos in one entry of the cache
MANY_PHOTOS = 20_000  # from this number on, `auto` keeps decoded photos for later runs
PHOTOS_FOLDER = "photos"  # below the folder of the trunk cache
TEXTS = ("names", "digests", "damaged")  # the fields that an entry keeps as JSON
DECODERS = ("pillow", "pillow-heif", "simplejpeg", "cykooz-resizer", "numpy")


def cache_folder(given: str | None) -> Path:
    """Returns the folder of the caches.

    Args:
      given: the setting `cache_dir`. None for a folder of the user.

    Raises:
      UserError: none is given, and the home folder is not known.
    """
    if given:
        return Path(given)
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if root.startswith("~"):
        raise UserError("the home folder is not known; set HOME, or give --cache_dir=DIR")
    return Path(root) / "finetune-loop"


def decoder_versions() -> dict[str, str]:
    """Returns the versions of the installed packages that decode and resize photos, by name."""
    versions = {}
    for name in DECODERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # HEIC is optional
            versions[name] = importlib.metadata.version(name)
    return versions


@dataclasses.dataclass(frozen=True)
class PhotoCache:
    """Decides where the decoded photos of a split are kept, and decodes them.

    Args:
      setting: `memory`; `disk`, in files that later runs find; `none`, to decode each photo when a
        batch needs it; or `auto`, which takes files that are there, memory, new files or none, in
        this order, and new files first from `MANY_PHOTOS` photos on.
      folder: of the files. None for the user's cache folder.
    """

    setting: str = "auto"
    folder: str | None = None

    def load(
        self,
        source: Source,
        split: str,
        size: int,
        resize: str = "squash",
        on_photo: Callable[[], object] = lambda: None,
    ) -> SplitArrays:
        """Returns the photos of a split; the arguments are those of `load_split`.

        Raises:
          UserError: see `load_split`; or the photos cannot be kept as the setting requests.
        """
        if self.setting == "none":
            return _on_demand(source, split, size, resize)
        if self.setting == "memory" or not source.count(split):
            return load_split(source, split, size, resize, on_photo)
        chunks = _Chunks(self.store, source, split, size, resize)
        place = self._place(chunks)
        if place == "disk":
            return self._from_disk(chunks, on_photo)
        if place == "none":
            return _on_demand(source, split, size, resize)
        return load_split(source, split, size, resize, on_photo)

    def _place(self, chunks: _Chunks) -> str:
        """Returns the place for the settings `disk` and `auto`: `memory`, `disk` or `none`."""
        source, split, size = chunks.source, chunks.split, chunks.nbytes
        free = free_disk(self.store.folder)
        if self.setting == "disk":
            if chunks.origin is None:
                raise UserError(
                    f"photo_cache is 'disk', but {type(source).__name__} has no origin({split!r}), "
                    "which recognises its photos; give --photo_cache=memory, or define it"
                )
            if not chunks.are_found and size > free:
                raise UserError(
                    f"photo_cache is 'disk', but the {chunks.photos:,} decoded photos of the "
                    f"{split} split take {size / 1e6:,.0f} MB, and {str(self.store.folder)!r} has "
                    "less free space; give another --cache_dir, or --photo_cache=none"
                )
            return "disk"
        has_room = chunks.origin is not None and size <= free // 2
        if chunks.are_found or (has_room and chunks.photos >= MANY_PHOTOS):
            return "disk"
        if fits_in_memory(size):
            return "memory"
        if has_room:
            return "disk"
        if source.random_access and size > free_disk(Path(tempfile.gettempdir())) // 2:
            print(
                f"photo cache  none: {size / 1e6:,.0f} MB of {split} photos need over half of the "
                "free space",
                flush=True,
            )
            return "none"
        return "memory"

    @property
    def store(self) -> CacheStore:
        """The files of the cache."""
        return CacheStore(cache_folder(self.folder) / PHOTOS_FOLDER, "photo cache")

    def _from_disk(self, chunks: _Chunks, on_photo: Callable[[], object]) -> SplitArrays:
        found = ", found there" if chunks.are_found else ""
        loaded = chunks.load(on_photo)
        if chunks.split == "train":
            (pixels,) = loaded.inputs
            print(f"photo cache  on disk{found}, {pixels.nbytes / 1e6:,.1f} MB", flush=True)
        return loaded


class _Chunk(NamedTuple):
    """The photos of a split from `first` up to `end`, and the description of their entry."""

    first: int
    end: int
    described: Mapping[str, Any]


class _Chunks:
    """The decoded photos of a split as entries of a store, each with some of the photos.

    Several processes that share the folder decode different chunks at the same time. A run that is
    killed keeps its finished chunks.
    """

    def __init__(
        self, store: CacheStore, source: Source, split: str, size: int, resize: str
    ) -> None:
        self._store, self._size, self._resize = store, size, resize
        self.source, self.split, self.origin = source, split, source.origin(split)
        self.photos = count = source.count(split)
        self.nbytes = math.prod((count, size, size, 3))
        step = max(1, CHUNK_BYTES // (3 * size * size))
        common = {
            "format": 2,
            "kept": "photos",
            "origin": self.origin,
            "photos": count,
            "size": size,
            "resize": resize,
            "decoders": decoder_versions(),
        }
        self._chunks = [
            _Chunk(first, min(first + step, count), {**common, "first": first})
            for first in range(0, count, step)
        ]
        self._reading: tuple[int, Iterator[Example]] = (0, iter(()))

    @functools.cached_property
    def are_found(self) -> bool:
        """Whether all chunks were in the store at first."""
        found = (self._store.find(chunk.described) for chunk in self._chunks)
        return self.origin is not None and all(arrays is not None for arrays in found)

    def load(self, on_photo: Callable[[], object]) -> SplitArrays:
        """Returns the photos of all chunks, and decodes those that are not in the store.

        Chunks that another process is decoding are left to it, and waited for at the end.
        """
        loaded: dict[int, SplitArrays] = {}
        for waits in (False, True):
            for index, chunk in enumerate(self._chunks):
                if index not in loaded and (waits or self._is_ready(chunk.described)):
                    loaded[index] = self._find_or_decode(chunk, on_photo)
        return _joined([loaded[index] for index in range(len(self._chunks))])

    def _is_ready(self, described: Mapping[str, Any]) -> bool:
        return self._store.find(described) is not None or not self._store.is_being_made(described)

    def _find_or_decode(self, chunk: _Chunk, on_photo: Callable[[], object]) -> SplitArrays:
        shape = (chunk.end - chunk.first, self._size, self._size, 3)

        def decode(make_rows: MakeRows) -> list[Rows]:
            pixels = make_rows(shape, np.dtype(np.uint8))
            examples = self._examples(chunk.first, chunk.end)
            decoded = decode_examples(examples, pixels, self._resize, on_photo)
            texts = {name: getattr(decoded, name) for name in TEXTS}
            texts["damaged"] = [(*one, chunk.first + index) for *one, index in decoded.damaged]
            texts["arrays"] = list(decoded.arrays)
            written = np.frombuffer(json.dumps(texts).encode(), np.uint8)
            others = []
            for array in (written, decoded.labels, *decoded.arrays.values()):
                others.append(make_rows(array.shape, array.dtype))
                others[-1].append(array)
            return [pixels, *others]

        is_unchanged = functools.partial(self._is_unchanged, chunk)
        return _unpacked(self._store.find_or_make(chunk.described, decode, is_unchanged))

    def _is_unchanged(self, chunk: _Chunk, arrays: Sequence[np.ndarray]) -> bool:
        """Returns whether the first photo has the same pixels, and damaged ones are still damaged.

        A photo that could not be read only once, because of its disk or network, is used again.
        """
        found = _unpacked(arrays)
        damaged = {index for _, _, index in found.damaged}
        if not self.source.random_access:
            if chunk.first:
                return True
            first = next(iter(self.source.examples(self.split)))
            return self._is_same(first, found, 0 in damaged)
        return all(
            self._is_same(self.source.read(self.split, index), found, index in damaged)
            for index in sorted({chunk.first, *damaged})
        )

    def _is_same(self, example: Example, found: SplitArrays, was_damaged: bool) -> bool:
        """Returns whether a photo is damaged as before, or the first one of a chunk as before."""
        try:
            if example.image is None:
                raise DamagedImageError(example.problem)
            pixels = decode_image(example.image, self._size, self._resize)
        except DamagedImageError:
            return was_damaged
        return (
            not was_damaged
            and found.digests[:1] == (digest_of(example.image),)
            and found.names[0] == example.name
            and np.array_equal(found.inputs[0][0], pixels)
        )

    def _examples(self, first: int, end: int) -> Iterator[Example]:
        """Yields some photos. A source without random access continues where it ended before."""
        if self.source.random_access:
            return (self.source.read(self.split, index) for index in range(first, end))
        position, reading = self._reading
        if position > first or not position:
            position, reading = 0, counted(self.source.examples(self.split), self.photos)
        self._reading = end, reading
        # The last part reads to the end of the source, which `counted` checks.
        stop = None if end == self.photos else end - position
        return itertools.islice(reading, first - position, stop)


def _unpacked(arrays: Sequence[np.ndarray]) -> SplitArrays:
    """Returns the photos of a chunk, from the arrays of its entry."""
    pixels, written, labels, *others = arrays
    texts = json.loads(bytes(written))
    return SplitArrays(
        (pixels,),
        np.asarray(labels),
        tuple(texts["names"]),
        tuple((name, reason, index) for name, reason, index in texts["damaged"]),
        digests=tuple(texts["digests"]),
        arrays=dict(zip(texts["arrays"], map(np.asarray, others), strict=True)),
    )


def _joined(parts: Sequence[SplitArrays]) -> SplitArrays:
    """Returns the photos of several chunks; raises `UserError` if their labels differ in shape."""
    filled = [part for part in parts if len(part)] or parts[:1]
    names = sorted({name for part in filled for name in part.arrays})
    if any(name not in part.arrays for part in filled for name in names):
        raise UserError(f"only some photos of the source have all of {', '.join(names)}")
    return SplitArrays(
        (JoinedRows([part.inputs[0] for part in filled]),),
        join_targets([part.labels for part in filled], "label"),
        tuple(itertools.chain.from_iterable(part.names for part in filled)),
        tuple(itertools.chain.from_iterable(part.damaged for part in parts)),
        digests=tuple(itertools.chain.from_iterable(part.digests for part in filled)),
        arrays={name: join_targets([part.arrays[name] for part in filled], name) for name in names},
    )


def check_usable(split: str, decoded: SplitArrays) -> None:
    """Raises `UserError` if all photos of a split are damaged, or if there is none for training."""
    if len(decoded) or not (decoded.damaged or split == "train"):
        return
    damaged = f"{len(decoded.damaged)} damaged"
    for name, reason, _ in decoded.damaged[:1]:
        damaged += f", for example {name!r}: {reason}"
    raise UserError(
        f"the {split} split has no usable photo ({damaged}); expected at least one: give other "
        "photos"
    )


def without_damaged(examples: SplitArrays) -> SplitArrays:
    """Returns the photos that were not found to be damaged, after all have been read once."""
    if examples.weights is None or examples.weights.all():
        return examples
    rows = np.flatnonzero(examples.weights)
    (pixels,) = examples.inputs
    kept = pixels.subset(rows)
    return dataclasses.replace(
        examples,
        inputs=(kept,),
        labels=examples.labels[rows],
        names=tuple(examples.names[row] for row in rows),
        damaged=(*examples.damaged, *pixels.damaged),
        digests=tuple(examples.digests[row] for row in rows),
        arrays={name: array[rows] for name, array in examples.arrays.items()},
        weights=kept.weights,
    )


def _on_demand(source: Source, split: str, size: int, resize: str) -> SplitArrays:
    """Returns the photos of a split, of which none is read before a batch needs it."""
    if not source.random_access:
        raise UserError(
            f"photo_cache is 'none', but {type(source).__name__} reads its photos only one after "
            "another; give --photo_cache=auto, photos in files, or a TFDS data set in the format "
            "ArrayRecord"
        )
    listed = list(map(checked, counted(source.listed(split), source.count(split))))
    indices = np.asarray([i for i, one in enumerate(listed) if one.image is not None], np.int64)
    usable = [listed[index] for index in indices]
    labels, arrays = stack_targets(usable)
    pixels = PhotosOnDemand(source, split, indices, size, resize)
    return SplitArrays(
        (pixels,),
        labels,
        tuple(example.name for example in usable),
        tuple((one.name, one.problem, i) for i, one in enumerate(listed) if one.image is None),
        digests=("",) * len(usable),  # the contents are not read in advance
        arrays=arrays,
        weights=pixels.weights,
    )
