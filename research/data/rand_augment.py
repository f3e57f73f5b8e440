"""The operations of RandAugment (Cubuk et al. 2019, arXiv 1909.13719), computed with Pillow.

Keras's layer takes the same operations for a whole batch, and draws from a state of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

GREY = (128, 128, 128)  # what moves into the picture

Operation = Callable[[Image.Image, float], Image.Image]  # given a level in [-1, 1]


def _affine(image: Image.Image, coefficients: tuple[float, ...]) -> Image.Image:
    method, resample = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return image.transform(image.size, method, coefficients, resample, fillcolor=GREY)


def _shear(along: int) -> Operation:
    def shear(image: Image.Image, level: float) -> Image.Image:
        coefficients = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        coefficients[1 if along == 0 else 3] = 0.3 * level
        return _affine(image, tuple(coefficients))

    return shear


def _move(along: int) -> Operation:
    def move(image: Image.Image, level: float) -> Image.Image:
        coefficients = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        coefficients[2 if along == 0 else 5] = 0.45 * level * image.size[along]
        return _affine(image, tuple(coefficients))

    return move


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, level: kind(image).enhance(1 + 0.9 * level)


def _rotate(image: Image.Image, level: float) -> Image.Image:
    return image.rotate(30 * level, Image.Resampling.BILINEAR, fillcolor=GREY)


# The operations of the paper, and torchvision's ranges, but for moving farther, as timm does.
OPERATIONS: tuple[Operation, ...] = (
    lambda image, _: ImageOps.autocontrast(image),
    lambda image, _: ImageOps.equalize(image),
    lambda image, _: image,
    _rotate,
    lambda image, level: ImageOps.posterize(image, 8 - round(4 * abs(level))),
    lambda image, level: ImageOps.solarize(image, round(256 - 256 * abs(level))),
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
    _shear(0),
    _shear(1),
    _move(0),
    _move(1),
)


def rand_augment(photo: np.ndarray, magnitude: float, numbers: np.ndarray) -> np.ndarray:
    """Applies two operations, of magnitude and sign as drawn.

    Args:
      photo: uint8 RGB (height, width, 3).
      magnitude: 0 to 10, the strongest.
      numbers: (4,) in [0, 1): two operations, and for each of them which way.

    Returns:
      A photo of the same shape and type.
    """
    image = Image.fromarray(photo)
    for chosen, way in zip(numbers[:2], numbers[2:4], strict=True):
        level = magnitude / 10 * (1 if way < 0.5 else -1)
        image = OPERATIONS[int(chosen * len(OPERATIONS))](image, level)
    return np.asarray(image)
