"""The settings that name photos, shared by programs. This module must not import TensorFlow."""

from __future__ import annotations

import dataclasses
import re

from research.settings import fields as settings
from research.system.errors import UserError

FOLDER_LAYOUTS = ("auto", "classes", "splits")


@dataclasses.dataclass(frozen=True)
class PhotoConfig(settings.Validated):
    """The photos of a folder, an archive or a label file."""

    image_folder: str | None = settings.path(
        "folder, zip or tar file with one subfolder of images per class, or with folders such as "
        "'train' and 'test' of such subfolders; replaces --dataset; see docs/data.md"
    )
    labels: str | None = settings.path(
        "CSV or TSV file with a header and the columns file and label, and optionally split and "
        "group. Files are looked up in --image_folder, or else are paths. Separate several labels "
        "of a photo by semicolons, for --task=multi_label"
    )
    label_columns: str | None = settings.declare(
        None,
        "columns of --labels that do not have usual names, such as 'file=picture,label=bird'; "
        "also 'split' and 'group'",
    )
    label_pattern: str | None = settings.declare(
        None,
        "regular expression whose first group is the class in the path of a photo, for folders "
        "without class folders; '([^/]+)[._]\\d+' for cat.0.jpg and cat_0.jpg",
    )
    folder_layout: str = settings.choice(
        "auto",
        FOLDER_LAYOUTS,
        "'classes' if folders with names such as 'train' are classes, 'splits' if they are splits "
        "and folders beside them are left out; 'auto' decides by the names if they are clear",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_pattern is not None:
            try:
                groups = re.compile(self.label_pattern).groups
            except re.error as error:
                raise UserError(
                    f"label_pattern is {self.label_pattern!r}, which is no regular expression: "
                    f"{error}"
                ) from error
            if not groups:
                raise UserError(
                    f"label_pattern is {self.label_pattern!r}; expected a group in parentheses, "
                    "which matches the class"
                )
            if self.labels:
                raise UserError(
                    "labels and label_pattern are both given; expected only one of them"
                )
        needs = {
            "label_pattern": (self.label_pattern, self.image_folder, "image_folder"),
            "label_columns": (self.label_columns, self.labels, "labels"),
            "folder_layout": (
                self.folder_layout != "auto",
                self.image_folder or self.labels,
                "image_folder",
            ),
        }
        for name, (value, required, by) in needs.items():
            if value and not required:
                raise UserError(
                    f"{name} is {getattr(self, name)!r}, but no --{by} is given; give --{by}, or "
                    f"leave out --{name}"
                )
