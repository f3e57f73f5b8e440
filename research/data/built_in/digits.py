"""Built-in data set `digits`: the 1,797 handwritten digits of scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

SCALE = 8  # enlargement, so that a person can read the digits


class Digits(tfds.core.GeneratorBasedBuilder):
    """The digits as a TFDS data set with one split, `train`, and ten classes.

    Source: Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI (CC BY 4.0).
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "As in scikit-learn."}

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of 43 persons, 8 x 8 pixels in 17 shades.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing to download
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        for index, (shades, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            pixels = np.round(shades * (255 / 16)).astype(np.uint8)
            large = np.kron(pixels, np.ones((SCALE, SCALE), np.uint8))
            yield index, {"image": np.stack([large] * 3, axis=-1), "label": int(label)}
