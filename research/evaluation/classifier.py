"""A trained model, restored for evaluation, prediction or export."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

from research.data.batches import Batch, make_batches
from research.data.order import share_out
from research.data.split_arrays import SplitArrays
from research.data.thread_pool import in_order
from research.loop.builder import build_network, make_averages
from research.loop.steps import predict_step
from research.runs.restore import find_checkpoint, restore_model
from research.runs.run_directory import RunDirectory
from research.runs.sealed_files import fingerprint_of
from research.settings.train_config import TrainConfig
from research.system import devices
from research.system.errors import UserError
from research.system.python_file import digest_of_file, is_python_reference
from research.tasks.checks import find_task

RESTORE_ATTEMPTS = 5  # a run in training replaces its latest checkpoint


def settings_of_run(directory: RunDirectory, task: str | None, backbone: str | None) -> TrainConfig:
    """Returns the settings of a run, with the user's files instead of those in its config.json.

    A run's folder alone never causes code to be imported: the user must name each file.

    Args:
      directory: the run.
      task: the task that the user named, as FILE.py:CLASS; None if not named.
      backbone: the backbone that the user named, as FILE.py:NAME; None if not named. It has no
        effect on a run with a backbone of the table.

    Raises:
      UserError: the run's task or backbone is in a file that the user did not name, or the backbone
        has another name than that of the run.
    """
    trained = directory.read_config()
    for setting, asked in (("task", task), ("backbone", backbone)):
        value = getattr(trained, setting)
        if asked is None and is_python_reference(value):
            raise UserError(
                f"the run in {str(directory.path)!r} has the {setting} {value}, whose code is only "
                f"imported if you name it; give --{setting}={value}"
            )
    if backbone and is_python_reference(trained.backbone):
        name = trained.backbone.rpartition(":")[2]
        if backbone.rpartition(":")[2] != name:
            raise UserError(
                f"backbone is {backbone!r}, but the run in {str(directory.path)!r} has the "
                f"backbone {name}; give --backbone={trained.backbone}"
            )
        trained = dataclasses.replace(trained, backbone=backbone)
    return dataclasses.replace(trained, task=task or trained.task)


def notes_on_files(directory: RunDirectory, task: str | None, backbone: str | None) -> list[str]:
    """Returns a note for each file that the user named and that is not as in the training.

    Args:
      directory, task, backbone: see `settings_of_run`.
    """
    digests = directory.read_file_digests()
    notes = [
        f"note: the content of {asked} differs from the file that the run was trained with"
        for setting, asked in (("task", task), ("backbone", backbone))
        if asked and setting in digests and digest_of_file(asked) != digests[setting]
    ]
    if backbone and "backbone" not in digests:
        notes.append(
            f"note: the run in {str(directory.path)!r} has no backbone in a file; {backbone} is "
            "not used"
        )
    return notes


class Classifier:
    """The model of a run with the weights of a checkpoint, on all devices of this machine.

    Args:
      ckpt_dir: the run's folder.
      checkpoint: `latest`, `best`, or a path.
      image_size: height and width of the input in pixels; None for the run's evaluation size.
      mirror_averaging: whether to average the logits of each photo and its mirror image; None for
        the run's own setting.
      batch_size: photos per batch; None for the run's own.
      precision: number format of the computation; None for the run's own.
      task: the run's task as FILE.py:CLASS, if it is not a built-in one.
      backbone: the run's backbone as FILE.py:NAME, if it is not in the table of backbones.

    Raises:
      UserError: the run or the checkpoint does not exist, they do not fit each other, or the run
        has a task or a backbone in a file that is not named.
    """

    def __init__(
        self,
        ckpt_dir: str,
        checkpoint: str = "latest",
        image_size: int | None = None,
        mirror_averaging: bool | None = None,
        batch_size: int | None = None,
        precision: str | None = None,
        task: str | None = None,
        backbone: str | None = None,
    ) -> None:
        self.directory = RunDirectory(ckpt_dir)
        trained = settings_of_run(self.directory, task, backbone)
        self.task = find_task(trained.task)()
        for note in notes_on_files(self.directory, task, backbone):
            print(note, file=sys.stderr, flush=True)
        self.class_names = self.directory.read_class_names()
        self.checkpoint = ""
        find_checkpoint(self.directory.checkpoints, checkpoint)  # before the slow set-up
        if mirror_averaging is None:
            mirror_averaging = trained.mirror_averaging
        # The run may have been trained on other devices, or on several machines. Augmentations are
        # not used, and their files are not imported.
        self.config = dataclasses.replace(
            trained,
            augmentation=(),
            image_size=image_size or trained.evaluation_size,
            evaluation_scale=1.0,
            mirror_averaging=mirror_averaging,
            batch_size=batch_size or trained.batch_size,
            precision=precision or trained.precision,
            distribution="auto",
            virtual_devices=1,
        )
        self._strategy = strategy = devices.start(self.config).strategy
        with strategy.scope():
            self.built = build_network(self.config, self.class_names, self.task, with_weights=False)
            self._averages = make_averages(self.config, self.built.network.model)
        step = functools.partial(predict_step, self.built.network)
        self._compute = tf.function(lambda batch: strategy.run(step, (batch,)), autograph=False)
        self.restore(checkpoint)

    def restore(self, checkpoint: str) -> None:
        """Loads the weights of a checkpoint, or their averages if the run has them."""
        for attempt in range(RESTORE_ATTEMPTS):
            path = find_checkpoint(self.directory.checkpoints, checkpoint)
            if path == self.checkpoint:
                return
            try:
                self.step = restore_model(self.built.network.model, path, self._averages)
                self.fingerprint = fingerprint_of(Path(path))
                break
            except (UserError, FileNotFoundError):
                is_replaced = not os.path.exists(f"{path}.index")
                by_name = checkpoint in ("latest", "best")
                if not (by_name and is_replaced) or attempt == RESTORE_ATTEMPTS - 1:
                    raise
        self.checkpoint = path
        if self._averages:
            self._averages.swap()

    def logits(self, examples: SplitArrays) -> np.ndarray:
        """Returns float32 (photos, 1 or classes), in the order of the examples."""
        order, size = np.arange(len(examples)), min(self.config.batch_size, len(examples))
        batches = share_out(
            lambda share: make_batches(
                examples,
                order,
                size,
                self.built.backbone.preprocessing,
                share=share,
                mirrored=self.config.mirror_averaging,
            ),
            self._strategy,
        )

        def logits_of(batch: Batch) -> np.ndarray:
            logits = self._on_host(self._compute(batch))
            return logits[self._on_host(batch["weight"]) > 0]

        concurrent = devices.concurrent_batches(self._strategy.num_replicas_in_sync)
        remaining = iter(batches)
        first = logits_of(next(remaining))  # traced in this thread, which has Keras' dtype policy
        with in_order(logits_of, remaining, concurrent) as computed:
            return np.concatenate([first, *(logits for _, logits in computed)])

    def _on_host(self, values: tf.Tensor) -> np.ndarray:
        """Concatenates the parts of a batch that the devices hold."""
        parts = self._strategy.experimental_local_results(values)
        return np.concatenate([part.numpy() for part in parts])
