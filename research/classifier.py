"""A trained run's model, restored to say what is on photos."""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow as tf

from research import runtime
from research.batches import Batch, make_batches
from research.builder import build_network, follow_weights
from research.checkpoint import find_checkpoint, restore_model
from research.photos.examples import Examples
from research.steps import predict_step
from research.storage.run_directory import RunDirectory


class Classifier:
    """The model of a run's config.json, with the weights of a checkpoint, on all devices.

    Args:
      ckpt_dir: the run's folder.
      checkpoint: `latest`, `best`, or a path.
      image_size: height and width in pixels of what it is shown; None for what the run says.
      mirror_averaging: show it mirror images too; None for what the run says.
      batch_size: photos a step; None for the run's.
      precision: number format to compute in; None for the run's.

    Raises:
      UserError: there is no such run or checkpoint, or one does not fit the other.
    """

    def __init__(
        self,
        ckpt_dir: str,
        checkpoint: str = "latest",
        image_size: int | None = None,
        mirror_averaging: bool | None = None,
        batch_size: int | None = None,
        precision: str | None = None,
    ) -> None:
        self.directory = RunDirectory(ckpt_dir)
        trained = self.directory.read_config()
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
        self._strategy = runtime.start(self.config).strategy
        with self._strategy.scope():
            self.built = build_network(self.config, len(self.class_names), with_weights=False)
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

    def logits(self, examples: Examples) -> np.ndarray:
        """Returns float32 (photos, 1 or classes), in the order of the examples."""
        order, size = np.arange(len(examples)), min(self.config.batch_size, len(examples))
        batches = runtime.share_out(
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
