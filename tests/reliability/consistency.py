"""Checks that a run's folder is consistent at any moment, and complete at the end."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from research.system.environment import import_tensorflow

import_tensorflow()  # before other imports do, which would print its log

import tensorflow as tf  # noqa: E402

from tests.helpers import read_tensors  # noqa: E402

KINDS = ("latest", "best")
# Fields of metrics.jsonl that depend on the machine's speed.
TIMES = ("seconds", "photos_per_second", "share_of_step_waiting_for_input")


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of metrics.jsonl, or result.json, without the fields that depend on speed."""
    return {name: value for name, value in row.items() if name not in TIMES}


def digest_of(checkpoint: str) -> str:
    """Returns a hash of all tensors of a checkpoint except the duration of the run.

    TensorFlow stores a checksum for each tensor and cannot read a damaged one.
    """
    digest = hashlib.sha256()
    for name, value in sorted(read_tensors(checkpoint).items()):
        digest.update(f"{name} {value.dtype} {value.shape}".encode() + value.tobytes())
    return digest.hexdigest()


def digests_of_files(folder: Path) -> dict[str, str]:
    """Returns a hash of every file in a folder, by relative path."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def entries(cache: Path) -> dict[str, dict[str, str]]:
    """Returns the file hashes of each entry of the caches that a run would use."""
    return {
        str(folder.relative_to(cache)): digests_of_files(folder)
        for folder in (*cache.glob("*"), *cache.glob("photos/*"))
        if folder.is_dir() and folder.suffix != ".partial" and folder.name != "photos"
    }


class Witness:
    """Compares runs with an undisturbed run, and the state after each step between all runs.

    Args:
      reference: the folder of the finished undisturbed run.
      cache: its trunk cache.

    Raises:
      RuntimeError: the undisturbed run is not consistent.
    """

    def __init__(self, reference: Path, cache: Path) -> None:
        self.reference = reference
        self.entries = entries(cache)
        self._rows = list(map(without_times, read_rows(reference)[0]))
        self._states: dict[str, str] = {}
        self._json: dict[str, Any] = {}
        self.checked_states = 0
        if found := self.inconsistencies(reference, cache):
            raise RuntimeError(f"the undisturbed run is not consistent: {found}")

    def inconsistencies(self, run: Path, cache: Path) -> list[str]:
        """Returns the errors in the files that a later run would use; also valid after a kill."""
        found = []
        for path in pointed(run):
            name = Path(path).name
            try:
                state = digest_of(path)
            except Exception as error:  # TensorFlow raises various types for damaged files
                found.append(f"{name} is the target of a pointer file and cannot be read: {error}")
                continue
            self.checked_states += 1
            if self._states.setdefault(name, state) != state:
                found.append(f"{name} has a different state than in other runs")
        rows, torn = read_rows(run)
        for row in map(without_times, rows):
            if row not in self._rows:
                found.append(f"a row of metrics.jsonl is not in the undisturbed run: {row}")
        if torn > 1:
            found.append(f"{torn} lines of metrics.jsonl are not JSON")
        found += self._json_differences(run)
        for name, files in entries(cache).items():
            if files != self.entries.get(name):
                found.append(f"entry {name} of the trunk cache differs from the undisturbed run")
        return found

    def differences(self, run: Path, cache: Path, allowed_suffix: str = ".none") -> list[str]:
        """Returns the differences of a finished run from the undisturbed one.

        Additional files that end with `allowed_suffix` are not reported.
        """
        found = self.inconsistencies(run, cache)
        for which in KINDS:
            ours, theirs = (str(one / "checkpoints" / which) for one in (run, self.reference))
            if digest_of(ours) != digest_of(theirs):
                found.append(f"the {which} checkpoint differs from the undisturbed run")
        rows, torn = read_rows(run)
        if torn or list(map(without_times, rows)) != self._rows:
            found.append("the rows of metrics.jsonl differ from the undisturbed run")
        seconds = [row["seconds"] for row in rows]
        if seconds != sorted(seconds):
            found.append(f"the field seconds of metrics.jsonl decreases: {seconds}")
        left, expected = files_left(run), files_left(self.reference)
        more = [name for name in (left - expected).elements() if not name.endswith(allowed_suffix)]
        if more or expected - left:
            found.append(f"additional files: {more}, missing files: {list(expected - left)}")
        if incomplete := unfinished(run, cache):
            found.append(f"unfinished files: {incomplete}")
        return found

    def _json_differences(self, run: Path) -> list[str]:
        found = []
        for file in run.rglob("*.json"):
            name = str(file.relative_to(run))
            text = file.read_text(encoding="utf-8")
            text = text.replace(str(run), "RUN").replace(str(run.parent), "FOLDER")
            try:
                content = json.loads(text)
            except ValueError as error:
                found.append(f"{name} is not JSON: {error}")
                continue
            content = without_times(content)
            if self._json.setdefault(name, content) != content:
                found.append(f"{name} differs from other runs")
        return found


def read_rows(run: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the rows of metrics.jsonl, and the number of lines that are not JSON."""
    file = run / "metrics.jsonl"
    rows, torn = [], 0
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            torn += 1
    return rows, torn


def pointed(run: Path) -> list[str]:
    """Returns the paths of all checkpoints that are named in a run's pointer files."""
    states = [tf.train.get_checkpoint_state(str(run / "checkpoints" / which)) for which in KINDS]
    return [path for state in states if state for path in state.all_model_checkpoint_paths]


def files_left(run: Path) -> collections.Counter[str]:
    """Counts a run's files by path, without event files and without the checkpoints' steps."""
    return collections.Counter(
        re.sub(r"step-\d+(-unvalidated)?", "step", str(file.relative_to(run)))
        for file in run.rglob("*")
        if file.is_file() and "events" not in file.parts
    )


def unfinished(*folders: Path) -> list[str]:
    """Returns the relative paths of files and folders whose writing was not finished."""
    return sorted(
        str(file.relative_to(folder))
        for folder in folders
        for file in folder.rglob("*")
        if re.search(r"^partial-|^partial$|\.partial$", file.name)
    )


def file_sizes(run: Path) -> list[tuple[Path, int]]:
    """Returns the files of a run and their sizes in bytes; the run may be in progress."""
    found = []
    for folder, _, names in os.walk(run):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                file = Path(folder, name)
                found.append((file, file.stat().st_size))
    return found


def event_bytes(run: Path) -> tuple[int, int]:
    """Returns the number of a run's event files and their total size in bytes."""
    sizes = [size for file, size in file_sizes(run) if ".tfevents." in file.name]
    return len(sizes), sum(sizes)
