"""The folder of a run: what lies in it, and whether a run may start or resume there."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from research.config import TrainConfig
from research.durable_files import append_line, stored, write_atomically
from research.errors import UserError
from research.run_lock import LOCK, RunLock


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a file atomically, and the folders that it lies in.

    Raises:
      UserError: it cannot be written.
    """
    with stored(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)


MADE_FIRST = (
    LOCK,
    "checkpoints",
    "events",
    "pictures",
    "labels.txt",
    "labels.txt.partial",
    "data.json",
    "data.json.partial",
    "config.json.partial",
)


class RunDirectory:
    """Names the files of a run. Building one touches nothing on disk.

    Attributes:
      lock: held by the process that trains.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.labels_file = self.path / "labels.txt"
        self.data_file = self.path / "data.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.result_file = self.path / "result.json"
        self.checkpoints = self.path / "checkpoints"
        self.events = self.path / "events"
        self.pictures = self.path / "pictures"
        self.lock = RunLock(self.path)

    def create(
        self, config: TrainConfig, class_names: tuple[str, ...], data: dict[str, Any]
    ) -> None:
        """Makes the folder, with the run's settings, its classes and what is known of its data.

        Raises:
          UserError: the folder cannot be made or written, or another run is in it meanwhile.
        """
        self.lock.acquire()
        if self.config_file.exists():
            raise UserError(
                f"ckpt_dir {str(self.path)!r} got another run while this one was set up; give "
                "another --ckpt_dir"
            )
        try:
            for folder in (self.path, self.checkpoints, self.pictures):
                folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.labels_file, "".join(f"{name}\n" for name in class_names))
            write_atomically(self.data_file, json.dumps(data, indent=2) + "\n")
            write_atomically(self.config_file, config.to_json())  # last: now it is a run
        except OSError as error:
            raise _not_writable(self.path, error.strerror) from error

    def read_config(self) -> TrainConfig:
        """Returns the settings the run was started with; raises `UserError` if there are none."""
        return TrainConfig.from_json(_read(self.config_file))

    def read_class_names(self) -> tuple[str, ...]:
        """Returns the names of the classes by label; raises `UserError` if there are none."""
        return tuple(_read(self.labels_file).removesuffix("\n").split("\n"))

    def check_class_names(self, found: tuple[str, ...]) -> None:
        """Raises `UserError` unless these are the classes that the run was trained on."""
        trained = self.read_class_names()
        if found != trained:
            raise UserError(
                f"the photos have the classes {', '.join(found[:10])}; the run in "
                f"{str(self.path)!r} was trained on {', '.join(trained[:10])}: expected the same"
            )

    def read_data(self) -> dict[str, Any]:
        """Returns what `create` was told of the data; raises `UserError` if there is nothing."""
        try:
            return json.loads(_read(self.data_file))
        except ValueError as error:
            raise UserError(f"{str(self.data_file)!r} is not JSON: {error}") from error

    def check_data(self, found: dict[str, Any]) -> None:
        """Raises `UserError` unless the run was started on the same photos."""
        started = self.read_data()
        changed = [
            f"{name} was {started.get(name)!r} and is now {value!r}"
            for name, value in found.items()
            if started.get(name) != value
        ]
        if changed:
            raise UserError(
                f"the photos changed since the run in {str(self.path)!r} was started: "
                f"{'; '.join(changed)}; restore them, or give another --ckpt_dir"
            )

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Adds one line to metrics.jsonl; raises `UserError` where it cannot be written."""
        with stored(self.metrics_file):
            append_line(self.metrics_file, json.dumps(row))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Returns the rows of metrics.jsonl; a last line cut short by a crash is left out."""
        if not self.metrics_file.exists():
            return []
        rows = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def write_result(self, result: dict[str, Any]) -> None:
        """Writes the figures that a finished run ends with: the file says that it is finished."""
        write_file(self.result_file, json.dumps(result, indent=2) + "\n")

    def keep_metrics_until(self, step: int) -> list[dict[str, Any]]:
        """Drops the rows after a step, which a resumed run is about to write again.

        Returns:
          Those that stay.
        """
        rows = [row for row in self.read_metrics() if row["step"] <= step]
        write_file(self.metrics_file, "".join(json.dumps(row) + "\n" for row in rows))
        return rows


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UserError(
            f"ckpt_dir is {str(file.parent)!r}, where {file.name} cannot be read ({reason}); "
            "expected the folder of a training run"
        ) from error


def _not_writable(path: Path, reason: str | None) -> UserError:
    return UserError(
        f"ckpt_dir is {str(path)!r}, which cannot be written ({reason}); give another --ckpt_dir"
    )


def default_path(config: TrainConfig) -> Path:
    """Returns a new folder under runs/, named by backbone, data and time."""
    data = os.path.basename(config.image_folder) if config.image_folder else config.dataset
    time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    return Path("runs") / f"{config.backbone}-{data.replace('/', '-')}-{time}"


def find_run(config: TrainConfig) -> tuple[RunDirectory, bool]:
    """Returns the folder for a run and whether a run with these settings lies there already.

    Raises:
      UserError: the folder holds a run with other settings (each is named), something else than a
        run, or cannot be written. Nothing on disk is changed.
    """
    directory = RunDirectory(config.ckpt_dir or default_path(config))
    if os.path.exists(directory.config_file):
        differences = directory.read_config().differences(config)
        if differences:
            named = "; ".join(
                f"{name} was {old!r} and is now {new!r}" for name, (old, new) in differences.items()
            )
            raise UserError(
                f"ckpt_dir {str(directory.path)!r} holds a run with other settings: {named}; "
                "repeat the old ones to resume it, or give another --ckpt_dir"
            )
        return directory, True
    _check_free(directory.path)
    return directory, False


def _check_free(path: Path) -> None:
    """Raises `UserError` unless a folder can be made here, or an empty one is there."""
    try:
        # A run killed while its folder was made left some of what it makes first.
        if path.exists() and any(child.name not in MADE_FIRST for child in path.iterdir()):
            raise UserError(
                f"ckpt_dir is {str(path)!r}, which is not empty and holds no run (no config.json); "
                "expected a new or an empty folder, or that of a run to resume"
            )
        nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    except OSError as error:
        raise _not_writable(path, error.strerror) from error
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        reason = "no right to write" if nearest.is_dir() else f"{str(nearest)!r} is no folder"
        raise _not_writable(path, reason)
