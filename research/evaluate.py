"""Evaluates a run's checkpoint on photos, and writes the figures beside the checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

from research import runtime
from research.builder import build_network, follow_weights, make_loader
from research.checkpoint import find_checkpoint, restore_model
from research.commands import EvalConfig
from research.config import TrainConfig
from research.console import short_path
from research.errors import UserError
from research.learner import Learner
from research.run_directory import RunDirectory, write_atomically
from research.run_state import RunState
from research.sources import Source, open_source

RULE = "-" * 40


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The figures of one evaluation.

    Attributes:
      backbone: its name.
      checkpoint: the path of what was evaluated, without ending.
      step: updates that it had seen.
      data: the data set or folder.
      split: which part of it.
      image_size: height and width in pixels at which.
      mirror_averaging: whether the logits are means over each photo and its mirror image.
      photos: how many photos were evaluated, each once.
      damaged: how many could not be decoded and are in no figure.
      loss: mean cross-entropy in nats.
      accuracy: share of photos classified rightly.
      accuracy_interval: its 95 % Wilson interval.
    """

    backbone: str
    checkpoint: str
    step: int
    data: str
    split: str
    image_size: int
    mirror_averaging: bool
    photos: int
    damaged: int
    loss: float
    accuracy: float
    accuracy_interval: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.accuracy_interval
        lines = [
            self.backbone,
            RULE,
            f"Loss: {self.loss:.2f}",
            f"Accuracy: {self.accuracy:.2f}",
            RULE,
            f"{self.photos:,} photos of {self.data}, {self.split} split",
            f"seen at {self.image_size} x {self.image_size} pixels"
            f"{', also mirrored' if self.mirror_averaging else ''}",
            f"loss {self.loss:.4f}, accuracy {self.accuracy:.4f} (95 % interval {low:.4f} to "
            f"{high:.4f})",
            f"checkpoint after step {self.step:,}: {short_path(self.checkpoint)}",
        ]
        return "\n".join(lines)


def wilson_interval(successes: float, trials: float, z: float = 1.959964) -> tuple[float, float]:
    """Returns the Wilson score interval of a proportion (Wilson 1927); 95 % by default.

    Args:
      successes: 0 to `trials`.
      trials: greater than 0.
      z: standard normal quantile of the interval's upper end.
    """
    share = successes / trials
    centre = share + z * z / (2 * trials)
    margin = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)


def evaluate(config: EvalConfig, source: Source | None = None) -> Evaluation:
    """Rebuilds a run's model from its config.json, restores a checkpoint and evaluates it.

    Prints the figures, and writes them as JSON beside the checkpoint.

    Args:
      config: what to evaluate.
      source: photos to take instead of those that the config names.

    Raises:
      UserError: there is no such run, checkpoint or split, or the classes differ.
    """
    directory = RunDirectory(str(config.ckpt_dir))
    trained = directory.read_config()
    path = find_checkpoint(directory.checkpoints, config.checkpoint)
    # Of one machine, whatever the run was trained on.
    strategy = runtime.start(
        dataclasses.replace(trained, distribution="auto", virtual_devices=1)
    ).strategy
    size = config.image_size or trained.evaluation_size
    if config.mirror_averaging != "as_trained":
        trained = dataclasses.replace(trained, mirror_averaging=config.mirror_averaging == "on")
    trained = dataclasses.replace(trained, image_size=size, evaluation_scale=1.0)
    source = source or open_photos(config, trained)
    directory.check_class_names(source.class_names)
    with strategy.scope():
        built = build_network(trained, len(source.class_names), with_weights=False)
        state = RunState()
        averages = follow_weights(trained, built.network.model)
    step = restore_model(built.network.model, path, averages)
    loader = make_loader(trained, source, built)
    loader.batch_size = config.batch_size or loader.batch_size
    learner = Learner(strategy, built.network, (), state, averages=averages)
    examples = loader.examples(config.split)
    metrics = learner.evaluate(
        runtime.share_out(lambda share: loader.split_batches(config.split, share), strategy)
    )
    evaluation = Evaluation(
        backbone=trained.backbone,
        checkpoint=path,
        step=step,
        data=config.image_folder or config.dataset or trained.image_folder or trained.dataset,
        split=config.split,
        image_size=trained.image_size,
        mirror_averaging=trained.mirror_averaging,
        photos=round(metrics.photos),
        damaged=len(examples.damaged),
        loss=metrics.loss,
        accuracy=metrics.accuracy,
        accuracy_interval=wilson_interval(metrics.accuracy * metrics.photos, metrics.photos),
    )
    report = loader.damage_report()
    if report:
        print(report)
    print(evaluation)
    print(f"figures: {short_path(write_figures(evaluation, config))}", flush=True)
    return evaluation


def open_photos(config: EvalConfig, trained: TrainConfig) -> Source:
    """Opens the run's own photos, or the others that were asked for."""
    folder = config.image_folder or (None if config.dataset else trained.image_folder)
    return open_source(
        config.dataset or trained.dataset, folder, config.data_dir or trained.data_dir
    )


def write_figures(evaluation: Evaluation, config: EvalConfig) -> Path:
    """Writes the figures as JSON beside the checkpoint, and returns the file's path.

    Raises:
      UserError: the folder cannot be written.
    """
    other = os.path.basename(config.image_folder or config.dataset or "")
    name = ".".join(
        "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in part)
        for part in (other, config.split)
        if part
    )
    file = Path(f"{evaluation.checkpoint}.{name}.json")
    try:
        write_atomically(file, json.dumps(dataclasses.asdict(evaluation), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be written: {error.strerror}") from error
    return file
