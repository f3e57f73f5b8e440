"""Focal loss: well-classified photos have a lower weight (Lin et al. 2017, arXiv 1708.02002).

Flag: --task=examples/focal_loss.py:FocalLoss
"""

from __future__ import annotations

import tensorflow as tf

from research.tasks.losses import cross_entropy
from research.tasks.task import Task

FOCUS = 2.0  # the paper's gamma


class FocalLoss(Task):
    """Cross-entropy times (1 - p) ** FOCUS, where p is the probability of the true class."""

    def losses(self, logits: tf.Tensor, batch: dict[str, tf.Tensor]) -> tf.Tensor:
        losses = cross_entropy(logits, batch["label"])
        return (1.0 - tf.exp(-losses)) ** FOCUS * losses
