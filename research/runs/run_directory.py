"""The folder of a run: what lies in it, and whether a run may start or resume there."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from research.runs.durable_files import append_line, stored, write_atomically, write_file
from research.runs.run_lock import LOCK, RunLock
from research.settings.train_config import FILE_DIGESTS, TrainConfig, python_files
from research.system.errors import UserError
from research.system.printable import printable

LARGEST_FILE = 2**24
MOST_CLASSES = 2**16
# What is used of a row of metrics.jsonl.
FIGURES = (
    "epoch",
    "step",
    "seconds",
    "train_loss",
    "validation_loss",
)


MADE_FIRST = (
    LOCK,
    "checkpoints",
    "events",
    "pictures",
    "labels.txt",
    "labels.txt.partial",
    "data.json",
    "data.json.partial",
    "photos.tsv",
    "photos.tsv.partial",
    "config.json.partial",
)


class PhotoEntry(NamedTuple):
    """A photo of a run: its split, what tells its content from others, and its name."""

    split: str
    digest: str
    name: str


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
        self.photos_file = self.path / "photos.tsv"
        self.metrics_file = self.path / "metrics.jsonl"
        self.result_file = self.path / "result.json"
        self.checkpoints = self.path / "checkpoints"
        self.events = self.path / "events"
        self.pictures = self.path / "pictures"
        self.lock = RunLock(self.path)

    @property
    def title(self) -> str:
        """What the run is called among others: its folder, and the one that that lies in."""
        path = self.path.absolute()
        return f"{path.name} ({path.parent.name})"

    def create(
        self,
        config: TrainConfig,
        class_names: tuple[str, ...],
        data: dict[str, Any],
        photos: Sequence[PhotoEntry] = (),
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
            listing = "".join("\t".join(entry) + "\n" for entry in photos)
            write_atomically(self.photos_file, listing)
            written = {**dataclasses.asdict(config), FILE_DIGESTS: python_files(config)}
            # last: now it is a run
            write_atomically(self.config_file, json.dumps(written, indent=2) + "\n")
        except OSError as error:
            raise _not_writable(self.path, error.strerror) from error

    def read_config(self) -> TrainConfig:
        """Returns the settings the run was started with; raises `UserError` if there are none."""
        return TrainConfig.from_json(_read(self.config_file))

    def read_file_digests(self) -> dict[str, Any]:
        """Returns the SHA-256 of each Python file that the settings name, by setting."""
        return json.loads(_read(self.config_file)).get(FILE_DIGESTS) or {}

    def read_class_names(self) -> tuple[str, ...]:
        """Returns the names of the classes by label; raises `UserError` if there are none."""
        names = _read(self.labels_file).removesuffix("\n").split("\n")
        if not 2 <= len(names) <= MOST_CLASSES:
            raise UserError(
                f"{str(self.labels_file)!r} has {len(names):,} lines; expected the names of 2 to "
                f"{MOST_CLASSES:,} classes, one a line"
            )
        return tuple(map(printable, names))

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
            data = json.loads(_read(self.data_file))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{str(self.data_file)!r} is not JSON: {error}") from error
        cached = data.get("cached") if isinstance(data, dict) else ""
        if cached is not None and not isinstance(cached, dict):
            raise UserError(
                f"{str(self.data_file)!r} does not say what a run was trained on; restore it, or "
                "give another --ckpt_dir"
            )
        return data

    def check_data(self, found: dict[str, Any], photos: Sequence[PhotoEntry] = ()) -> None:
        """Raises `UserError` unless the run was started on the same photos, and names one.

        Args:
          found: as `create` was given it.
          photos: the same.
        """
        started = self.read_data()
        # A run of an earlier version may say less of its photos.
        changed = {
            name: f"{name} was {started[name]!r} and is now {value!r}"
            for name, value in found.items()
            if name in started and started[name] != value
        }
        if not changed:
            return
        telling = [text for name, text in changed.items() if not name.endswith("_sha256")]
        telling += self._first_change(photos)
        raise UserError(
            f"the photos changed since the run in {str(self.path)!r} was started: "
            f"{'; '.join(telling or changed.values())}; restore them, or give another --ckpt_dir"
        )

    def _first_change(self, photos: Sequence[PhotoEntry]) -> list[str]:
        """Says of a photo how it changed; nothing where none is known to have changed."""
        try:
            lines = self.photos_file.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError):
            return []
        entries = (line.split("\t", 2) for line in lines)
        before = {(split, name): digest for split, digest, name in filter(_is_entry, entries)}
        now = {(split, name): digest for split, digest, name in photos}
        for (split, name), digest in now.items():
            if before.get((split, name), digest) != digest:
                return [f"for example, the {split} photo {name!r} has another content"]
        for known, others, how in ((now, before, "new"), (before, now, "gone")):
            for split, name in known:
                if (split, name) not in others:
                    return [f"for example, the {split} photo {name!r} is {how}"]
        return []

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Adds one line to metrics.jsonl; raises `UserError` where it cannot be written."""
        with stored(self.metrics_file):
            append_line(self.metrics_file, json.dumps(row))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Returns the rows of metrics.jsonl; a line that is damaged, or cut short, is left out."""
        if not self.metrics_file.is_file():
            return []
        rows = []
        for line in self.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and all(_is_number(row.get(name)) for name in FIGURES):
                    rows.append(row)
        return rows

    def write_result(self, result: dict[str, Any]) -> None:
        """Writes the figures that a finished run ends with: the file says that it is finished."""
        write_file(self.result_file, json.dumps(result, indent=2) + "\n")

    def forget_result(self) -> None:
        """Removes the file that says that the run is finished, if it is there: it goes on."""
        self.result_file.unlink(missing_ok=True)

    def keep_metrics_until(self, step: int) -> list[dict[str, Any]]:
        """Drops the rows after a step, which a resumed run is about to write again.

        Returns:
          Those that stay.
        """
        rows = [row for row in self.read_metrics() if row["step"] <= step]
        write_file(self.metrics_file, "".join(json.dumps(row) + "\n" for row in rows))
        return rows


def _is_entry(columns: Sequence[str]) -> bool:
    return len(columns) == len(PhotoEntry._fields)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _read(file: Path) -> str:
    try:
        if file.exists() and not file.is_file():
            reason: str | None = "no file"
        elif file.stat().st_size > LARGEST_FILE:
            reason = f"over {LARGEST_FILE:,} bytes"
        else:
            return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
    raise UserError(
        f"ckpt_dir is {str(file.parent)!r}, where {file.name} cannot be read ({reason}); expected "
        "the folder of a training run"
    )


def _not_writable(path: Path, reason: str | None) -> UserError:
    return UserError(
        f"ckpt_dir is {str(path)!r}, which cannot be written ({reason}); give another --ckpt_dir"
    )


def default_path(config: TrainConfig) -> Path:
    """Returns a new folder under runs/, named by backbone, data and time."""
    data = os.path.basename(config.image_folder or config.dataset)
    if config.source:
        data = config.source.rpartition(":")[2]
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
        before = directory.read_file_digests()
        for name, digest in python_files(config).items():
            if name not in differences and before.get(name) != digest:
                raise UserError(
                    f"{name} is {getattr(config, name)!r}, whose content changed since the run in "
                    f"{str(directory.path)!r} was started; restore it, or give another --ckpt_dir"
                )
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
