"""Validates the index of a checkpoint before TensorFlow opens it.

TensorFlow ends the process if it cannot parse an entry of the index. Checksums detect accidental
damage, not a malicious index with correct checksums. The format is LevelDB's table: blocks of
entries sorted by key. Each key is stored without the prefix that it shares with the previous key.
Each tensor has a `BundleEntryProto`; see tensorflow/core/util/tensor_bundle.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import tensor_bundle_pb2

MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES = 48
TRAILER_BYTES = 5  # after each block: compression type and checksum


def check_index(path: str) -> None:
    """Checks that TensorFlow can open a checkpoint's index without ending the process.

    Args:
      path: path of the checkpoint, without its file extension.

    Raises:
      ValueError: the index is damaged, or declares tensors that are larger than the data file.
      OSError: a file cannot be read.
    """
    content = Path(f"{path}.index").read_bytes()
    if len(content) < FOOTER_BYTES or struct.unpack("<Q", content[-8:]) != (MAGIC,):
        raise ValueError("the index is truncated, or the file is not an index")
    try:
        (metaindex, length, offset, size), _ = _varints(content[-FOOTER_BYTES:-8], 4)
        list(_entries(_block(content, metaindex, length)))
        for _, place in _entries(_block(content, offset, size)):
            (start, length), _ = _varints(place, 2)
            for key, value in _entries(_block(content, start, length)):
                _check_entry(path, key, value)
    except (IndexError, struct.error, DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the index is damaged ({error})") from error


def _check_entry(path: str, key: bytes, value: bytes) -> None:
    if not key:
        header = tensor_bundle_pb2.BundleHeaderProto.FromString(value)
        if header.num_shards != 1:
            raise ValueError(f"the index names {header.num_shards} data files; expected 1")
        return
    name = key.decode("utf-8")
    entry = tensor_bundle_pb2.BundleEntryProto.FromString(value)
    if entry.slices or entry.shard_id:
        raise ValueError(f"tensor {name!r} is split into slices; expected an unsplit tensor")
    try:
        dtype = tf.dtypes.as_dtype(entry.dtype)
    except TypeError as error:
        raise ValueError(f"tensor {name!r} has an unknown dtype") from error
    elements = 1
    for dimension in entry.shape.dim:
        if not 0 <= dimension.size < 2**40:
            raise ValueError(f"tensor {name!r} has a dimension of size {dimension.size}")
        elements *= dimension.size
    data_bytes = Path(f"{path}.data-00000-of-00001").stat().st_size
    least_bytes = elements * (1 if dtype == tf.string else dtype.size)
    if entry.offset < 0 or not least_bytes <= entry.size <= data_bytes - entry.offset:
        raise ValueError(f"tensor {name!r} does not fit in the data file")


def _block(content: bytes, offset: int, size: int) -> bytes:
    end = offset + size
    if len(content) < end + TRAILER_BYTES or content[end]:
        raise ValueError("the index is truncated or compressed")
    return content[offset:end]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the keys and values of a block, in order.

    The block ends with its restart points: the offsets of entries whose key shares no prefix.
    """
    (count,) = struct.unpack("<I", block[-4:])
    end = len(block) - 4 * (count + 1)
    if end < 0:
        raise ValueError("the index is damaged")
    restarts = {*struct.unpack(f"<{count}I", block[end:-4])} - {0}
    key, position = b"", 0
    while position < end:
        (shared, added, length), place = _varints(block, 3, position)
        if not shared:
            restarts.discard(position)
        following = key[:shared] + block[place : place + added]
        position = place + added + length
        if position > end or shared > len(key) or (key and following <= key):
            raise ValueError("the index is damaged")
        key = following
        yield key, block[place + added : position]
    if restarts:
        raise ValueError("the index is damaged")


def _varints(data: bytes, count: int, position: int = 0) -> tuple[list[int], int]:
    """Returns the varints (7 bits per byte, lowest first) at a position, and the position after.

    Raises IndexError if the data ends within a number, or if a number has more than 64 bits.
    """
    numbers = []
    for _ in range(count):
        number = 0
        for shift in range(0, 64, 7):
            byte = data[position]
            position += 1
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
        else:
            raise IndexError("a number of more than 64 bits")
        numbers.append(number)
    return numbers, position
