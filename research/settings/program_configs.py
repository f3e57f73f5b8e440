"""What the programs besides training are asked for; like `config.py`, free of TensorFlow."""

from __future__ import annotations

import dataclasses

from research.settings import fields as settings
from research.system.errors import UserError

CHECKPOINT_HELP = (
    "'latest', 'best' by validation loss, or the path of a checkpoint without its ending"
)
MIRROR_AVERAGING = {"as_trained": None, "on": True, "off": False}
MIRROR_HELP = "use the mean of the logits of each photo and of its mirror image, or not"


PHOTOS = ("dataset", "image_folder", "source")
TASK_HELP = "the run's task, where it was trained with one of your own; as FILE.py:CLASS"


@dataclasses.dataclass(frozen=True)
class EvalConfig(settings.Validated):
    """What `run_eval.py` is asked for; everything else comes from the run's config.json."""

    ckpt_dir: tuple[str, ...] = settings.several(
        (), "folder of a run to evaluate (required); several are compared", is_path=True
    )
    checkpoint: tuple[str, ...] = settings.several(("latest",), CHECKPOINT_HELP)
    split: tuple[str, ...] = settings.several(
        ("test",), "train, validation, test, or a TFDS expression such as 'train[:10%]'"
    )
    dataset: str | None = settings.text(
        None, "evaluate on this TFDS data set instead of the run's own"
    )
    image_folder: str | None = settings.path(
        "evaluate on this folder of one subfolder a class instead"
    )
    data_dir: str | None = settings.path(
        "where TFDS keeps prepared data sets, instead of the run's own"
    )
    source: str | None = settings.python_file(
        "evaluate on the photos of this class instead, as FILE.py:CLASS"
    )
    task: str | None = settings.python_file(TASK_HELP)
    batch_size: int | None = settings.count(
        None, "photos per step, instead of the run's own", minimum=1
    )
    image_size: int | None = settings.count(
        None,
        "height and width in pixels to evaluate at, instead of the run's own",
        minimum=8,
        maximum=4096,
    )
    mirror_averaging: str = settings.choice("as_trained", tuple(MIRROR_AVERAGING), MIRROR_HELP)
    resamples: int = settings.count(
        500, "resamples of the photos that 95 % intervals are drawn from; 0 for no intervals"
    )
    predictions: str | None = settings.path(
        "write each photo's file, label, prediction, probability and logit as CSV to this file"
    )
    pictures: bool = settings.switch(
        True, "draw confusion matrix, curves, reliability, mistakes and what they were seen by"
    )
    watch: bool = settings.switch(
        False, "evaluate each new checkpoint while training goes on, until it ends"
    )
    watch_timeout: int = settings.count(
        600, "with --watch, seconds to wait for the next checkpoint", minimum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _need_ckpt_dir(self.ckpt_dir)
        if not self.checkpoint or not self.split:
            raise UserError("checkpoint or split is empty; expected at least one of each")
        given = [name for name in PHOTOS if getattr(self, name)]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are both given; expected one of them")
        evaluations = len(self.ckpt_dir) * len(self.checkpoint) * len(self.split)
        if self.predictions and (evaluations > 1 or self.watch):
            raise UserError(
                f"predictions is given, but {evaluations} evaluations are asked for"
                f"{', again and again' if self.watch else ''}; expected one"
            )
        if self.watch and (len(self.ckpt_dir) > 1 or self.checkpoint != ("latest",)):
            raise UserError(
                "watch is given with several ckpt_dir or with checkpoint; expected one --ckpt_dir, "
                "whose last checkpoint is evaluated each time there is a new one"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig(settings.Validated):
    """Which trained model is used, and how it sees photos."""

    ckpt_dir: str | None = settings.path("folder of a run (required)")
    checkpoint: str = settings.text("latest", CHECKPOINT_HELP)
    image_size: int | None = settings.count(
        None,
        "height and width in pixels to see photos at, instead of the run's",
        minimum=8,
        maximum=4096,
    )
    mirror_averaging: str = settings.choice("as_trained", tuple(MIRROR_AVERAGING), MIRROR_HELP)
    task: str | None = settings.python_file(TASK_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        _need_ckpt_dir(self.ckpt_dir)


@dataclasses.dataclass(frozen=True)
class PredictConfig(ModelConfig):
    """What `run_predict.py` is asked for besides photos."""

    format: str = settings.choice(
        "table", ("table", "csv", "jsonl"), "how to print: for people, or for programs"
    )
    batch_size: int | None = settings.count(
        None, "photos a step, instead of the run's own", minimum=1
    )


@dataclasses.dataclass(frozen=True)
class ExportConfig(ModelConfig):
    """What `run_export.py` is asked for."""

    format: str = settings.choice(
        "saved_model",
        ("saved_model", "keras", "tflite", "onnx"),
        "'saved_model' for TensorFlow Serving, 'keras' for keras.saving.load_model, 'tflite' and "
        "'onnx' for their runtimes",
    )
    out: str | None = settings.path("where to write it; default: export/ in ckpt_dir")


@dataclasses.dataclass(frozen=True)
class InspectConfig(settings.Validated):
    """What `python -m research.inspect_data` is asked for."""

    dataset: str = settings.text("cats_vs_dogs", "the TFDS data set to look through, by name")
    image_folder: str | None = settings.path(
        "a folder with one subfolder of images a class, instead of --dataset"
    )
    data_dir: str | None = settings.path(
        "where TFDS keeps prepared data sets; TFDS's own default if not given"
    )
    distance: int = settings.count(
        72,
        "photos look alike whose perceptual hashes differ in at most so many of 256 bits; 0 finds "
        "hardly more than copies in another format",
        maximum=256,
    )
    out: str | None = settings.path(
        "write the report as JSON, some photos and the duplicates as PNG into this folder"
    )


def _need_ckpt_dir(ckpt_dir: str | tuple[str, ...] | None) -> None:
    if not ckpt_dir:
        raise UserError("ckpt_dir is not given; expected --ckpt_dir=DIR of a training run")
