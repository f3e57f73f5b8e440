"""Opens the data set that a config names."""

from __future__ import annotations

import os

from research.data.folder.folder_options import FolderOptions
from research.data.folder.folder_source import FolderSource
from research.data.source import Source
from research.system.errors import UserError
from research.system.python_file import construct_from_file


def open_source(
    dataset: str,
    image_folder: str | None = None,
    data_dir: str | None = None,
    source: str | None = None,
    options: FolderOptions | None = None,
) -> Source:
    """Returns a user-defined source, a folder of photos, or a TFDS data set, in this priority.

    Args:
      dataset: name of a TFDS data set.
      image_folder: a folder or archive of photos.
      data_dir: where TFDS keeps prepared data sets. None for TFDS's default.
      source: a user-defined source, FILE.py:Class.
      options: how photos of a folder are labelled and split. A label file can replace the folder.
        The shares of the splits also apply to a TFDS data set.

    Raises:
      UserError: the source, folder or data set does not exist, or holds no classes of photos.
    """
    options = options or FolderOptions()
    if source is not None:
        opened = construct_from_file("source", source)
        if not isinstance(opened, Source):
            raise UserError(
                f"source is {source!r}, an object of {type(opened).__name__}; expected a subclass "
                "of research.data.source.Source"
            )
        missing = [
            name
            for name in ("count", "examples")
            if getattr(type(opened), name) is getattr(Source, name)
        ]
        if not hasattr(opened, "class_names"):
            missing.insert(0, "class_names")
        if missing:
            raise UserError(
                f"source is {source!r}, which does not define {', '.join(missing)}; expected "
                "what docs/extending.md lists for a subclass of research.data.source.Source"
            )
        return opened
    if image_folder is not None or options.labels is not None:
        return FolderSource(image_folder, options)
    from research.data.tfds_source import TfdsSource  # takes seconds to import

    return TfdsSource(dataset, os.path.expanduser(data_dir) if data_dir else None, options.shares)
