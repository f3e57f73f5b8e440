"""Evaluates the checkpoints of one run: predictions, metrics, pictures and TensorBoard events."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import sys
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from research.data.photo_cache import without_damaged
from research.data.relabelled_source import RelabelledSource
from research.data.source import SPLITS, Source
from research.data.split_arrays import SplitArrays
from research.evaluation.classifier import Classifier
from research.evaluation.figures import overlaid
from research.evaluation.find_variant import variant_of
from research.evaluation.grad_cam import grad_cam
from research.evaluation.results import Evaluation
from research.evaluation.scores import Figure
from research.loop.builder import make_loader
from research.loop.open_photos import open_photos
from research.runs import pictures
from research.runs.console import damage_report, short_path, splits_lines
from research.runs.durable_files import write_file
from research.runs.photo_grid import photo_grid
from research.runs.run_directory import PhotoEntry, RunDirectory
from research.runs.summaries import EvaluationSummaries
from research.settings.program_configs import MIRROR_AVERAGING, PHOTO_SETTINGS, EvalConfig
from research.system.errors import UserError
from research.tasks.checks import TASKS
from research.tasks.metrics import mean_metrics
from research.tasks.multi_label import has_several_labels
from research.tasks.task import Task


class Evaluator:
    """Evaluates the checkpoints of one run, on its own photos or on others.

    Args:
      config: what to evaluate.
      directory: the run.
      checkpoint: the first checkpoint to restore.
      source: the photos, see `open_evaluated`.

    Raises:
      UserError: the run or the checkpoint cannot be read.
    """

    def __init__(
        self, config: EvalConfig, directory: RunDirectory, checkpoint: str, source: Source
    ) -> None:
        self._config = config
        trained = directory.read_config()
        self._trained_size = trained.image_size
        self._is_own = not config.names_photos
        self._is_own |= config.source is not None and config.source == trained.source
        self.classifier = Classifier(
            str(directory.path),
            checkpoint,
            config.image_size,
            MIRROR_AVERAGING[config.mirror_averaging],
            config.batch_size,
            task=config.task,
            backbone=config.backbone,
        )
        self.variant = variant_of(type(self.classifier.task))(self.classifier.class_names)
        self._data = config.data_name or trained.data_name
        self._loader = make_loader(self.classifier.config, source)

    def evaluate_splits(self) -> list[Evaluation]:
        """Evaluates the restored checkpoint. Prints and writes the metrics of each split."""
        decisions: Any = None
        needed = any(map(self._needs_decisions, self._config.split))
        if needed and not len(self._loader.examples("validation")):
            print("note: there are no validation photos to choose a temperature or thresholds on\n")
        elif needed:
            validation = self._predict("validation")
            decisions = self.variant.decide(validation)
            self.variant.keep(decisions, self.classifier)
            self._note_on_size(float(validation.losses().mean()))
        evaluations: list[Evaluation] = []
        for split in self._config.split:
            evaluation = self._evaluate(split, decisions if self._needs_decisions(split) else None)
            print(f"\n{evaluation}" if evaluations else evaluation)
            self._write(evaluation)
            evaluations.append(evaluation)
        report = damage_report(self._loader)
        if report:
            print(report, flush=True)
        return evaluations

    def _note_on_size(self, loss: float) -> None:
        """Prints a note if the validation loss is worse than at the same step of the training."""
        classifier = self.classifier
        rows = classifier.directory.read_metrics()
        losses = [row.get("validation_loss") for row in rows if row["step"] == classifier.step]
        size = classifier.config.image_size
        before = losses[-1] if losses else None
        note = size_note(loss, size, before, self._trained_size) if before is not None else None
        if note:
            print(f"{note}\n")

    def _needs_decisions(self, split: str) -> bool:
        """Whether what is fitted on the validation split applies to a split."""
        return self._is_own and split in ("train", "test")

    def _predict(self, split: str) -> Any:
        examples = self._loader.examples(split)
        if self._is_own:
            self._check_split(split, examples)
        try:
            self.variant.check_labels(examples.labels)
        except UserError as error:
            raise UserError(f"in the {split} split, {error}") from error
        logits = self.classifier.logits(examples)
        # Photos that are read on demand are only now known to be damaged; they have no logits.
        examples = self._loader.loaded[split] = without_damaged(examples)
        if not len(examples):
            raise UserError(f"no photo of the {split} split can be decoded; give other photos")
        return self.variant.predictions(examples.names, examples.labels, logits)

    @functools.cached_property
    def _photos_of_run(self) -> list[PhotoEntry]:
        return self.classifier.directory.read_photos()

    def _check_split(self, split: str, examples: SplitArrays) -> None:
        """Raises `UserError` if a photo of the run's own data was in another split of the run."""
        directory = self.classifier.directory
        before = {(one.digest, one.name): one.split for one in self._photos_of_run}
        found = map(before.get, zip(examples.digests, examples.names, strict=True))
        moved = [
            (name, was)
            for name, was in zip(examples.names, found, strict=True)
            if was is not None and split in SPLITS and was != split
        ]
        if moved:
            name, was = moved[0]
            raise UserError(
                f"{len(moved):,} of {len(examples):,} photos of the {split} split were in the "
                f"{was} split of the run in {str(directory.path)!r}, for example {name!r}: the "
                "splits changed after the training; restore them, or give other photos with "
                "--image_folder"
            )

    def _leaked(self, split: str, examples: SplitArrays) -> dict[str, int]:
        """Returns how many photos the run has in its other splits, by the hash of their content."""
        seen = {
            name: {one.digest for one in self._photos_of_run if one.split == name}
            for name in ("train", "validation")
            if not (self._is_own and name == split)
        }
        counts = {
            name: sum(digest in digests for digest in examples.digests if digest)
            for name, digests in seen.items()
        }
        return {name: count for name, count in counts.items() if count}

    def _evaluate(self, split: str, decisions: Any) -> Evaluation:
        classifier = self.classifier
        predictions = self._predict(split)
        scores = self.variant.score(predictions, decisions, self._config.resamples)
        return Evaluation(
            ckpt_dir=str(classifier.directory.path),
            backbone=classifier.built.backbone.name,
            checkpoint=classifier.checkpoint,
            step=classifier.step,
            data=self._data,
            split=split,
            image_size=classifier.config.image_size,
            mirror_averaging=classifier.config.mirror_averaging,
            photos=len(predictions),
            damaged=len(self._loader.examples(split).damaged),
            leaked=self._leaked(split, self._loader.examples(split)),
            scores=scores,
            task_figures=self._task_figures(split, predictions.logits, scores.figures),
            predictions=predictions,
        )

    def _task_figures(
        self, split: str, logits: np.ndarray, others: Container[str]
    ) -> dict[str, Figure]:
        """Returns the loss and the metrics of a task in the user's own file, by name.

        Those with the name of one of the other figures, which are exact, begin with `task_`.
        """
        task = self.classifier.task
        if type(task) in TASKS.values():
            return {}
        examples = self._loader.examples(split)
        batch = {"label": examples.labels, **examples.arrays}
        batch["weight"] = np.ones(len(examples), np.float32)
        tensors = {name: tf.constant(values) for name, values in batch.items()}
        try:
            sums = task.for_validation().sums(tf.constant(logits), tensors)
        except KeyError as error:
            if self._is_own:
                raise
            print(
                f"note: the metrics of {type(task).__name__} are left out: these photos have no "
                f"array {error}",
                file=sys.stderr,
                flush=True,
            )
            return {}
        found = mean_metrics({name: sum.numpy() for name, sum in sums.items()}, task.figures)
        return {
            f"task_{name}" if name in others else name: Figure(value, None)
            for name, value in found.values.items()
            if not self.variant.is_built_in(name) and not math.isnan(value)
        }

    def _write(self, evaluation: Evaluation) -> None:
        """Writes the metrics next to the checkpoint, and the other outputs that were asked for."""
        config, directory = self._config, self.classifier.directory
        if config.predictions:
            decisions = evaluation.scores.decisions
            lines = self.variant.csv(evaluation.predictions, decisions)
            write_file(Path(config.predictions), lines)
        file = Path(f"{evaluation.checkpoint}.{name_of(config, evaluation.split)}.json")
        write_file(file, evaluation.to_json())
        print(f"\nmetrics: {short_path(file)}", flush=True)
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
        """Writes the pictures of an evaluation, and removes those of an earlier one."""
        variant, predictions = self.variant, evaluation.predictions
        plots = variant.plots(predictions, evaluation.scores)
        files = {title: pictures.png(figure) for title, figure in plots.items()}
        shown = variant.shown(predictions, evaluation.scores.decisions)
        if len(shown.rows):
            photos = self._loader.examples(evaluation.split).inputs[0].take(shown.rows, axis=0)
            images = self.classifier.built.backbone.preprocessing(tf.cast(photos, tf.float32))
            heat_maps = grad_cam(self.classifier.built.network, images, tf.constant(shown.classes))
            overlays = overlaid(photos, heat_maps.numpy())
            for name, drawn in ((shown.name, photos), (f"{shown.name}_grad_cam", overlays)):
                files[name] = photo_grid(list(zip(drawn, shown.titles, strict=True)))
        for title, png in files.items():
            write_file(folder / f"{title}.png", png)
            summaries.picture(title, png)
        for file in folder.glob("*.png"):
            if file.stem not in files:  # such as mistakes, if this checkpoint makes none
                file.unlink()
        for curve in variant.curves(predictions):
            summaries.curve(variant.curve_tag(curve), curve.of_class, curve.probabilities)


def size_note(loss: float, size: int, loss_before: float, size_before: int) -> str | None:
    """Returns a note if the validation loss is clearly worse than in training, at another size.

    Losses are in nats. Sizes are heights and widths in pixels.
    """
    if size == size_before or loss <= max(1.25 * loss_before, loss_before + 0.02):
        return None
    return (
        f"note: the validation loss is {loss:.4f} at {size} pixels; in training, it was\n"
        f"{loss_before:.4f} at {size_before} pixels. Evaluate with --image_size={size_before}, and "
        "train with\n--evaluation_scale=1. A larger size is not suitable for images whose content\n"
        "always has the same scale."
    )


def open_evaluated(
    config: EvalConfig, directory: RunDirectory, task: type[Task], source: Source | None = None
) -> Source:
    """Opens the photos that a config names, or else the run's own.

    Args:
      config: what to evaluate.
      directory: the run.
      task: the task of the run.
      source: photos to use instead of those that the config names.

    Returns:
      The photos, with the labels of the run. Other photos may lack some of its classes.

    Raises:
      UserError: the run does not exist, or the photos cannot be read, have other classes, or do not
        have a split that the config names.
    """
    trained = directory.read_config()
    if trained.source and not source and not config.names_photos:
        raise UserError(
            f"the run in {str(directory.path)!r} was trained on the photos of {trained.source}, "
            f"whose code is only imported if you name it; give --source={trained.source}, or other "
            "photos with --dataset or --image_folder"
        )
    named = config if config.names_photos else trained
    source = source or open_photos(
        named,
        config.dataset or trained.dataset,
        config.data_dir or trained.data_dir,
        config.source,
        trained.split,
        has_several_labels(task),
        trained.cache_dir,
    )
    opened, classes = source, directory.read_class_names()
    present = set(source.class_names)
    if config.names_photos and present <= set(classes) and source.class_names != classes:
        missing = [name for name in classes if name not in present]
        if missing:
            print(
                f"note: the photos have {len(source.class_names)} of the {len(classes)} classes of "
                f"the run, without {', '.join(missing[:10])}",
                file=sys.stderr,
                flush=True,
            )
        source = RelabelledSource(source, classes)
    directory.check_class_names(source.class_names)
    for split in config.split:
        check_not_empty(source, split)
    if config.names_photos:  # the training has printed those of the run's own photos
        lines = [*splits_lines(opened), *(f"note: {note}" for note in opened.notes)]
        print(*(f"{line}\n" for line in lines), sep="", end="", file=sys.stderr)
    return source


def check_not_empty(source: Source, split: str) -> None:
    """Raises a `UserError` that names the splits with photos, if a split has none."""
    if not source.count(split):
        filled = [name for name in SPLITS if source.count(name)]
        raise UserError(
            f"split is {split!r}, which has no photos; expected a split with photos: "
            f"{', '.join(filled)}"
        )


def _name_of_photos(given: str | None, field: str) -> str:
    """Returns the name of a data set, or the name of a file or folder and a hash of its path."""
    if not given or field == "dataset":
        return given or ""
    path = os.path.abspath(given)
    return f"{os.path.basename(path)}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:6]}"


def name_of(config: EvalConfig, split: str, checkpoint: str = "") -> str:
    """Returns a name for an evaluation that is allowed in a file name.

    It consists of the data (unless it is the run's own), the checkpoint, the split, and the image
    size and mirror averaging if the config sets them.
    """
    others = [_name_of_photos(getattr(config, field), field) for field in PHOTO_SETTINGS]
    size = f"{config.image_size}px" if config.image_size else ""
    mirror = {"on": "mirrored", "off": "unmirrored"}.get(config.mirror_averaging, "")
    return ".".join(
        "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in part)
        for part in (*others, checkpoint, split, size, mirror)
        if part
    )
