"""Evaluates the checkpoints of one run: predictions, figures and pictures, and writes them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import tensorflow as tf

from research.data.open_source import open_source
from research.data.source import Source
from research.data.split_arrays import SplitArrays
from research.evaluation import figures as drawn
from research.evaluation.calibration import decide
from research.evaluation.classifier import Classifier
from research.evaluation.grad_cam import grad_cam
from research.evaluation.results import Evaluation, predictions_csv
from research.evaluation.scores import (
    Decisions,
    Figure,
    Predictions,
    confusion,
    of_classes,
    overall,
)
from research.runs import pictures
from research.runs.console import short_path
from research.runs.durable_files import write_file
from research.runs.run_directory import RunDirectory
from research.runs.summaries import EvaluationSummaries
from research.settings.program_configs import MIRROR_AVERAGING, PHOTOS, EvalConfig
from research.system.errors import UserError
from research.tasks.metrics import mean_metrics
from research.tasks.task import Task
from research.training.builder import make_loader


class Evaluator:
    """Evaluates the checkpoints of one run on its photos, or on others.

    Args:
      config: what to evaluate, and how.
      ckpt_dir: the run's folder.
      checkpoint: the first one to restore.
      source: the photos, see `open_photos`.

    Raises:
      UserError: the run or the checkpoint cannot be had.
    """

    def __init__(self, config: EvalConfig, ckpt_dir: str, checkpoint: str, source: Source) -> None:
        self._config = config
        trained = RunDirectory(ckpt_dir).read_config()
        self._trained_size = trained.image_size
        self._is_own = not any(getattr(config, name) for name in PHOTOS)
        self._is_own |= config.source is not None and config.source == trained.source
        self.classifier = Classifier(
            ckpt_dir,
            checkpoint,
            config.image_size,
            MIRROR_AVERAGING[config.mirror_averaging],
            config.batch_size,
            task=config.task,
        )
        asked = config.source or config.image_folder or config.dataset
        self._data = asked or trained.source or trained.image_folder or trained.dataset
        self._loader = make_loader(self.classifier.config, source)

    def evaluate_splits(self) -> list[Evaluation]:
        """Evaluates the restored checkpoint; prints and writes the figures of each split."""
        decisions: Decisions | None = None
        if any(map(self._is_decided, self._config.split)):
            validation = self._predict("validation")
            decisions = decide(validation)
            note = self._note_on_size(float(validation.losses().mean()))
            if note:
                print(f"{note}\n")
        evaluations: list[Evaluation] = []
        for split in self._config.split:
            evaluation = self._evaluate(split, decisions if self._is_decided(split) else None)
            print(f"\n{evaluation}" if evaluations else evaluation)
            self._write(evaluation)
            evaluations.append(evaluation)
        report = self._loader.damage_report()
        if report:
            print(report, flush=True)
        return evaluations

    def _note_on_size(self, loss: float) -> str | None:
        """Compares the validation loss with that of the same step of the training."""
        classifier = self.classifier
        rows = classifier.directory.read_metrics()
        losses = [row["validation_loss"] for row in rows if row["step"] == classifier.step]
        if not losses:
            return None
        return size_note(loss, classifier.config.image_size, losses[-1], self._trained_size)

    def _is_decided(self, split: str) -> bool:
        """Tells whether temperature and threshold mean something: chosen on other photos."""
        return self._is_own and split in ("train", "test")

    def _predict(self, split: str) -> Predictions:
        examples = self._loader.examples(split)
        if examples.labels.ndim != 1 or examples.labels.dtype != np.int32:
            raise UserError(
                f"the labels of the {split} split are {examples.labels.dtype} of shape "
                f"{examples.labels.shape[1:]}; expected the index of a class for each photo"
            )
        return Predictions(examples.names, examples.labels, self.classifier.logits(examples))

    def _evaluate(self, split: str, decisions: Decisions | None) -> Evaluation:
        classifier, config = self.classifier, self._config
        predictions = self._predict(split)
        names = classifier.class_names
        counts = confusion(predictions, len(names)).tolist()
        return Evaluation(
            ckpt_dir=str(classifier.directory.path),
            backbone=classifier.config.backbone,
            checkpoint=classifier.checkpoint,
            step=classifier.step,
            data=self._data,
            split=split,
            image_size=classifier.config.image_size,
            mirror_averaging=classifier.config.mirror_averaging,
            photos=len(predictions),
            damaged=len(self._loader.examples(split).damaged),
            figures={
                **overall(predictions, decisions, config.resamples),
                **self._figures_of_task(split, predictions),
            },
            classes=of_classes(predictions, names, config.resamples),
            confusion=tuple(map(tuple, counts)),
            decisions=decisions,
            predictions=predictions,
        )

    def _figures_of_task(self, split: str, predictions: Predictions) -> dict[str, Figure]:
        """Returns the loss and the figures of a task of the user's own, by name."""
        task = self.classifier.task
        if type(task) is Task:
            return {}
        examples = self._loader.examples(split)
        batch = {"label": examples.labels, **examples.arrays}
        batch["weight"] = np.ones(len(examples), np.float32)
        tensors = {name: tf.constant(values) for name, values in batch.items()}
        sums = task.for_validation().sums(tf.constant(predictions.logits), tensors)
        found = mean_metrics({name: sum.numpy() for name, sum in sums.items()}, task.figures)
        return {
            "task_loss" if name == "loss" else name: Figure(value, None)
            for name, value in found.values.items()
            if name not in ("accuracy", "cross_entropy")
        }

    def _write(self, evaluation: Evaluation) -> None:
        """Writes the figures beside the checkpoint, and what else is asked for."""
        config, directory = self._config, self.classifier.directory
        if config.predictions:
            lines = predictions_csv(evaluation.predictions, self.classifier.class_names)
            write_file(Path(config.predictions), lines)
        file = Path(f"{evaluation.checkpoint}.{name_of(config, evaluation.split)}.json")
        write_file(file, evaluation.to_json())
        print(f"\nfigures: {short_path(file)}", flush=True)
        if config.predictions:
            print(f"predictions: {short_path(config.predictions)}", flush=True)
        is_best = Path(evaluation.checkpoint).parent.name == "best"
        name = name_of(config, evaluation.split, "best" if is_best else "")
        summaries = EvaluationSummaries(directory.events / f"evaluation_{name}", evaluation.step)
        summaries.figures({key: one.value for key, one in evaluation.figures.items()})
        if config.pictures:
            self._draw(evaluation, directory.pictures / name, summaries)
            print(f"pictures: {short_path(directory.pictures / name)}", flush=True)
        summaries.close()

    def _draw(self, evaluation: Evaluation, folder: Path, summaries: EvaluationSummaries) -> None:
        """Writes an evaluation's pictures, and removes those of an earlier one."""
        predictions, names = evaluation.predictions, self.classifier.class_names
        examples = self._loader.examples(evaluation.split)
        found = draw(predictions, evaluation.decisions, examples, self.classifier)
        for title, png in found.items():
            write_file(folder / f"{title}.png", png)
            summaries.picture(title, png)
        for file in folder.glob("*.png"):
            if file.stem not in found:  # of a checkpoint that made mistakes
                file.unlink()
        curves = drawn.one_against_rest(predictions, names)
        for curve in curves:
            tag = "precision_recall" if len(names) == 2 else f"precision_recall/{curve.name}"
            summaries.curve(tag, curve.of_class, curve.probabilities)


def size_note(loss: float, size: int, loss_before: float, size_before: int) -> str | None:
    """Says that another size than that of the training is worse; None if it is not, or is the same.

    Args:
      loss: of validation, in nats, now.
      size: height and width in pixels, now.
      loss_before: in training.
      size_before: in training.
    """
    if size == size_before or loss <= max(1.25 * loss_before, loss_before + 0.02):
        return None
    return (
        f"note: the validation loss is {loss:.4f} at {size} pixels, and was {loss_before:.4f} at "
        f"{size_before} in\ntraining: evaluate with --image_size={size_before}, and train with "
        "--evaluation_scale=1.\nA larger size is for photos, not for what always fills the picture "
        "alike."
    )


def draw(
    predictions: Predictions,
    decisions: Decisions | None,
    examples: SplitArrays,
    classifier: Classifier,
) -> dict[str, bytes]:
    """Returns the pictures of an evaluation by title, as PNG."""
    names = classifier.class_names
    tempered = None
    if decisions:
        logits = predictions.logits / decisions.temperature
        tempered = Predictions(predictions.names, predictions.labels, logits)
    figures = {
        "confusion_matrix": drawn.confusion_matrix(predictions, names),
        "reliability": drawn.reliability(predictions, tempered),
    }
    if drawn.one_against_rest(predictions, names):
        figures["roc_curve"] = drawn.roc_curves(predictions, names)
        figures["precision_recall_curve"] = drawn.precision_recall_curves(predictions, names)
    rows = drawn.most_confident_mistakes(predictions)
    if len(rows):
        photos = examples.inputs[0][rows]
        maps = where_it_looked(classifier, photos, predictions.predicted[rows])
        figures["mistakes"] = drawn.mistakes(photos, rows, predictions, names)
        figures["mistakes_grad_cam"] = drawn.mistakes(
            drawn.overlaid(photos, maps), rows, predictions, names
        )
    return {title: pictures.png(figure) for title, figure in figures.items()}


def where_it_looked(classifier: Classifier, photos: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Returns Grad-CAM of photos, uint8 (photos, height, width, 3), for classes; see `grad_cam`."""
    images = classifier.built.backbone.preprocessing(tf.cast(photos, tf.float32))
    return grad_cam(classifier.built.network, images, tf.constant(classes)).numpy()


def open_photos(config: EvalConfig, directory: RunDirectory, source: Source | None) -> Source:
    """Opens a run's own photos, or the others that were asked for.

    Args:
      config: what to evaluate.
      directory: of the run.
      source: photos to take instead of those that the config names.

    Raises:
      UserError: there is no such run; the photos cannot be had, have no such split, or are of other
        classes.
    """
    trained = directory.read_config()
    if trained.source and not source and not any(getattr(config, name) for name in PHOTOS):
        raise UserError(
            f"the run in {str(directory.path)!r} was trained on the photos of {trained.source}, "
            "whose code is not imported unless you say so; give "
            f"--source={trained.source}, or other photos by --dataset or --image_folder"
        )
    folder = config.image_folder or (None if config.dataset else trained.image_folder)
    source = source or open_source(
        config.dataset or trained.dataset,
        folder,
        config.data_dir or trained.data_dir,
        config.source,
    )
    directory.check_class_names(source.class_names)
    for split in config.split:
        source.count(split)
    return source


def name_of(config: EvalConfig, split: str, checkpoint: str = "") -> str:
    """Returns a name for what is evaluated, fit for a file.

    Of other data, the checkpoint, the split, and what photos are shown otherwise than the run says.
    """
    other = os.path.basename(config.source or config.image_folder or config.dataset or "")
    size = f"{config.image_size}px" if config.image_size else ""
    mirror = {"on": "mirrored", "off": "unmirrored"}.get(config.mirror_averaging, "")
    return ".".join(
        "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in part)
        for part in (other, checkpoint, split, size, mirror)
        if part
    )
