"""The labels of photos: one class index, or one 0 or 1 per class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from research.data.source import SEPARATOR
from research.system.errors import UserError


def check_class_indices(labels: np.ndarray, classes: int) -> None:
    """Raises `UserError` unless the labels are one class index per photo: int (photos,)."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        is_vector = labels.ndim == 2 and labels.dtype.kind in "iu" and labels.shape[1] == classes
        way_out = "for several labels per photo, give one 0 or 1 per class, and --task=multi_label"
        if is_vector:
            way_out = "give --task=multi_label to learn several labels per photo"
        elif labels.ndim == 1:
            way_out = (
                "other numbers can be learned by a task with its own losses and metrics, but "
                "run_eval.py evaluates classes only"
            )
        raise UserError(
            f"labels are {labels.dtype} of shape {labels.shape[1:]} per photo; expected one class "
            f"index per photo; {way_out}"
        )
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise UserError(
            f"a label is {wrong[0]}; expected a class index from 0 to {classes - 1}, because the "
            f"source has {classes} class names; correct the source"
        )


def check_label_vectors(labels: np.ndarray, class_names: Sequence[str]) -> None:
    """Raises `UserError` unless labels are class indices, or one 0 or 1 per class and photo.

    Args:
      labels: int (photos,), or int (photos, classes).
      class_names: by label. None may contain the separator of labels.
    """
    odd = [name for name in class_names if SEPARATOR in name]
    if odd:
        raise UserError(
            f"a class is named {odd[0]!r}; expected class names without {SEPARATOR!r}, which "
            "separates the labels of a photo; rename the class"
        )
    classes = len(class_names)
    if labels.ndim == 1 and labels.dtype.kind in "iu":
        check_class_indices(labels, classes)
        return
    if labels.shape[1:] != (classes,) or labels.dtype.kind not in "iu":
        raise UserError(
            f"labels are {labels.dtype} of shape {labels.shape[1:]} per photo; the task "
            f"multi_label expects integers 0 and 1 of shape ({classes},), one for each class name, "
            "or one class index; correct the source"
        )
    wrong = labels[(labels != 0) & (labels != 1)]
    if len(wrong):
        raise UserError(
            f"a label vector contains {wrong[0]}; expected only 0 (the photo does not have the "
            "label) and 1 (it has); correct the source"
        )


def label_vectors(labels: np.ndarray, classes: int) -> np.ndarray:
    """Returns bool (photos, classes), from such vectors of 0 and 1, or from class indices."""
    if labels.ndim == 1:
        return labels[:, np.newaxis] == np.arange(classes)
    return labels.astype(bool)


def joined(labels: Iterable[str]) -> str:
    """Returns the labels of a photo as one text; an empty text without labels."""
    return SEPARATOR.join(labels)
