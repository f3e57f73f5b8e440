"""Chooses the image size for evaluation at the end of a run: the training size, or a larger one."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import tensorflow as tf

from research.loop.builder import build_model, make_loader
from research.loop.preparation import Run
from research.models.backbone_table import find_backbone
from research.models.wrapper import Wrapper
from research.runs import console
from research.runs.run_directory import RunDirectory
from research.settings.automatic import Choice
from research.settings.fields import AUTO
from research.settings.train_config import LARGEST_SIZE, TrainConfig
from research.system.errors import UserError, first_line

LARGER = 1.2  # FixRes (Touvron et al. 2019, arXiv 1906.06423)


def settle_evaluation_size(run: Run, directory: RunDirectory | None) -> None:
    """Chooses the setting `evaluation_scale` of a run, and records it, if it is `auto`.

    Args:
      run: after its last epoch.
      directory: the run's folder; None in a worker that is not the chief.
    """
    if run.settled.evaluation_scale != AUTO:
        return
    if directory:
        choice = choose_evaluation_scale(run)
        directory.settle("evaluation_scale", choice)
        lines = console.choices_lines({"evaluation_scale": choice})
        print("", *lines, sep="\n", flush=True)
    run.team.from_chief(None)  # the other workers wait, because the chief would miss them


def choose_evaluation_scale(run: Run) -> Choice:
    """Compares the validation losses at the training size and at a larger size.

    The larger size is chosen unless its loss is higher by more than one standard error of the
    difference.

    Args:
      run: after its last epoch, in the process of the chief.

    Returns:
      The value of the setting `evaluation_scale`.
    """
    config, backbone = run.config, find_backbone(run.config.backbone)
    size, larger = config.image_size, backbone.nearest_size(LARGER * config.image_size)
    if not run.plan.validates:
        return Choice(1.0, "there are no validation photos to try a larger size on")
    if not size < larger <= LARGEST_SIZE:
        return Choice(1.0, f"{larger} pixels, about {LARGER} times {size}, is not tried")
    model = run.built.network.model
    with run.averages.swapped() if run.averages else contextlib.nullcontext():
        enlarged = dataclasses.replace(config, image_size=larger, augmentation=())
        try:
            other, _ = build_model(enlarged, run.loader.class_names, run.task, with_weights=False)
            other.set_weights(model.get_weights())
        except (UserError, ValueError) as error:
            return Choice(1.0, f"the network does not take {larger} pixels: {first_line(error)}")
        before = validation_losses(run, config, model)
        after = validation_losses(run, enlarged, other)
    worse = after - before
    deviation = worse.std(ddof=1) / np.sqrt(len(worse)) if len(worse) > 1 else 0.0
    return Choice(
        1.0 if worse.mean() > deviation else LARGER,
        f"the validation loss is {after.mean():.4f} at {larger} pixels, and {before.mean():.4f} at "
        f"{size} pixels",
    )


def validation_losses(run: Run, config: TrainConfig, model: Wrapper) -> np.ndarray:
    """Returns the loss of each validation photo, float64 (photos,), in inference mode.

    Args:
      run: whose task defines the losses.
      config: with the image size.
      model: for this image size.
    """
    loader = make_loader(config, run.loader.source)
    if config.image_size == run.config.image_size:
        loader.loaded.update(run.loader.loaded)
    task = run.task.for_validation()

    @tf.function(autograph=False)
    def losses(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        logits = model(batch["image"], training=False)
        if "mirrored" in batch:
            logits = (logits + model(batch["mirrored"], training=False)) / 2
        return task.losses(logits, batch)

    return np.concatenate([losses(batch) for batch in loader.split_batches("validation")])
