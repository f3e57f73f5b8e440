"""Looks a checkpoint's index through before TensorFlow opens it.

TensorFlow ends the process where an entry of the index cannot be parsed. Its checksums tell of
chance, not of a stranger who makes them right. The format is LevelDB's table (blocks of entries
sorted by key, whose beginning a key shares with the one before) with a `BundleEntryProto` a tensor,
tensorflow/core/util/tensor_bundle.
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
AFTER_BLOCK_BYTES = 5  # the kind of compression, and a checksum


def check_index(path: str) -> None:
    """Raises ValueError for a checkpoint whose index TensorFlow could not survive.

    Args:
      path: of the checkpoint, without ending.

    Raises:
      ValueError: the index is damaged, or claims tensors that its files are too small for.
      OSError: a file cannot be read.
    """
    content = Path(f"{path}.index").read_bytes()
    if len(content) < FOOTER_BYTES or struct.unpack("<Q", content[-8:]) != (MAGIC,):
        raise ValueError("its index is cut off, or is none")
    try:
        metaindex, length, offset, size = _numbers(content[-FOOTER_BYTES:-8], 4)
        list(_entries(_block(content, metaindex, length)))
        for _, place in _entries(_block(content, offset, size)):
            start, length = _numbers(place, 2)
            for key, value in _entries(_block(content, start, length)):
                _check_entry(path, key, value)
    except (IndexError, struct.error, DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"its index is damaged ({error})") from error


def _check_entry(path: str, key: bytes, value: bytes) -> None:
    if not key:
        header = tensor_bundle_pb2.BundleHeaderProto.FromString(value)
        if header.num_shards != 1:
            raise ValueError(f"its index speaks of {header.num_shards} files; expected one")
        return
    name = key.decode("utf-8")
    entry = tensor_bundle_pb2.BundleEntryProto.FromString(value)
    if entry.slices or entry.shard_id:
        raise ValueError(f"its index has {name!r} in parts, which this project does not write")
    try:
        dtype = tf.dtypes.as_dtype(entry.dtype)
    except TypeError as error:
        raise ValueError(f"its index has {name!r} of no known type") from error
    elements = 1
    for dimension in entry.shape.dim:
        if not 0 <= dimension.size < 2**40:
            raise ValueError(f"its index has {name!r} with an axis of {dimension.size}")
        elements *= dimension.size
    there = Path(f"{path}.data-00000-of-00001").stat().st_size
    least = elements * (1 if dtype == tf.string else dtype.size)
    if entry.offset < 0 or not least <= entry.size <= there - entry.offset:
        raise ValueError(f"its index has {name!r} where there is no such tensor")


def _block(content: bytes, offset: int, size: int) -> bytes:
    block = content[offset : offset + size]
    if len(content) < offset + size + AFTER_BLOCK_BYTES or content[offset + size]:
        raise ValueError("its index is cut off, or compressed")
    return block


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the keys and values of a block, in order.

    At its end are the places of the entries whose key shares nothing, for finding one quickly.
    """
    (count,) = struct.unpack("<I", block[-4:])
    end = len(block) - 4 * (count + 1)
    if end < 0:
        raise ValueError("its index is damaged")
    restarts = {*struct.unpack(f"<{count}I", block[end:-4])} - {0}
    key, position = b"", 0
    while position < end:
        shared, place = _number(block, position)
        if not shared:
            restarts.discard(position)
        added, place = _number(block, place)
        length, place = _number(block, place)
        following = key[:shared] + block[place : place + added]
        position = place + added + length
        if position > end or shared > len(key) or (key and following <= key):
            raise ValueError("its index is damaged")
        key = following
        yield key, block[place + added : position]
    if restarts:
        raise ValueError("its index is damaged")


def _number(data: bytes, position: int) -> tuple[int, int]:
    """Returns the number that stands at a place, 7 bits a byte from the lowest; and what is next.

    Raises IndexError where the data ends in it.
    """
    number = 0
    for shift in range(0, 64, 7):
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise IndexError("a number of more than 64 bits")


def _numbers(data: bytes, count: int) -> list[int]:
    numbers: list[int] = []
    position = 0
    while len(numbers) < count:
        number, position = _number(data, position)
        numbers.append(number)
    return numbers
