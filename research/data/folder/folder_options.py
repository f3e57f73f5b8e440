"""`FolderOptions`: how the photos of a folder are labelled and split."""

from __future__ import annotations

import dataclasses

Shares = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class FolderOptions:
    """How the photos of a folder are labelled and split.

    Attributes:
      labels: a label file, see `read_label_file`. None if there is none.
      label_columns: the columns of the label file, if they do not have usual names.
      label_pattern: a regular expression whose first group is the class in a photo's path. None if
        file names do not contain the class.
      folder_layout: 'auto', 'classes' or 'splits', see `find_layout`.
      shares: percentages of train, validation and test.
      several_labels: whether a photo can have several labels, or none. If a label file has photos
        with several labels, this is always so.
      cache_dir: keeps the copies among many photos. None for the user's cache folder.
    """

    labels: str | None = None
    label_columns: str | None = None
    label_pattern: str | None = None
    folder_layout: str = "auto"
    shares: Shares = (80, 10, 10)
    several_labels: bool = False
    cache_dir: str | None = None
