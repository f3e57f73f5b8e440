"""Finds the folder of a run, and decides whether a run there can be resumed."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

from research.optimization.schedules import SCHEDULES
from research.runs.restore import check_restorable
from research.runs.run_directory import MADE_FIRST, RunDirectory, not_writable
from research.runs.sealed_files import intact_checkpoints
from research.settings.automatic import with_choices
from research.settings.train_config import TrainConfig, names_in_files, python_files
from research.system.errors import UserError


def default_path(config: TrainConfig) -> Path:
    """Returns a new folder in runs/, named after the backbone, the data and the time."""
    source = (config.source or "").rpartition(":")[2]
    data = source or os.path.basename(config.image_folder or config.labels or config.dataset)
    time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    return Path("runs") / f"{config.backbone.rpartition(':')[2]}-{data.replace('/', '-')}-{time}"


def find_run(config: TrainConfig) -> tuple[RunDirectory, bool]:
    """Returns the folder for a run, and whether it already holds a run with these settings.

    Nothing on disk is changed. Some settings of a run to resume may differ, and
    `RunDirectory.update_config` records them: paths, if the content is the same, and a larger
    number of epochs, if the learning rates do not depend on it. The photos in another folder are
    compared later, by `RunDirectory.check_data`.

    Raises:
      UserError: the folder holds a run with other settings (all are named) or other files, or
        cannot be written.
    """
    directory = RunDirectory(config.ckpt_dir or default_path(config))
    check_restorable(str(directory.path))
    if not os.path.exists(directory.config_file):
        _check_outside(directory.path, config.image_folder)
        _check_free(directory.path)
        return directory, False
    trained = directory.read_config()
    config = with_choices(config, directory.read_choices())
    differences = trained.differences(config)
    before, digests = directory.read_file_digests(), python_files(config)
    for name, digest in digests.items():
        if name not in differences and before.get(name) != digest:
            raise UserError(
                f"{name} is {getattr(config, name)!r}, whose content changed since the run in "
                f"{str(directory.path)!r} was started; restore it, or give another --ckpt_dir"
            )
    allowed = {
        name
        for name, digest in digests.items()
        if before.get(name) == digest
        and names_in_files(trained, name) == names_in_files(config, name)
    }
    for name in ("image_folder", "labels"):  # photos and labels are compared later
        if getattr(trained, name) and getattr(config, name) and directory.has_content_hashes():
            allowed.add(name)
    too_short = "only more can be trained" if config.epochs < trained.epochs else None
    reason = too_short or length_is_fixed(config)
    if reason is None:
        allowed.add("epochs")
    if set(differences) - allowed:
        named = "; ".join(
            f"{name} was {old!r} and is now {new!r}" for name, (old, new) in differences.items()
        )
        if "epochs" in differences and reason:
            named += f" (epochs cannot be changed, because {reason})"
        raise UserError(
            f"ckpt_dir {str(directory.path)!r} holds a run with other settings: {named}; "
            "give the old settings to resume it, or give another --ckpt_dir"
        )
    return directory, True


def length_is_fixed(config: TrainConfig) -> str | None:
    """Returns why a run cannot be made longer; None if its first steps do not depend on its length.

    A schedule in the user's own file may depend on the length.
    """
    if config.hyperrule:
        return "the HyperRule chooses them"
    trains_backbone = config.unfreeze_from != "none"
    for setting in ("head_schedule", *(["backbone_schedule"] if trains_backbone else [])):
        name = getattr(config, setting)
        shape = SCHEDULES.get(name)
        if shape is None or shape.depends_on_length:
            return f"{setting} {name!r} depends on their number"
    return None


def has_checkpoint(directory: RunDirectory) -> bool:
    """Returns whether a run to resume has a checkpoint.

    Raises:
      UserError: all checkpoints are damaged; or there is none, although epochs are recorded.
    """
    if intact_checkpoints(directory.checkpoints / "latest"):
        return True
    # A run that was killed before its first checkpoint may have recorded its first epoch.
    if len(directory.read_metrics()) > 1 or directory.result_file.exists():
        raise UserError(
            f"ckpt_dir {str(directory.path)!r} has the records of a run and no checkpoint; put its "
            "folder 'checkpoints' back, or give another --ckpt_dir"
        )
    return False


def _check_outside(path: Path, image_folder: str | None) -> None:
    """Raises `UserError` if the run's pictures would become photos of the next run."""
    if image_folder and path.resolve().is_relative_to(Path(image_folder).resolve()):
        raise UserError(
            f"ckpt_dir is {str(path)!r}, which is in image_folder {image_folder!r}: the pictures "
            "of the run would be used as photos; give a --ckpt_dir outside of it"
        )


def _check_free(path: Path) -> None:
    """Raises `UserError` unless the folder is empty or can be created."""
    try:
        if path.is_symlink() and not path.exists():
            raise not_writable(path, f"a link to {os.readlink(path)!r}, which does not exist")
        if path.exists() and any(
            child.name not in MADE_FIRST and not child.name.endswith(".partial")
            for child in path.iterdir()
        ):
            raise UserError(
                f"ckpt_dir is {str(path)!r}, which is not empty and holds no run (no config.json); "
                "expected a new folder, an empty folder, or the folder of a run to resume"
            )
        nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    except OSError as error:
        raise not_writable(path, error.strerror) from error
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        reason = "no write permission" if nearest.is_dir() else f"{str(nearest)!r} is not a folder"
        raise not_writable(path, reason)
