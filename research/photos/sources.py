"""Opens what a config names: a folder, or a data set of TensorFlow Datasets."""

from __future__ import annotations

import os

from research.photos.folder_source import FolderSource
from research.photos.source import Source


def open_source(dataset: str, image_folder: str | None, data_dir: str | None) -> Source:
    """Returns the folder if one is given, else the TFDS data set.

    Raises:
      UserError: there is no such folder or data set, or it holds no classes of photos.
    """
    if image_folder is not None:
        return FolderSource(image_folder)
    from research.photos.tfds_source import TfdsSource  # takes seconds to import

    return TfdsSource(dataset, os.path.expanduser(data_dir) if data_dir else None)
