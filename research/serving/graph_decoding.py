"""Decodes and resizes photos with TensorFlow operations only, as a part of an exported graph.

It replaces `research/data/decode.py` and `research/data/resampling.py`, which a graph cannot call.
"""

from __future__ import annotations

import functools

import tensorflow as tf

from research.data.resizing import BARS

SEARCHED_BYTES = 2**17  # two segments of maximum length: EXIF is the first, or follows JFIF
JPEG_START = int.from_bytes(b"\xff\xd8\xff", "big")
JPEG_EXIF = int.from_bytes(b"\xff\xe1", "big"), int.from_bytes(b"Exif\0\0", "big")
START_OF_SCAN = 0xFFDA  # the marker before the pixels
PNG_START, PNG_SIGNATURE_BYTES = int.from_bytes(b"\x89PN", "big"), 8
PNG_EXIF = int.from_bytes(b"eXIf", "big")
LITTLE_ENDIAN = int.from_bytes(b"II", "big")
ORIENTATION, SHORT = 0x0112, 3
# Regular expressions of RE2, where an escaped C is any byte. A PNG file can have transparent parts
# if its colour type is 4 or 6, or if it has a chunk tRNS.
TRANSPARENT_PNG = r"\CPNG(?:\C{21}[\x04\x06]\C*|\C*tRNS\C*)"
PALETTE_BMP = r"BM\C{26}\x08\C*"


def decode_upright(encoded: tf.Tensor, size: int, resize: str) -> tf.Tensor:
    """Decodes and resizes a photo like `decode_image`, and applies its EXIF orientation.

    Args:
      encoded: string scalar, the content of a JPEG, PNG, GIF or BMP file. Only the first frame is
        decoded. Transparent parts of a GIF file are black, not white as in training.
      size: height and width of the result in pixels.
      resize: how the photo becomes a square: `squash`, `crop` or `pad`.

    Returns:
      float32 RGB (size, size, 3), integers in [0, 255].
    """

    def square(photo: tf.Tensor) -> tf.Tensor:
        return to_square(photo[tf.newaxis], size, resize)[0]

    photo = tf.cond(
        tf.strings.substr(encoded, 0, 3) == b"\xff\xd8\xff",
        lambda: square(_decode_jpeg(encoded, size, resize)),
        lambda: square(_decode_other(encoded)),
    )
    # A square can be turned after resizing, because `to_square` is symmetric.
    return turn(photo, exif_orientation(encoded))


def to_square(photos: tf.Tensor, size: int, resize: str) -> tf.Tensor:
    """Resizes photos like `research.data.resampling.to_square`.

    Args:
      photos: RGB in [0, 255], (batch, height, width, 3).
      size: height and width of the result in pixels.
      resize: how a photo becomes a square: `squash`, `crop` or `pad`.

    Returns:
      float32 RGB (batch, size, size, 3), integers in [0, 255], as in training.
    """
    photos, sides = tf.cast(photos, tf.float32), tf.shape(photos)[1:3]
    if resize == "crop":
        scale = size / tf.reduce_min(sides)
        resized = tf.raw_ops.ScaleAndTranslate(
            images=photos,
            size=(size, size),
            scale=tf.cast([scale, scale], tf.float32),
            translation=tf.cast((size - scale * tf.cast(sides, scale.dtype)) / 2, tf.float32),
            kernel_type="triangle",
        )
    else:
        inner = _inner_size(sides, size, resize)
        resized = tf.image.resize(photos, inner, antialias=True)
    resized = tf.clip_by_value(tf.round(resized), 0.0, 255.0)
    if resize == "pad":
        rows, columns = tf.unstack((size - inner) // 2)
        bars = [[0, 0], [rows, rows], [columns, columns], [0, 0]]
        resized = tf.pad(resized - BARS, bars) + BARS
    return tf.ensure_shape(resized, (None, size, size, 3))


def _inner_size(sides: tf.Tensor, size: int, resize: str) -> tf.Tensor:
    """Returns the height and width of the resized part of a photo; see `place`."""
    if resize != "pad":
        return tf.constant((size, size))
    longer = tf.reduce_max(sides)
    bars = (size * (longer - sides) + longer) // (2 * longer)
    return size - 2 * tf.minimum(bars, (size - 1) // 2)


def _decode_jpeg(encoded: tf.Tensor, size: int, resize: str) -> tf.Tensor:
    # Like Pillow, see `draft_size`: with accurate arithmetic, and a photo far larger than needed
    # is decoded at 1/2, 1/4 or 1/8 of its size.
    sides = tf.io.extract_jpeg_shape(encoded)[:2]
    larger = tf.reduce_min(sides // (3 * _inner_size(sides, size, resize) // 2))
    branches = [
        functools.partial(
            tf.io.decode_jpeg, encoded, channels=3, ratio=ratio, dct_method="INTEGER_ACCURATE"
        )
        for ratio in (1, 2, 4, 8)
    ]
    return tf.switch_case(tf.reduce_sum(tf.cast(larger >= [2, 4, 8], tf.int32)), branches)


def _decode_other(encoded: tf.Tensor) -> tf.Tensor:
    """Decodes a PNG, GIF or BMP file; transparent parts of a PNG file become white."""
    start = tf.strings.substr(encoded, 0, SEARCHED_BYTES)
    branches = [
        lambda: tf.cast(tf.io.decode_image(encoded, channels=3, expand_animations=False), tf.int32),
        lambda: _on_white(tf.io.decode_png(encoded, channels=4)),
        lambda: _decode_bmp_with_palette(encoded),
    ]
    is_kind = [tf.strings.regex_full_match(start, kind) for kind in (TRANSPARENT_PNG, PALETTE_BMP)]
    return tf.switch_case(tf.reduce_sum(tf.cast(is_kind, tf.int32) * [1, 2]), branches)


def _on_white(photo: tf.Tensor) -> tf.Tensor:
    opacity = tf.cast(photo[..., 3:], tf.float32) / 255
    blended = tf.cast(photo[..., :3], tf.float32) * opacity + 255 * (1 - opacity)
    return tf.cast(tf.round(blended), tf.int32)


def _decode_bmp_with_palette(encoded: tf.Tensor) -> tf.Tensor:
    """Decodes a BMP file of 8 bits per pixel, whose palette TensorFlow does not apply."""

    def number(offset: int) -> tf.Tensor:
        return tf.io.decode_raw(tf.strings.substr(encoded, offset, 4), tf.int32)[0]

    pixels, palette = number(10), 14 + number(14)
    length = tf.minimum(pixels - palette, 4 * 256)
    colours = tf.io.decode_raw(tf.strings.substr(encoded, palette, length), tf.uint8)
    colours = tf.reshape(tf.pad(colours, [[0, 4 * 256 - tf.size(colours)]]), (256, 4))
    indices = tf.io.decode_bmp(encoded)[..., 0]
    return tf.gather(tf.cast(colours[:, 2::-1], tf.int32), tf.cast(indices, tf.int32))


def turn(photo: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Applies an EXIF orientation to a square photo.

    Args:
      photo: (size, size, channels).
      orientation: integer scalar, from 1 (upright) to 8.
    """
    photo = tf.where(orientation >= 5, tf.transpose(photo, (1, 0, 2)), photo)
    columns = tf.reduce_any(orientation == [2, 3, 6, 7])
    rows = tf.reduce_any(orientation == [3, 4, 7, 8])
    photo = tf.where(columns, tf.reverse(photo, [1]), photo)
    return tf.where(rows, tf.reverse(photo, [0]), photo)


def exif_orientation(encoded: tf.Tensor) -> tf.Tensor:
    """Reads the EXIF orientation of a JPEG or PNG file (CIPA DC-008, Exif 2.32, 4.6.4).

    Args:
      encoded: string scalar, the content of the file.

    Returns:
      int32 scalar from 1 (upright) to 8; 1 if EXIF data are missing, damaged, or not found in the
      first `SEARCHED_BYTES`.
    """
    content = tf.io.decode_raw(tf.strings.substr(encoded, 0, SEARCHED_BYTES), tf.uint8)
    # Zeros follow the content, because offsets in damaged files may point behind it.
    content = tf.pad(content, [[0, SEARCHED_BYTES + 8 - tf.size(content)]])

    def number(offset: tf.Tensor, digits: int) -> tf.Tensor:
        """Returns the big-endian numbers of `digits` bytes at some offsets."""
        first = tf.clip_by_value(offset, 0, SEARCHED_BYTES)[..., tf.newaxis]
        found = tf.cast(tf.gather(content, first + tf.range(digits, dtype=tf.int64)), tf.int64)
        return tf.reduce_sum(found * [256**k for k in reversed(range(digits))], axis=-1)

    start = number(tf.constant(0, tf.int64), 3)
    is_jpeg, is_png = start == JPEG_START, start == PNG_START

    def is_exif(part: tf.Tensor) -> tf.Tensor:
        """Returns whether a segment of a JPEG, or a chunk of a PNG file, has EXIF data."""
        in_jpeg = (number(part, 2) == JPEG_EXIF[0]) & (number(part + 4, 6) == JPEG_EXIF[1])
        return tf.where(is_png, number(part + 4, 4) == PNG_EXIF, in_jpeg)

    def is_another(part: tf.Tensor) -> tf.Tensor:
        marker = number(part, 2)
        in_jpeg = (marker > 0xFF00) & (marker != START_OF_SCAN)
        return tf.where(is_png, part < SEARCHED_BYTES, in_jpeg) & ~is_exif(part)

    def behind(part: tf.Tensor) -> tf.Tensor:
        return part + tf.where(is_png, 12 + number(part, 4), 2 + number(part + 2, 2))

    (part,) = tf.while_loop(
        is_another,
        lambda part: (behind(part),),
        (tf.where(is_png, tf.constant(PNG_SIGNATURE_BYTES, tf.int64), 2),),
        maximum_iterations=64,
    )
    header = part + tf.where(is_png, tf.constant(8, tf.int64), 10)
    is_little = number(header, 2) == LITTLE_ENDIAN

    def value(offset: tf.Tensor, digits: int) -> tf.Tensor:
        """Returns numbers in the byte order of the EXIF data."""
        little = sum(number(offset + k, 1) * 256**k for k in range(digits))
        return tf.where(is_little, little, number(offset, digits))

    directory = header + value(header + 4, 4)
    entries = directory + 2 + 12 * tf.range(tf.minimum(value(directory, 2), 1000))
    is_orientation = (value(entries, 2) == ORIENTATION) & (value(entries + 2, 2) == SHORT)
    found = tf.boolean_mask(value(entries + 8, 2), is_orientation)
    orientation = tf.concat([found, [1]], axis=0)[0]
    is_known = (is_jpeg | is_png) & is_exif(part) & (orientation >= 1) & (orientation <= 8)
    return tf.cast(tf.where(is_known, orientation, 1), tf.int32)
