"""The operations of RandAugment (Cubuk et al. 2019, arXiv 1909.13719), computed with Pillow.

Keras's layer applies the same operations to the whole batch and draws from its own state.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

GREY = (128, 128, 128)  # fills the area outside of the photo

Operation = Callable[[Image.Image, float], Image.Image]  # called with a level in [-1, 1]


def _affine(index: int) -> Operation:
    """Returns the operation that changes one coefficient of the affine transform (a, b, ..., f).

    Coefficients 1 and 3 shear along x and y, coefficients 2 and 5 translate along x and y.
    """

    def transform(image: Image.Image, level: float) -> Image.Image:
        coefficients = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        translates = index in (2, 5)
        coefficients[index] = 0.45 * level * image.size[index // 3] if translates else 0.3 * level
        method, resample = Image.Transform.AFFINE, Image.Resampling.BILINEAR
        return image.transform(image.size, method, coefficients, resample, fillcolor=GREY)

    return transform


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, level: kind(image).enhance(1 + 0.9 * level)


# The operations of the paper with torchvision's ranges. Translations are larger, as in timm.
OPERATIONS: tuple[Operation, ...] = (
    lambda image, _: ImageOps.autocontrast(image),
    lambda image, _: ImageOps.equalize(image),
    lambda image, _: image,
    lambda image, level: image.rotate(30 * level, Image.Resampling.BILINEAR, fillcolor=GREY),
    lambda image, level: ImageOps.posterize(image, 8 - round(4 * abs(level))),
    lambda image, level: ImageOps.solarize(image, round(256 - 256 * abs(level))),
    *map(_enhance, (ImageEnhance.Color, ImageEnhance.Contrast)),
    *map(_enhance, (ImageEnhance.Brightness, ImageEnhance.Sharpness)),
    *map(_affine, (1, 3, 2, 5)),
)


def rand_augment(photo: np.ndarray, magnitude: float, numbers: np.ndarray) -> np.ndarray:
    """Applies two randomly chosen operations.

    Args:
      photo: uint8 RGB (height, width, 3).
      magnitude: strength of the operations, in [0, 10].
      numbers: (4,) in [0, 1): two numbers that choose the operations, two that choose their signs.

    Returns:
      A photo of the same shape and type.
    """
    image = Image.fromarray(photo)
    for choice, sign in zip(numbers[:2], numbers[2:4], strict=True):
        level = magnitude / 10 * (1 if sign < 0.5 else -1)
        image = OPERATIONS[int(choice * len(OPERATIONS))](image, level)
    return np.asarray(image)
