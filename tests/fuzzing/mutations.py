"""Mutations of files: random damage, as by disks and networks, and deliberate manipulation."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

import numpy as np
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

Mutate = Callable[[bytes, np.random.Generator], bytes]

# Extreme lengths and offsets for a header.
CLAIMS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
FOOTER = 48


def flip_bits(data: bytes, random: np.random.Generator) -> bytes:
    """Flips 1 to 8 bits at random positions."""
    changed = bytearray(data)
    for place in random.integers(0, len(data), random.integers(1, 9)):
        changed[place] ^= 1 << int(random.integers(8))
    return bytes(changed)


def flip_early_bits(data: bytes, random: np.random.Generator) -> bytes:
    """Flips 1 to 8 bits in the first 2,000 bytes, where the headers are."""
    return flip_bits(data[:2000], random) + data[2000:]


def cut_off(data: bytes, random: np.random.Generator) -> bytes:
    """Truncates the file, as a full disk or an interrupted download does."""
    return data[: random.integers(0, len(data))]


def take_out(data: bytes, random: np.random.Generator) -> bytes:
    """Removes a block of 1 to 4,096 bytes."""
    start, length = random.integers(0, len(data)), random.integers(1, 4097)
    return data[:start] + data[start + length :]


def put_in(data: bytes, random: np.random.Generator) -> bytes:
    """Inserts 1 to 4,096 random bytes."""
    start = random.integers(0, len(data))
    return data[:start] + random.bytes(int(random.integers(1, 4097))) + data[start:]


def overwrite(data: bytes, random: np.random.Generator) -> bytes:
    """Overwrites a block with zeros or with another block of the file."""
    start, other = random.integers(0, len(data), 2)
    block = data[other : other + 512]
    block = bytes(len(block)) if random.integers(2) else block
    return (data[:start] + block + data[start + len(block) :])[: len(data)]


def claim(data: bytes, random: np.random.Generator) -> bytes:
    """Writes an extreme number where a header may have a length, a shape or an offset."""
    width = int(random.choice((1, 2, 4, 8)))
    number = CLAIMS[random.integers(len(CLAIMS))] % 2 ** (8 * width)
    start = int(random.integers(0, max(1, min(len(data), 8000) - width)))
    return data[:start] + number.to_bytes(width, "little") + data[start + width :]


def reseal(data: bytes, random: np.random.Generator) -> bytes:
    """Changes a block of a checkpoint's index and corrects its checksum.

    The format is LevelDB's table: blocks, each followed by its compression (one byte) and the
    masked CRC-32C of both. A footer gives the position of the index of the blocks.
    """
    # The footer: offset and size of the metaindex, then of the index.
    index_offset, index_size = _varints(data[-FOOTER:])[2:4]
    # The index's first entry: three lengths, a key, then offset and size of the first block.
    after_key = index_offset + 3 + data[index_offset + 1]
    first = tuple(_varints(data[after_key : after_key + 20])[:2])
    start, length = ((index_offset, index_size), first)[int(random.integers(4) > 0)]
    mutate = (flip_bits, claim, overwrite)[random.integers(3)]
    block = mutate(data[start : start + length], random)[:length].ljust(length, b"\0")
    sealed = block + data[start + length : start + length + 1]
    checksum = struct.pack("<I", masked_crc32c(sealed))
    return data[:start] + sealed + checksum + data[start + len(sealed) + 4 :]


def _varints(data: bytes) -> list[int]:
    """Decodes variable-length integers: 7 bits per byte, lowest bits first."""
    numbers, number, shift = [], 0, 0
    for byte in data:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            numbers.append(number)
            number, shift = 0, 0
    return numbers


MUTATIONS: Mapping[str, Mutate] = {
    mutate.__name__: mutate
    for mutate in (flip_bits, flip_early_bits, cut_off, take_out, put_in, overwrite, claim)
}
