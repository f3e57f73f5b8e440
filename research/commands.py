"""What the programs that use a trained run are asked for; like `config.py`, free of TensorFlow."""

from __future__ import annotations

import dataclasses

from research import settings
from research.errors import UserError


@dataclasses.dataclass(frozen=True)
class EvalConfig(settings.Validated):
    """What `run_eval.py` is asked for; everything else comes from the run's config.json."""

    ckpt_dir: str | None = settings.path("folder of the run to evaluate (required)")
    checkpoint: str = settings.text(
        "latest",
        "'latest', 'best' by validation loss, or the path of a checkpoint without its ending",
    )
    split: str = settings.text(
        "test", "train, validation, test, or a TFDS expression such as 'train[:10%]'"
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
    batch_size: int | None = settings.count(None, "photos a step, instead of the run's own", 1)
    image_size: int | None = settings.count(
        None, "height and width in pixels to evaluate at, instead of the run's own", 8, maximum=4096
    )
    mirror_averaging: str = settings.choice(
        "as_trained",
        ("as_trained", "on", "off"),
        "evaluate the mean of the logits of each photo and of its mirror image, or not",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ckpt_dir is None:
            raise UserError("ckpt_dir is not given; expected --ckpt_dir=DIR of a training run")
        if self.dataset and self.image_folder:
            raise UserError("dataset and image_folder are both given; expected one of them")
