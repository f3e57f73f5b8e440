"""Chooses the image size for evaluation at the end of a run: the training size, or a larger one."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import tensorflow as tf

from research.data.batches import Batch
from research.data.loader import DataLoader
from research.loop.builder import build_network, make_loader
from research.loop.preparation import Run
from research.loop.steps import Network, predict_step
from research.loop.trunk.frozen_layers import EpochInput
from research.models.backbone_table import find_backbone
from research.runs import console
from research.runs.run_directory import RunDirectory
from research.settings.automatic import Choice
from research.settings.fields import AUTO
from research.settings.train_config import LARGEST_SIZE, TrainConfig
from research.system.errors import UserError, first_line
from research.system.python_file import is_python_reference
from research.tasks.checks import TASKS
from research.tasks.task import Task

LARGER = 1.2  # FixRes (Touvron et al. 2019, arXiv 1906.06423)


def settle_evaluation_size(
    run: Run, last_epoch: EpochInput, directory: RunDirectory | None
) -> None:
    """Chooses the setting `evaluation_scale` of a run, and records it, if it is `auto`.

    Args:
      run: after its last epoch.
      last_epoch: the network and the photos, or their cached activations, of the last epoch.
      directory: the run's folder; None in a worker that is not the chief.
    """
    if directory and run.settled.evaluation_scale == AUTO:
        choice = choose_evaluation_scale(run, last_epoch)
        directory.settle("evaluation_scale", choice)
        lines = console.choices_lines({"evaluation_scale": choice})
        print("", *lines, sep="\n", flush=True)


def choose_evaluation_scale(run: Run, last_epoch: EpochInput) -> Choice:
    """Compares the validation losses at the training size and at a larger size.

    The larger size is chosen unless its loss is higher by more than one standard error of the
    difference.

    Args:
      run: after its last epoch, in the process of the chief.
      last_epoch: see `settle_evaluation_size`.

    Returns:
      The value of the setting `evaluation_scale`.
    """
    config, backbone = run.config, find_backbone(run.config.backbone)
    size, larger = config.image_size, backbone.nearest_size(LARGER * config.image_size)
    if not run.plan.validates:
        return Choice(1.0, "there are no validation photos to try a larger size on")
    if not size < larger <= LARGEST_SIZE:
        return Choice(1.0, f"{larger} pixels, about {LARGER} times {size}, is not tried")
    with run.averages.swapped() if run.averages else contextlib.nullcontext():
        enlarged = dataclasses.replace(config, image_size=larger, augmentation=())
        try:
            other = enlarged_network(run, enlarged)
        except (UserError, ValueError) as error:
            return Choice(1.0, f"the network does not take {larger} pixels: {first_line(error)}")
        losses = [
            validation_losses(run.task, last_epoch.network, last_epoch.loader),
            validation_losses(run.task, other, make_loader(enlarged, run.loader.source)),
        ]
    usable = ~np.isnan(losses).any(axis=0)
    if not usable.any():
        return Choice(1.0, "there is no usable validation photo to try a larger size on")
    before, after = (one[usable] for one in losses)
    worse = after - before
    deviation = worse.std(ddof=1) / np.sqrt(len(worse)) if len(worse) > 1 else 0.0
    return Choice(
        1.0 if worse.mean() > deviation else LARGER,
        f"the validation loss is {after.mean():.4f} at {larger} pixels, and {before.mean():.4f} at "
        f"{size} pixels",
    )


def enlarged_network(run: Run, enlarged: TrainConfig) -> Network:
    """Returns the network of a run for another image size.

    It shares the layers of the run. If they may depend on the size, a new network is built.

    Args:
      run: the run.
      enlarged: the settings of the run with the other size, a multiple of 32.

    Raises:
      UserError, ValueError: the network does not take the size.
    """
    network = run.built.network
    is_own = is_python_reference(enlarged.backbone) or enlarged.task not in TASKS
    if run.config.image_size % 32 == 0 and not is_own:
        with contextlib.suppress(ValueError):  # of a model with an inner model
            return dataclasses.replace(network, parts=network.parts.resized(enlarged.image_size))
    names = run.loader.class_names
    other = build_network(enlarged, names, run.task, with_weights=False).network
    other.model.set_weights(network.model.get_weights())
    return other


def validation_losses(task: Task, network: Network, loader: DataLoader) -> np.ndarray:
    """Returns the loss of each validation photo, float32 (photos,), in inference mode.

    It is NaN for a photo without weight, which was found to be damaged.

    Args:
      task: defines the losses.
      network: for the image size of the loader.
      loader: the photos.
    """
    task = task.for_validation()

    @tf.function(autograph=False)
    def losses(batch: Batch) -> tf.Tensor:
        batch = loader.finish(batch)
        found = task.losses(predict_step(network, batch), batch)
        return tf.where(batch["weight"] > 0, found, np.nan)

    return np.concatenate([losses(batch) for batch in loader.split_batches("validation")])
