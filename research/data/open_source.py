"""Opens the data set that a config names."""

from __future__ import annotations

import os

import numpy as np

from research.data.folder.folder_options import FolderOptions
from research.data.folder.folder_source import FolderSource
from research.data.source import SPLITS, Source
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
        return _checked_source(source, construct_from_file("source", source))
    if image_folder is not None or options.labels is not None:
        return FolderSource(image_folder, options)
    from research.data.tfds_source import TfdsSource  # takes seconds to import

    return TfdsSource(dataset, os.path.expanduser(data_dir) if data_dir else None, options.shares)


def _checked_source(reference: str, opened: object) -> Source:
    """Returns an object of a user's file; raises `UserError` unless it is a source."""
    if not isinstance(opened, Source):
        raise UserError(
            f"source is {reference!r}, an object of {type(opened).__name__}; expected a subclass "
            "of research.data.source.Source"
        )
    missing = [
        name
        for name in ("count", "examples", *(("listed", "read") if opened.random_access else ()))
        if getattr(type(opened), name) is getattr(Source, name)
    ]
    if not hasattr(opened, "class_names"):
        missing.insert(0, "class_names")
    if missing:
        raise UserError(
            f"source is {reference!r}, which does not define {', '.join(missing)}; expected "
            "what docs/extending.md lists for a subclass of research.data.source.Source"
        )
    for name in ("class_names", "notes"):
        texts = getattr(opened, name)
        if not isinstance(texts, (tuple, list)) or not all(isinstance(one, str) for one in texts):
            raise UserError(
                f"source is {reference!r}, whose {name} is {texts!r:.200}; expected a tuple of "
                "texts"
            )
    if not isinstance(opened.summary, str):
        raise UserError(
            f"source is {reference!r}, whose summary is {opened.summary!r:.200}; expected a text"
        )
    for split in SPLITS:
        try:
            count = opened.count(split)
        except Exception:  # it may be a split that is not used; else the error is raised then
            continue
        if not isinstance(count, (int, np.integer)) or count < 0:
            raise UserError(
                f"source is {reference!r}, whose count({split!r}) is {count!r:.200}; expected the "
                "number of photos of the split"
            )
    return opened
