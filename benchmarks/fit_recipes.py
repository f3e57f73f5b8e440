"""Recipes of public tutorials with `keras.Model.fit`, as peers in the ablation.

They are written from the tutorials, with any backbone of the table of backbones instead of the
tutorials' own, and with the size and the photos of the ablation. This module imports TensorFlow
and Keras only in the functions that train.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from research.data.source import Source

if TYPE_CHECKING:
    import keras

    from research.data.loader import DataLoader
    from research.data.split_arrays import SplitArrays
    from research.evaluation.scores import Predictions

IMAGE_SIZE = 160


@dataclasses.dataclass(frozen=True)
class FitPhase:
    """Epochs of `fit` with one optimizer.

    Attributes:
      optimizer: name of a class of `keras.optimizers`.
      learning_rate: constant.
      epochs: their number.
      unfreeze_from: index of the first trained layer of the backbone, from the end if it is
        negative; None trains only the head.
      trains_batch_norm: whether scales and offsets of BatchNorm are trained in unfrozen layers.
    """

    optimizer: str
    learning_rate: float
    epochs: int
    unfreeze_from: int | None = None
    trains_batch_norm: bool = True


@dataclasses.dataclass(frozen=True)
class FitRecipe:
    """A recipe of a tutorial.

    Attributes:
      phases: trained one after another.
      augmentation: names of classes of `keras.layers` with their arguments.
      flips: the argument of `RandomFlip`, before the augmentation; None for no flips.
      head_batch_norm: whether the head begins with BatchNorm.
      dropout: share of dropped features in the head.
      bn_mode: `frozen` calls the backbone in inference mode, `train` updates the moving statistics
        of BatchNorm in unfrozen layers.
      batch_size: photos per step.
    """

    phases: tuple[FitPhase, ...]
    augmentation: tuple[tuple[str, tuple[float, ...]], ...] = ()
    flips: str | None = None
    head_batch_norm: bool = False
    dropout: float = 0.0
    bn_mode: str = "frozen"
    batch_size: int = 32


# The article of this project, with its loss from logits.
ARTICLE = FitRecipe((FitPhase("RMSprop", 1e-4, 10, 100),), bn_mode="train")
# tensorflow.org, "Transfer learning and fine-tuning": MobileNetV2, from layer 100 on.
TENSORFLOW_ORG = FitRecipe(
    (FitPhase("Adam", 1e-4, 10), FitPhase("RMSprop", 1e-5, 10, 100)),
    augmentation=(("RandomRotation", (0.2,)),),
    flips="horizontal",
    dropout=0.2,
)
# keras.io, "Image classification via fine-tuning with EfficientNet". Its top 20 layers include the
# four of the head.
KERAS_IO = FitRecipe(
    (FitPhase("Adam", 1e-2, 25), FitPhase("Adam", 1e-5, 10, -16, trains_batch_norm=False)),
    augmentation=(
        ("RandomRotation", (0.15,)),
        ("RandomTranslation", (0.1, 0.1)),
        ("RandomContrast", (0.1,)),
    ),
    flips="horizontal_and_vertical",
    head_batch_norm=True,
    dropout=0.2,
    batch_size=64,
)


def build_model(
    recipe: FitRecipe, backbone: str, weights: str, classes: int, mirrored: bool, seed: int
) -> tuple[keras.Model, keras.Model]:
    """Builds the model of a recipe, with logits of shape (batch, classes).

    Args:
      recipe: what to build.
      backbone: name in the table of backbones.
      weights: a Keras weights file, or `none` for random weights.
      classes: the number of classes.
      mirrored: whether a mirror image has the same meaning. If not, no flips are used.
      seed: of the augmentation and of Dropout.

    Returns:
      The model, whose inputs are photos in [0, 255], and its backbone.
    """
    import keras

    from research.models.backbone_table import find_backbone

    entry = find_backbone(backbone)
    base = entry.build((IMAGE_SIZE, IMAGE_SIZE, 3), None)
    if weights != "none":
        base.load_weights(weights)
    photos = keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3))
    outputs = photos
    if recipe.flips and mirrored:
        outputs = keras.layers.RandomFlip(recipe.flips, seed=seed)(outputs)
    for name, values in recipe.augmentation:
        outputs = getattr(keras.layers, name)(*values, seed=seed)(outputs)
    outputs = keras.layers.Lambda(entry.preprocessing)(outputs)
    # In frozen mode, the tutorials call the backbone with training=False. In the other, frozen
    # layers run in inference mode by themselves.
    outputs = base(outputs, **({"training": False} if recipe.bn_mode == "frozen" else {}))
    outputs = keras.layers.GlobalAveragePooling2D()(outputs)
    if recipe.head_batch_norm:
        outputs = keras.layers.BatchNormalization()(outputs)
    if recipe.dropout:
        outputs = keras.layers.Dropout(recipe.dropout, seed=seed)(outputs)
    return keras.Model(photos, keras.layers.Dense(classes)(outputs)), base


def set_trainable(base: keras.Model, phase: FitPhase) -> None:
    """Freezes and unfreezes the layers of a backbone for a phase, before the model is compiled."""
    import keras

    base.trainable = phase.unfreeze_from is not None
    if phase.unfreeze_from is None:
        return
    for layer in base.layers[: phase.unfreeze_from]:
        layer.trainable = False
    if not phase.trains_batch_norm:
        for layer in base.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.trainable = False


def fit(
    recipe: FitRecipe,
    backbone: str,
    weights: str,
    source: Source,
    seed: int,
    mirrored: bool = True,
) -> Trained:
    """Trains a recipe on the training photos of a source; see `build_model` for the arguments."""
    import keras

    from research.data.loader import DataLoader

    keras.utils.set_random_seed(seed)
    loader = DataLoader(IMAGE_SIZE, recipe.batch_size, source=source, seed=seed)
    classes = len(source.class_names)
    model, base = build_model(recipe, backbone, weights, classes, mirrored, seed)
    train, validation = (loader.examples(split) for split in ("train", "validation"))
    for phase in recipe.phases:
        set_trainable(base, phase)
        model.compile(
            getattr(keras.optimizers, phase.optimizer)(phase.learning_rate),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        model.fit(
            train.inputs[0],
            train.labels,
            batch_size=recipe.batch_size,
            epochs=phase.epochs,
            validation_data=(validation.inputs[0], validation.labels) if len(validation) else None,
            verbose=0,
        )
    return Trained(model, loader)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model that `fit` trained, and its photos."""

    model: keras.Model
    loader: DataLoader

    def predictions(self, split: str) -> Predictions:
        """Returns the predictions for the photos of a split."""
        from research.evaluation.scores import Predictions

        examples: SplitArrays = self.loader.examples(split)
        logits = self.model.predict(examples.inputs[0], batch_size=32, verbose=0)
        return Predictions(examples.names, examples.labels, logits)
