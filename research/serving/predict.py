"""Says what is on photos: files and folders in, a label and a probability each out."""

from __future__ import annotations

import csv
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from research.data.files import image_files
from research.data.source import Example, Source, read_example
from research.data.split_arrays import load_split
from research.evaluation.classifier import Classifier
from research.evaluation.scores import Predictions
from research.settings.program_configs import MIRROR_AVERAGING, PredictConfig
from research.system.errors import UserError
from research.system.printable import printable

BATCHES_A_CHUNK = 16


class Prediction(NamedTuple):
    """What is said of a file: its most probable class, and the probability, 0 to 1, of each."""

    file: str
    label: str
    probability: float
    probabilities: dict[str, float]


class DamagedFile(NamedTuple):
    """A file that is no photo, and why."""

    file: str
    reason: str


class Files(Source):
    """Files as a `Source` without labels, each named by its place."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.class_names: tuple[str, ...] = ()
        self._files = files

    def count(self, split: str) -> int:
        return len(self._files)

    def examples(self, split: str) -> Iterator[Example]:
        for index, file in enumerate(self._files):
            yield read_example(file, 0, str(index))


def find_files(paths: Sequence[str]) -> list[Path]:
    """Returns the files named, and the images in the folders named and below, each once.

    Raises:
      UserError: one does not exist, a folder cannot be read, or there is none at all.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{str(path)!r} does not exist; expected photos or folders of photos")
        try:
            found.update(dict.fromkeys(image_files(path) if path.is_dir() else [path]))
        except OSError as error:
            raise UserError(
                f"{str(error.filename)!r} cannot be read: {error.strerror}; make it readable, or "
                "move it elsewhere"
            ) from error
    if not found:
        raise UserError(
            f"there is no image in {', '.join(map(repr, paths)) or 'no path'}; expected photos, or "
            "folders with photos (JPEG, PNG, ...), after the flags"
        )
    return list(found)


def as_text(file: Path) -> str:
    """Returns a file's path, with bytes that are no UTF-8 written as escapes."""
    return os.fsencode(file).decode("utf-8", "backslashreplace")


def predict_files(
    classifier: Classifier, files: Sequence[Path]
) -> Iterator[Prediction | DamagedFile]:
    """Yields what is said of each file in order, holding some batches of photos at a time."""
    remaining = iter(files)
    size = BATCHES_A_CHUNK * classifier.config.batch_size
    while chunk := list(itertools.islice(remaining, size)):
        examples = load_split(Files(chunk), "", classifier.config.image_size)
        names = [as_text(file) for file in chunk]
        found: dict[int, Prediction | DamagedFile] = {
            int(index): DamagedFile(names[int(index)], reason) for index, reason in examples.damaged
        }
        if len(examples):
            logits = classifier.logits(examples)
            said = Predictions(examples.names, examples.labels, logits)
            for index, label, shares in zip(
                map(int, said.names), said.predicted, said.probabilities, strict=True
            ):
                of_classes = dict(zip(classifier.class_names, map(float, shares), strict=True))
                found[index] = Prediction(
                    names[index], classifier.class_names[label], float(shares[label]), of_classes
                )
        yield from (found[index] for index in range(len(chunk)))


class TableWriter:
    """Writes a line of columns a photo, for people."""

    def __init__(self, out: TextIO, files: Sequence[Path], class_names: Sequence[str]) -> None:
        self._out = out
        self._width = min(max(len(printable(as_text(file))) for file in files), 50)
        self._label_width = max(map(len, (*class_names, "label")))
        self._line("file", "label", "probability")

    def write(self, prediction: Prediction) -> None:
        """Writes a photo's line."""
        file, label = printable(prediction.file), prediction.label
        self._line(file, label, f"{prediction.probability:11.4f}")

    def _line(self, file: str, label: str, probability: str) -> None:
        columns = f"{file:<{self._width}}  {label:<{self._label_width}}  {probability}"
        print(columns, file=self._out, flush=True)


class CsvWriter:
    """Writes a line of comma-separated values a photo: label, probability, that of each class."""

    def __init__(self, out: TextIO, class_names: Sequence[str]) -> None:
        self._out = out
        self._writer = csv.writer(out, lineterminator="\n")
        named = [f"probability {name}" for name in class_names]
        self._writer.writerow(["file", "label", "probability", *named])

    def write(self, prediction: Prediction) -> None:
        """Writes a photo's line."""
        file, label, probability, probabilities = prediction
        self._writer.writerow([file, label, probability, *probabilities.values()])
        self._out.flush()


class JsonLinesWriter:
    """Writes a JSON object a photo and line, as `Prediction` has it."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def write(self, prediction: Prediction) -> None:
        """Writes a photo's line."""
        print(json.dumps(prediction._asdict()), file=self._out, flush=True)


def make_writer(
    form: str, files: Sequence[Path], class_names: Sequence[str]
) -> TableWriter | CsvWriter | JsonLinesWriter:
    """Returns what writes `table`, `csv` or `jsonl` to standard output."""
    if form == "csv":
        return CsvWriter(sys.stdout, class_names)
    if form == "jsonl":
        return JsonLinesWriter(sys.stdout)
    return TableWriter(sys.stdout, files, class_names)


def predict(config: PredictConfig, paths: Sequence[str]) -> int:
    """Prints what is said of each photo; a damaged one is a line on standard error instead.

    Args:
      config: which model, and how to print.
      paths: photos, and folders of photos.

    Returns:
      how many files were damaged.

    Raises:
      UserError: there is no such run, checkpoint or path.
    """
    files = find_files(paths)
    classifier = Classifier(
        str(config.ckpt_dir),
        config.checkpoint,
        config.image_size,
        MIRROR_AVERAGING[config.mirror_averaging],
        config.batch_size,
        task=config.task,
    )
    damaged = 0
    writer = make_writer(config.format, files, classifier.class_names)
    for said in predict_files(classifier, files):
        if isinstance(said, DamagedFile):
            damaged += 1
            print(f"{printable(said.file)}: {said.reason}", file=sys.stderr, flush=True)
        else:
            writer.write(said)
    return damaged
