"""How a photo becomes a square: `squash`, `crop` or `pad`. This module imports no NumPy.

`research/serving/graph_decoding.py` does the same with TensorFlow.
"""

from __future__ import annotations

from typing import NamedTuple

RESIZES = ("squash", "crop", "pad")
# The mean colour of ImageNet. The preprocessing of each backbone makes it 0 or nearly 0, which is
# also what convolutions see outside of a photo. Black would become -1 to -124.
BARS = (124, 116, 104)


class Placement(NamedTuple):
    """The part of a photo that is used, and its size in the square. The rest of the square is bars.

    Attributes:
      box: left, upper, right and lower edge of the part, in pixels of the photo.
      size: width and height in pixels that the part is resized to. The part is centred in the
        square, and bars on opposite sides have the same width.
    """

    box: tuple[float, float, float, float]
    size: tuple[int, int]


def place(width: int, height: int, size: int, resize: str) -> Placement:
    """Returns the placement of a photo of `width` times `height` pixels.

    Args:
      width: of the photo.
      height: of the photo.
      size: height and width of the square in pixels, at least 2.
      resize: one of `RESIZES`. `squash` stretches the photo to the square. `crop` resizes it so
        that its shorter side has `size` pixels, and takes the central square. `pad` resizes it so
        that its longer side has `size` pixels, and fills the rest with `BARS`.
    """
    if resize == "squash":
        return Placement((0, 0, width, height), (size, size))
    if resize == "crop":
        side = min(width, height)
        left, upper = (width - side) / 2, (height - side) / 2
        return Placement((left, upper, left + side, upper + side), (size, size))
    longer = max(width, height)
    # Rounded, but at most so wide that one or two pixels of the photo remain.
    bars = [
        min((size * (longer - side) + longer) // (2 * longer), (size - 1) // 2)
        for side in (width, height)
    ]
    return Placement((0, 0, width, height), (size - 2 * bars[0], size - 2 * bars[1]))


def draft_size(width: int, height: int, size: int, resize: str) -> tuple[int, int]:
    """Returns a width and height that a JPEG of `width` times `height` pixels must keep.

    A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size. With at least 1.5 times the final size,
    the result differs from full decoding by 41 dB, no more than the results of two good resizing
    filters differ.
    """
    placed = place(width, height, size, resize).size
    return 3 * placed[0] // 2, 3 * placed[1] // 2
