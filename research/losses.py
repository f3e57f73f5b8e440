"""The loss that training minimises; evaluation reports the plain cross-entropy of `metrics.py`."""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from research.batches import Batch
from research.metrics import example_losses, mean_class_losses


@dataclasses.dataclass(frozen=True)
class Loss:
    """Cross-entropy from logits, in nats.

    Attributes:
      label_smoothing: the share of each label that is given to all classes alike, in [0, 1)
        (Szegedy et al. 2015, arXiv 1512.00567).
      class_weights: a factor for the photos of each class, by label; None for none.
    """

    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None

    def __call__(self, logits: tf.Tensor, batch: Batch) -> tf.Tensor:
        """Returns the loss of each example, float32 (batch,).

        Args:
          logits: float32 (batch, 1), the second class's logit, or (batch, classes).
          batch: its labels; and where photos are mixed, int `partner_label` and float32
            `partner_share`, both (batch,).
        """
        losses = self._of_labels(logits, batch["label"])
        if "partner_label" in batch:
            share = batch["partner_share"]
            partners = self._of_labels(logits, batch["partner_label"])
            losses = (1 - share) * losses + share * partners
        return losses

    def _of_labels(self, logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        losses = example_losses(logits, labels)
        if self.label_smoothing:
            share = self.label_smoothing
            losses = (1 - share) * losses + share * mean_class_losses(logits)
        if self.class_weights is not None:
            losses *= tf.gather(tf.constant(self.class_weights, tf.float32), labels)
        return losses


CROSS_ENTROPY = Loss()


def balanced_weights(labels_a_class: tuple[int, ...]) -> tuple[float, ...]:
    """Returns weights by which all classes count the same, and a photo 1 on average.

    As scikit-learn's `class_weight="balanced"`: photos / (classes * photos of the class).

    Args:
      labels_a_class: the number of photos of each class; classes without any get weight 0.
    """
    present = [count for count in labels_a_class if count]
    each = sum(present) / len(present)
    return tuple(each / count if count else 0.0 for count in labels_a_class)
