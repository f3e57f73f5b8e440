"""A trained run's model, restored to say what is on photos."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import tensorflow as tf

from research.data.batches import Batch, make_batches, share_out
from research.data.split_arrays import SplitArrays
from research.runs.checkpoints import find_checkpoint, restore_model
from research.runs.run_directory import RunDirectory
from research.settings.train_config import TrainConfig
from research.system import devices
from research.system.errors import UserError
from research.system.python_file import digest_of_file, is_python_reference
from research.tasks.checks import find_task
from research.tasks.task import Task
from research.training.builder import build_network, follow_weights
from research.training.steps import predict_step


def task_of_run(directory: RunDirectory, trained: TrainConfig, asked: str | None) -> type[Task]:
    """Returns the class of a run's task.

    Code is never imported because a run's folder names it: only if it is asked for.

    Args:
      directory: of the run.
      trained: its settings.
      asked: the task as FILE.py:Class, or the name of a built-in one; None if not given.

    Raises:
      UserError: the run's task is in a file and not asked for, or cannot be imported.
    """
    if asked is None and is_python_reference(trained.task):
        raise UserError(
            f"the run in {str(directory.path)!r} has the task {trained.task}, whose code is not "
            f"imported unless you say so; give --task={trained.task}"
        )
    kind = find_task(asked or trained.task)
    trained_digest = directory.read_file_digests().get("task")
    if asked and trained_digest and digest_of_file(asked) != trained_digest:
        print(
            f"note: {asked} is not the file that the run was trained with: its content differs",
            file=sys.stderr,
            flush=True,
        )
    return kind


class Classifier:
    """The model of a run's config.json, with the weights of a checkpoint, on all devices.

    Args:
      ckpt_dir: the run's folder.
      checkpoint: `latest`, `best`, or a path.
      image_size: height and width in pixels of what it is shown; None for what the run says.
      mirror_averaging: show it mirror images too; None for what the run says.
      batch_size: photos a step; None for the run's.
      precision: number format to compute in; None for the run's.
      task: the run's task as FILE.py:Class, where it is not a built-in one.

    Raises:
      UserError: there is no such run or checkpoint, one does not fit the other, or the run has a
        task of its own and it is not given.
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
    ) -> None:
        self.directory = RunDirectory(ckpt_dir)
        trained = self.directory.read_config()
        self.task = task_of_run(self.directory, trained, task)()
        self.class_names = self.directory.read_class_names()
        self.checkpoint = ""
        path = find_checkpoint(self.directory.checkpoints, checkpoint)
        if mirror_averaging is None:
            mirror_averaging = trained.mirror_averaging
        # Of one machine, whatever the run was trained on.
        self.config = dataclasses.replace(
            trained,
            image_size=image_size or trained.evaluation_size,
            evaluation_scale=1.0,
            mirror_averaging=mirror_averaging,
            batch_size=batch_size or trained.batch_size,
            precision=precision or trained.precision,
            distribution="auto",
            virtual_devices=1,
        )
        self._strategy = devices.start(self.config).strategy
        with self._strategy.scope():
            self.built = build_network(self.config, self.class_names, self.task, with_weights=False)
            self._averages = follow_weights(self.config, self.built.network.model)
        self._compute = self._compile()
        self.restore(path)

    def restore(self, checkpoint: str) -> None:
        """Takes the weights, or their averages, of a checkpoint, unless it has them already."""
        path = find_checkpoint(self.directory.checkpoints, checkpoint)
        if path == self.checkpoint:
            return
        self.step = restore_model(self.built.network.model, path, self._averages)
        self.checkpoint = path
        if self._averages:
            self._averages.take_place()

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
        found = []
        for batch in batches:
            logits = self._on_host(self._compute(batch))
            found.append(logits[self._on_host(batch["weight"]) > 0])
        return np.concatenate(found)

    def _compile(self) -> tf.types.experimental.GenericFunction:
        strategy, network = self._strategy, self.built.network

        @tf.function(autograph=False)
        def compute(batch: Batch) -> tf.Tensor:
            return strategy.run(lambda part: predict_step(network, part), (batch,))

        return compute

    def _on_host(self, values: tf.Tensor) -> np.ndarray:
        """Returns what the devices hold, one after the other."""
        parts = self._strategy.experimental_local_results(values)
        return np.concatenate([part.numpy() for part in parts])
