"""Opens the photos that settings name."""

from __future__ import annotations

from research.data.folder.folder_options import FolderOptions
from research.data.open_source import open_source
from research.data.source import Source
from research.settings.durations import parse_shares
from research.settings.photo_config import PhotoConfig
from research.settings.train_config import TrainConfig
from research.system.errors import UserError
from research.system.garbage import not_searched
from research.tasks.checks import find_task
from research.tasks.multi_label import has_several_labels
from research.tasks.task import Task


def open_photos(
    config: PhotoConfig,
    dataset: str,
    data_dir: str | None = None,
    source: str | None = None,
    split: str = TrainConfig.split,
    several_labels: bool = False,
    cache_dir: str | None = None,
) -> Source:
    """Opens the photos that a config names.

    Args:
      config: names a folder or label file, and how they are read.
      dataset: the TFDS data set if the config names neither.
      data_dir: the folder of prepared TFDS data sets.
      source: a user-defined source as FILE.py:CLASS, instead of all others.
      split: the shares of the splits, as `parse_shares` takes them.
      several_labels: whether a photo can have several labels, or none.
      cache_dir: folder of the caches. None for the user's cache folder.
    """
    options = FolderOptions(
        config.labels,
        config.label_columns,
        config.label_pattern,
        config.folder_layout,
        parse_shares(split),
        several_labels,
        cache_dir,
    )
    with not_searched():
        return open_source(dataset, config.image_folder, data_dir, source, options)


def photos_of_run(config: TrainConfig, task: type[Task] | None = None) -> Source:
    """Opens the photos that a run is trained on.

    Args:
      config: the settings of the run.
      task: the task class. None takes the one that the config names.

    Raises:
      UserError: see `open_source`; or a folder has no photos for training.
    """
    several = has_several_labels(task or find_task(config.task))
    source = open_photos(
        config,
        config.dataset,
        config.data_dir,
        config.source,
        config.split,
        several,
        config.cache_dir,
    )
    if (config.image_folder or config.labels) and not source.count("train"):
        raise UserError(
            f"{config.data_name!r} has no photos for training ({source.summary}); expected a "
            "folder of training photos, or give --folder_layout=classes to divide all photos"
        )
    return source
