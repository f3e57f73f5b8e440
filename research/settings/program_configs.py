"""The settings of the programs other than training. This module must not import TensorFlow."""

from __future__ import annotations

import dataclasses

from research.settings import fields as settings
from research.settings.durations import parse_shares
from research.settings.photo_config import PhotoConfig
from research.settings.train_config import TASKS
from research.system.errors import UserError

CHECKPOINT_HELP = (
    "'latest', 'best' (lowest validation loss), or the path of a checkpoint without its file "
    "extension"
)
MIRROR_AVERAGING = {"as_trained": None, "on": True, "off": False}
PHOTO_SETTINGS = ("dataset", "image_folder", "labels", "source")


@dataclasses.dataclass(frozen=True)
class ModelConfig(settings.Validated):
    """The settings of all programs that use a trained model. All others are in its config.json.

    Subclasses have a field `ckpt_dir`.
    """

    image_size: int | None = settings.count(
        None,
        "photos are resized to this height and width in pixels; default: the run's evaluation size",
        minimum=8,
        maximum=4096,
    )
    mirror_averaging: str = settings.choice(
        "as_trained",
        tuple(MIRROR_AVERAGING),
        "use the mean of the logits of each photo and its mirror image; 'as_trained' uses the "
        "setting of the run",
    )
    task: str | None = settings.python_file(
        "the run's task as FILE.py:CLASS, if it was trained with your own task"
    )

    backbone: str | None = settings.python_file(
        "the run's backbone as FILE.py:NAME, if it was trained with your own backbone"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not vars(self)["ckpt_dir"]:
            raise UserError("ckpt_dir is not given; expected --ckpt_dir=DIR of a training run")


@dataclasses.dataclass(frozen=True)
class EvalConfig(ModelConfig, PhotoConfig):
    """The settings of `run_eval.py`."""

    ckpt_dir: tuple[str, ...] = settings.declare(
        (), "folder of the run to evaluate (required); several runs are compared", is_path=True
    )
    checkpoint: tuple[str, ...] = settings.declare(("latest",), CHECKPOINT_HELP)
    split: tuple[str, ...] = settings.declare(
        ("test",), "train, validation, test, all, or a TFDS expression such as 'train[:10%]'"
    )
    dataset: str | None = settings.declare(
        None,
        "TFDS data set to evaluate on, instead of the photos of the run; --image_folder, --labels "
        "and --source name other photos too",
    )
    data_dir: str | None = settings.path(
        "folder of prepared TFDS data sets; default: that of the run"
    )
    source: str | None = settings.python_file(
        "Python class that yields the photos to evaluate on, as FILE.py:CLASS, instead of the "
        "run's own photos"
    )
    batch_size: int | None = settings.count(
        None, "photos per batch; default: that of the run", minimum=1
    )
    resamples: int = settings.count(
        500,
        "number of bootstrap resamples of the photos for 95 % intervals; 0 turns bootstrap "
        "intervals off",
    )
    predictions: str | None = settings.path(
        "CSV file to write: file, label, prediction, probabilities and logits of each photo; "
        "several labels are joined by ';'"
    )
    pictures: bool = settings.declare(
        True,
        "draw the confusion matrix (with several labels per photo, the metrics of each class), ROC "
        "and precision-recall curves, the reliability diagram, and misclassified photos with "
        "Grad-CAM heat maps",
    )
    watch: bool = settings.declare(
        False, "evaluate each new checkpoint during training, until the training ends"
    )
    watch_timeout: int = settings.count(
        600, "with --watch, seconds to wait for the next checkpoint", minimum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.checkpoint or not self.split:
            raise UserError("checkpoint or split is empty; expected at least one of each")
        given = [name for name in PHOTO_SETTINGS if getattr(self, name)]
        if len(given) > 1 and given != ["image_folder", "labels"]:
            raise UserError(f"{' and '.join(given)} are both given; expected only one of them")
        evaluations = len(self.ckpt_dir) * len(self.checkpoint) * len(self.split)
        if self.predictions and (evaluations > 1 or self.watch):
            asked = "watch" if self.watch else f"{evaluations} evaluations"
            raise UserError(
                f"predictions is given with {asked}; expected one run, checkpoint and split, "
                "without --watch"
            )
        if self.watch and (len(self.ckpt_dir) > 1 or self.checkpoint != ("latest",)):
            raise UserError(
                "watch is given with several ckpt_dir or with checkpoint; expected one --ckpt_dir, "
                "whose latest checkpoint is evaluated each time"
            )

    @property
    def data_name(self) -> str | None:
        """The source, folder, label file or TFDS data set; None for the photos of the run."""
        return self.source or self.image_folder or self.labels or self.dataset

    @property
    def names_photos(self) -> bool:
        """Whether photos are named; otherwise, those of the run are evaluated."""
        return self.data_name is not None


@dataclasses.dataclass(frozen=True)
class PredictConfig(ModelConfig):
    """The settings of `run_predict.py`. The photos are arguments after the flags."""

    ckpt_dir: str | None = settings.path("folder of the run (required)")
    checkpoint: str = settings.declare("latest", CHECKPOINT_HELP)
    format: str = settings.choice(
        "table",
        ("table", "csv", "jsonl"),
        "output format: 'table' for people, 'csv' and 'jsonl' for programs",
    )
    batch_size: int | None = settings.count(
        None, "photos per batch; default: that of the run", minimum=1
    )


@dataclasses.dataclass(frozen=True)
class ExportConfig(ModelConfig):
    """The settings of `run_export.py`."""

    ckpt_dir: str | None = settings.path("folder of the run (required)")
    checkpoint: str = settings.declare("latest", CHECKPOINT_HELP)
    format: str = settings.choice(
        "saved_model",
        ("saved_model", "keras", "tflite", "onnx"),
        "'saved_model' for TensorFlow Serving, 'keras' for keras.saving.load_model, 'tflite' and "
        "'onnx' for their runtimes",
    )
    out: str | None = settings.path(
        "file or folder to write; default: a file or folder in export/ of ckpt_dir"
    )


@dataclasses.dataclass(frozen=True)
class InspectConfig(PhotoConfig):
    """The settings of `python -m research.inspect_data`."""

    dataset: str = settings.declare("cats_vs_dogs", "name of the TFDS data set to inspect")
    data_dir: str | None = settings.path(
        "folder of prepared TFDS data sets; default: the folder that TFDS uses"
    )
    split: str = settings.declare(
        "80/10/10", "percentages for training, validation and test, as for run_train.py"
    )
    task: str = settings.choice(
        "classification",
        TASKS,
        "'multi_label' if a photo can have any number of labels, as for run_train.py; for your "
        "own task, FILE.py:CLASS",
        or_python_file=True,
    )
    distance: int = settings.count(
        72,
        "two photos are near-duplicates if their perceptual hashes of 256 bits differ in at most "
        "this many bits; with 0, hardly more than copies in other file formats are found",
        maximum=256,
    )
    out: str | None = settings.path(
        "folder to write the report to, as JSON, with sample photos and duplicates as PNG"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_shares(self.split)


@dataclasses.dataclass(frozen=True)
class CacheConfig(settings.Validated):
    """The settings of `run_cache.py`."""

    cache_dir: str | None = settings.path(
        "folder of the caches, as for run_train.py; default: ~/.cache/finetune-loop"
    )
    unused_days: float | None = settings.declare(
        None, "remove what no run used for this number of days", minimum=0.0
    )
    keep_gigabytes: float | None = settings.declare(
        None,
        "remove the least recently used entries, so that the others take at most so much; 0 "
        "removes everything",
        minimum=0.0,
    )
