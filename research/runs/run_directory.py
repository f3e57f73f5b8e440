"""The folder of a run: its files, and whether a run can start or resume there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import filelock

from research.runs.durable_files import append_line, write_atomically, write_file
from research.settings.automatic import Choice
from research.settings.fields import AUTO
from research.settings.train_config import AUTOMATIC, FILE_DIGESTS, TrainConfig, python_files
from research.system.errors import UserError
from research.system.printable import printable

LOCK = "run.lock"
LARGEST_FILE = 2**24  # bytes
MOST_CLASSES = 2**16
# The values of a row of metrics.jsonl that every row must have.
FIGURES = ("epoch", "step", "seconds", "train_loss")
# Files that a run killed while it made its folder may have left there.
MADE_FIRST = {
    *(LOCK, "checkpoints", "events", "pictures", "labels.txt", "data.json", "photos.tsv"),
}


class PhotoEntry(NamedTuple):
    """A photo of a run: its split, the digest of its content, and its name."""

    split: str
    digest: str
    name: str


class RunLock:
    """A file lock, which the operating system releases when its process ends in any way.

    The file exists while the lock is held, and contains two lines: the process and the machine. A
    file left by a dead process does not block.

    Args:
      folder: the run's folder. Constructing a lock does not access the disk.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / LOCK
        # FileLock fails on a file that its holder removed meanwhile.
        self._lock = filelock.FileLock(self._file, timeout=0)

    def acquire(self) -> None:
        """Creates the folder if needed and takes the lock, unless it is already held.

        Raises:
          UserError: another process holds the lock, or the folder cannot be written.
        """
        if self._lock.is_locked:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._file.write_text(f"{os.getpid()}\n{platform.node()}\n", encoding="utf-8")
        except filelock.Timeout as error:
            raise UserError(
                f"ckpt_dir {str(self._folder)!r} is being trained by {self._holder()}; wait until "
                "it has ended, or give another --ckpt_dir"
            ) from error
        except OSError as error:
            raise not_writable(self._folder, error.strerror) from error

    def release(self) -> None:
        """Removes the file and releases the lock, if it is held."""
        if self._lock.is_locked:
            self._file.unlink(missing_ok=True)
            self._lock.release()

    def _holder(self) -> str:
        try:
            process, machine = self._file.read_text(encoding="utf-8").split()[:2]
        except (OSError, ValueError):  # the process has not written the file yet
            return "another process"
        return f"process {process} on {machine}"


class RunDirectory:
    """The paths of a run's files. Constructing an instance does not access the disk.

    Args:
      path: the run's folder.

    Attributes:
      lock: held by the process that trains the run.
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
        """The run's name among other runs: its folder, and the parent folder in parentheses."""
        path = self.path.absolute()
        return f"{path.name} ({path.parent.name})"

    def create(
        self,
        config: TrainConfig,
        class_names: tuple[str, ...],
        data: dict[str, Any],
        photos: Sequence[PhotoEntry] = (),
        choices: Mapping[str, Choice] = MappingProxyType({}),
    ) -> None:
        """Creates the folder of a new run.

        Args:
          config: the run's settings.
          class_names: the class names in the order of their labels.
          data: a JSON object that describes the photos.
          photos: the training and validation photos.
          choices: the settings that were chosen automatically.

        Raises:
          UserError: the folder cannot be written, or another run was created in it meanwhile.
        """
        self.lock.acquire()
        if self.config_file.exists():
            raise UserError(
                f"another run was created in ckpt_dir {str(self.path)!r} while this one was set "
                "up; give another --ckpt_dir"
            )
        try:
            for folder in (self.path, self.checkpoints, self.pictures):
                folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.labels_file, "".join(f"{name}\n" for name in class_names))
            write_atomically(self.data_file, json.dumps(data, indent=2) + "\n")
            listing = "".join("\t".join(entry) + "\n" for entry in photos)
            write_atomically(self.photos_file, listing)
            # Last: the folder counts as a run once it has this file.
            self._write_config(config, choices)
        except OSError as error:
            raise not_writable(self.path, error.strerror) from error

    def update_config(self, config: TrainConfig) -> None:
        """Writes the settings of a resumed run, if they differ; see `find_run.py`."""
        if self.read_config().differences(config):
            self._write_config(config, self.read_choices())

    def settle(self, name: str, choice: Choice) -> None:
        """Writes the choice for a setting with the value `auto` at the end of the run."""
        config = dataclasses.replace(self.read_config(), **{name: choice.value})
        self._write_config(config, {**self.read_choices(), name: choice})

    def _write_config(self, config: TrainConfig, choices: Mapping[str, Choice]) -> None:
        written = {**dataclasses.asdict(config), FILE_DIGESTS: python_files(config)}
        made = {name: one for name, one in choices.items() if getattr(config, name) != AUTO}
        written[AUTOMATIC] = {name: choice.reason for name, choice in made.items()}
        write_atomically(self.config_file, json.dumps(written, indent=2) + "\n")

    def read_config(self) -> TrainConfig:
        """Returns the run's settings; raises `UserError` if they cannot be read."""
        return TrainConfig.from_json(_read(self.config_file))

    def read_file_digests(self) -> dict[str, Any]:
        """Returns the SHA-256 of each Python file named in the settings, by setting."""
        return json.loads(_read(self.config_file)).get(FILE_DIGESTS) or {}

    def read_choices(self) -> dict[str, Choice]:
        """Returns the settings that were chosen automatically; raises `UserError` if damaged."""
        config = self.read_config()
        reasons = json.loads(_read(self.config_file)).get(AUTOMATIC) or {}
        if not isinstance(reasons, dict) or not all(hasattr(config, name) for name in reasons):
            raise UserError(
                f"{str(self.config_file)!r} has {AUTOMATIC} = {reasons!r:.200}; expected a reason "
                "for each of some settings"
            )
        return {name: Choice(getattr(config, name), reasons[name]) for name in reasons}

    def read_class_names(self) -> tuple[str, ...]:
        """Returns the class names by label; raises `UserError` if they cannot be read."""
        names = _read(self.labels_file).rstrip("\n").split("\n")
        if not 2 <= len(names) <= MOST_CLASSES:
            raise UserError(
                f"{str(self.labels_file)!r} has {len(names):,} lines; expected 2 to "
                f"{MOST_CLASSES:,} class names, one per line"
            )
        return tuple(map(printable, names))

    def check_class_names(self, found: tuple[str, ...]) -> None:
        """Raises `UserError` unless the run was trained on exactly these classes."""
        trained = self.read_class_names()
        if tuple(found) != trained:
            raise UserError(
                f"the photos have the classes {', '.join(found[:10])}; the run in "
                f"{str(self.path)!r} was trained on {', '.join(trained[:10])}; expected the same"
            )

    def read_data(self) -> dict[str, Any]:
        """Returns the `data` given to `create`; raises `UserError` if it cannot be read."""
        try:
            data = json.loads(_read(self.data_file))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{str(self.data_file)!r} is not JSON: {error}") from error
        cached = data.get("cached") if isinstance(data, dict) else ""
        if cached is not None and not isinstance(cached, dict):
            raise UserError(
                f"{str(self.data_file)!r} does not describe a run's data; restore the file, or "
                "give another --ckpt_dir"
            )
        return data

    def read_photos(self) -> list[PhotoEntry]:
        """Returns the `photos` given to `create`; an empty list if they cannot be read."""
        try:
            lines = self.photos_file.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError):
            return []
        columns = (line.split("\t", 2) for line in lines)
        return [PhotoEntry(*entry) for entry in columns if len(entry) == 3]

    def validates(self) -> bool:
        """Whether the run has validation photos."""
        return self.read_data().get("validation_photos") != 0

    def has_content_hashes(self) -> bool:
        """Whether the run recorded hashes of its photos; runs of earlier versions did not."""
        return "train_contents_sha256" in self.read_data()

    def check_data(self, found: dict[str, Any], photos: Sequence[PhotoEntry] = ()) -> None:
        """Raises a `UserError` that names a change, unless the photos are those of `create`."""
        before = self.read_data()
        # A run of an earlier version may describe its photos by fewer values.
        changed = {
            name: f"{name} was {before[name]!r} and is now {value!r}"
            for name, value in found.items()
            if name in before and before[name] != value and None not in (before[name], value)
        }
        if not changed:
            return
        readable = [text for name, text in changed.items() if not name.endswith("_sha256")]
        readable += self._first_change(photos) or [
            f"the labels of the {name.removesuffix('_labels_sha256')} photos are different"
            for name in changed
            if name.endswith("_labels_sha256")
        ]
        raise UserError(
            f"the photos changed since the run in {str(self.path)!r} was started: "
            f"{'; '.join(readable or changed.values())}; restore them, or give another --ckpt_dir"
        )

    def _first_change(self, photos: Sequence[PhotoEntry]) -> list[str]:
        """Returns how one photo changed; an empty list if no change is found."""
        before = {(split, name): digest for split, digest, name in self.read_photos()}
        now = {(split, name): digest for split, digest, name in photos}
        if not before:
            return []
        for (split, name), digest in now.items():
            if before.get((split, name), digest) not in (digest, "") and digest:
                return [f"for example, the {split} photo {name!r} has different content"]
        for known, others, how in ((now, before, "new"), (before, now, "missing")):
            for split, name in known:
                if (split, name) not in others:
                    return [f"for example, the {split} photo {name!r} is {how}"]
        return []

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Appends a row to metrics.jsonl, with null for NaN and infinity, which JSON lacks.

        Raises:
          UserError: the file cannot be written.
        """
        append_line(self.metrics_file, json.dumps(_without_infinities(row)))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Returns the rows of metrics.jsonl, without damaged or truncated lines."""
        if not self.metrics_file.is_file():
            return []
        rows = []
        for line in self.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and all(
                    type(value) in (int, float)
                    for value in (*map(row.get, FIGURES), row.get("validation_loss", 0.0))
                ):
                    rows.append(row)
        return rows

    def write_result(self, result: dict[str, Any]) -> None:
        """Writes result.json, which marks the run as finished."""
        write_file(self.result_file, json.dumps(_without_infinities(result), indent=2) + "\n")

    def forget_result(self) -> None:
        """Removes result.json, if it exists: the run is not finished."""
        self.result_file.unlink(missing_ok=True)

    def keep_metrics_until(self, step: int) -> list[dict[str, Any]]:
        """Removes the rows after a step from metrics.jsonl, and returns the remaining rows."""
        rows = [row for row in self.read_metrics() if row["step"] <= step]
        write_file(self.metrics_file, "".join(json.dumps(row) + "\n" for row in rows))
        return rows


def best_epoch(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the row of metrics.jsonl with the lowest validation loss; None without validation."""
    validated = [row for row in rows if "validation_loss" in row]
    return min(validated, key=lambda row: row["validation_loss"], default=None)


def _read(file: Path) -> str:
    try:
        if file.exists() and not file.is_file():
            reason: str | None = "not a regular file"
        elif file.stat().st_size > LARGEST_FILE:
            reason = f"larger than {LARGEST_FILE:,} bytes"
        else:
            return file.read_text(encoding="utf-8-sig")  # editors may add a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
    raise UserError(
        f"ckpt_dir is {str(file.parent)!r}, where {file.name} cannot be read ({reason}); expected "
        "the folder of a training run"
    )


def not_writable(path: Path, reason: str | None) -> UserError:
    return UserError(
        f"ckpt_dir is {str(path)!r}, which cannot be written ({reason}); free disk space, change "
        "the permissions, or give another --ckpt_dir"
    )


def _without_infinities(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def main_metric(names: Iterable[str]) -> str | None:
    """Returns the name of the metric to show beside the loss: accuracy, or else the first one."""
    metrics = [name for name in names if name != "loss"]
    return "accuracy" if "accuracy" in metrics else next(iter(metrics), None)
