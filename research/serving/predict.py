"""Classifies files and folders of photos: prints a label and probabilities for each photo."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from research.data.files import image_files, is_image
from research.data.folder.archive import ArchiveTree, is_archive
from research.data.folder.photo_tree import FolderTree, PhotoTree
from research.data.source import SEPARATOR, Example, Source
from research.data.split_arrays import load_split
from research.evaluation.classifier import Classifier
from research.serving.answers import Answers, answers_of
from research.settings.program_configs import MIRROR_AVERAGING, PredictConfig
from research.system.errors import UserError
from research.system.printable import csv_line, name_of, printable
from research.tasks.labels import joined

BATCHES_PER_CHUNK = 16


class Prediction(NamedTuple):
    """The prediction for a file.

    Attributes:
      file: its path.
      label: the most probable class; or all predicted labels, joined by `;`.
      probability: that of the most probable class; None if a photo may have several labels.
      probabilities: the probability of each class.
    """

    file: str
    label: str
    probability: float | None
    probabilities: dict[str, float]


class DamagedFile(NamedTuple):
    """A file that is not a readable photo, and the reason."""

    file: str
    reason: str


class StoredPhoto(NamedTuple):
    """A photo to classify: where it is stored, its path there, and its name for the output."""

    tree: PhotoTree
    path: str
    name: str


class Files(Source):
    """Photos as a `Source` without labels. The name of each example is its index."""

    def __init__(self, files: Sequence[StoredPhoto]) -> None:
        self.class_names: tuple[str, ...] = ()
        self._files = files

    def count(self, split: str) -> int:
        return len(self._files)

    def examples(self, split: str) -> Iterator[Example]:
        for index, file in enumerate(self._files):
            yield file.tree.read(file.path, 0)._replace(name=str(index))


def find_files(paths: Sequence[str]) -> list[StoredPhoto]:
    """Returns the given files, and all images in the given folders and archives, once each.

    Raises:
      UserError: a path does not exist, a folder cannot be read, or there is no image.
    """
    found: dict[str, StoredPhoto] = {}
    disk = FolderTree("")
    for given in paths:
        if "://" in given:
            raise UserError(f"{given!r} is a URL; download the photo, and give its path")
        path = Path(given)
        if not path.exists():
            raise UserError(f"{str(path)!r} does not exist; expected photos or folders of photos")
        try:
            if path.is_file() and not is_image(path.name) and is_archive(given):
                archive = ArchiveTree(given)
                photos = [
                    StoredPhoto(archive, name, f"{given}/{name}") for name in archive.images("")
                ]
            else:
                files = image_files(path) if path.is_dir() else [path]
                photos = [StoredPhoto(disk, name_of(file), as_text(file)) for file in files]
            found.update((photo.name, photo) for photo in photos)
        except OSError as error:
            raise UserError(
                f"{str(error.filename)!r} cannot be read: {error.strerror}; make it readable, or "
                "move it elsewhere"
            ) from error
    if not found:
        searched = f"no image in {', '.join(map(repr, paths))}" if paths else "no path is given"
        raise UserError(
            f"{searched}; expected photos, or folders with photos (JPEG, PNG, ...), after the flags"
        )
    return list(found.values())


def as_text(file: Path) -> str:
    """Returns a path as text. Bytes that are not UTF-8 become escape sequences."""
    return os.fsencode(file).decode("utf-8", "backslashreplace")


def predict_files(
    classifier: Classifier, answers: Answers, files: Sequence[StoredPhoto]
) -> Iterator[Prediction | DamagedFile]:
    """Yields the result for each file in order. Only a few batches are in memory at a time."""
    remaining = iter(files)
    size = BATCHES_PER_CHUNK * classifier.config.batch_size
    while chunk := list(itertools.islice(remaining, size)):
        config = classifier.config
        examples = load_split(Files(chunk), "", config.image_size, config.resize)
        names = [photo.name for photo in chunk]
        found: dict[int, Prediction | DamagedFile] = {
            index: DamagedFile(names[index], reason) for _, reason, index in examples.damaged
        }
        if len(examples):
            probabilities = answers.probabilities(classifier.logits(examples))
            for name, row in zip(examples.names, probabilities, strict=True):
                found[int(name)] = Prediction(
                    names[int(name)],
                    joined(answers.chosen(row)),
                    float(row.max()) if answers.has_one_label else None,
                    dict(zip(classifier.class_names, map(float, row), strict=True)),
                )
        yield from (found[index] for index in range(len(chunk)))


def make_writer(
    form: str, files: Sequence[StoredPhoto], answers: Answers
) -> Callable[[Prediction], None]:
    """Prints the header of an output format, and returns a function that prints a prediction.

    Args:
      form: `table` (aligned columns), `csv`, or `jsonl` (one JSON object per line).
      files: all files, for the width of the column of `table`.
      answers: the class names, and whether a photo has exactly one label.
    """
    class_names, has_one_label = answers.class_names, answers.has_one_label

    def columns_of(prediction: Prediction) -> dict[str, Any]:
        columns = prediction._asdict()
        if not has_one_label:
            del columns["probability"]
        return columns

    if form == "jsonl":
        return lambda prediction: print(json.dumps(columns_of(prediction)), flush=True)
    if form == "csv":
        columns = [f"probability {name}" for name in class_names]
        of_label = ["probability"] if has_one_label else []
        print(csv_line(["file", "label", *of_label, *columns]), end="")

        def write_csv(prediction: Prediction) -> None:
            *cells, probabilities = columns_of(prediction).values()
            print(csv_line([*cells, *probabilities.values()]), end="", flush=True)

        return write_csv
    width = min(max(len(printable(photo.name)) for photo in files), 50)
    if not has_one_label:
        print(f"{'file':<{width}}  labels and probabilities", flush=True)

        def write_labels(prediction: Prediction) -> None:
            by_class = prediction.probabilities
            labels = [
                f"{name} {by_class[name]:.4f}" for name in prediction.label.split(SEPARATOR) if name
            ]
            print(f"{printable(prediction.file):<{width}}  {', '.join(labels) or '-'}", flush=True)

        return write_labels
    label_width = max(map(len, (*class_names, "label")))

    def write_line(file: str, label: str, probability: str) -> None:
        print(f"{file:<{width}}  {label:<{label_width}}  {probability}", flush=True)

    write_line("file", "label", "probability")
    return lambda prediction: write_line(
        printable(prediction.file), prediction.label, f"{prediction.probability:11.4f}"
    )


def predict(config: PredictConfig, paths: Sequence[str]) -> int:
    """Prints the prediction for each photo. A damaged file gives a line on standard error.

    Args:
      config: the model and the output format.
      paths: photos and folders of photos.

    Returns:
      The number of damaged files.

    Raises:
      UserError: the run, the checkpoint or a path does not exist.
    """
    files = find_files(paths)
    classifier = Classifier(
        str(config.ckpt_dir),
        config.checkpoint,
        config.image_size,
        MIRROR_AVERAGING[config.mirror_averaging],
        config.batch_size,
        task=config.task,
        backbone=config.backbone,
    )
    answers = answers_of(classifier)
    damaged = 0
    write = make_writer(config.format, files, answers)
    for result in predict_files(classifier, answers, files):
        if isinstance(result, DamagedFile):
            damaged += 1
            print(f"{printable(result.file)}: {result.reason}", file=sys.stderr, flush=True)
        else:
            write(result)
    return damaged
