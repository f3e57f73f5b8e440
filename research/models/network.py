"""`Network`: the model and its split backbone, as a step computes with them."""

from __future__ import annotations

import dataclasses
from typing import Literal

import tensorflow as tf

from research.data.batches import Batch
from research.models.split import SplitBackbone
from research.models.wrapper import Wrapper

Given = Literal["photos", "activations", "features"]


@dataclasses.dataclass(frozen=True)
class Network:
    """What a step computes with.

    Attributes:
      model: the whole model.
      parts: its backbone, cut below the first trainable layer.
      given: what `batch["image"]` holds: `photos`; the `activations` that the frozen trunk computes
        from them; or the `features` that go into the head, where the head alone is trained.
      trains_backbone: False while the head alone is trained. The backbone then runs in inference
        mode also in training steps.
    """

    model: Wrapper
    parts: SplitBackbone
    given: Given = "photos"
    trains_backbone: bool = True

    def logits(self, batch: Batch, training: bool) -> tf.Tensor:
        """Maps a batch to float32 logits (batch, 1 or classes).

        Args:
          batch: photos, activations or features, as `given` says.
          training: the mode of the head, and of the backbone if it is trained.
        """
        return self.model.head(self.features(batch, training), training=training)

    def features(self, batch: Batch, training: bool) -> tf.Tensor:
        """Maps a batch to what the head takes: float32 (batch, channels) for the built-in head."""
        if self.given == "features":
            return batch["image"]
        mode = training and self.trains_backbone
        activations = self.activations(batch)
        return self.model.pooling(self.parts.features(activations, batch["weight"], mode))

    def activations(self, batch: Batch) -> tuple[tf.Tensor, ...]:
        """Returns what crosses the cut: read from the batch, or computed from its photos."""
        image = batch["image"]
        if self.given == "activations":
            return image if isinstance(image, tuple) else (image,)
        return self.parts.activations(image)
