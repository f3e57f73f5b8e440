"""What a run's folder must be at any moment, and how it must end."""

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

import_tensorflow()  # before others do, and without what that prints

import tensorflow as tf  # noqa: E402

from tests.helpers import read_tensors  # noqa: E402

KINDS = ("latest", "best")
# What of a row of metrics.jsonl depends on the machine's speed.
TIMES = ("seconds", "photos_per_second", "share_of_step_waiting_for_input")


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """Returns what of a row, or of result.json, two equal runs have in common."""
    return {name: value for name, value in row.items() if name not in TIMES}


def digest_of(checkpoint: str) -> str:
    """Hashes every tensor of a checkpoint but the time that the run took.

    A tensor that is not as it was written cannot be read: TensorFlow keeps a sum of each.
    """
    digest = hashlib.sha256()
    for name, value in sorted(read_tensors(checkpoint).items()):
        digest.update(f"{name} {value.dtype} {value.shape}".encode() + value.tobytes())
    return digest.hexdigest()


def digests_of_files(folder: Path) -> dict[str, str]:
    """Hashes every file below a folder, by path."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def entries(cache: Path) -> dict[str, dict[str, str]]:
    """Returns the hashes of the files of each entry of a trunk cache that a run would take."""
    return {
        folder.name: digests_of_files(folder)
        for folder in cache.glob("*")
        if folder.is_dir() and folder.suffix != ".partial"
    }


class Witness:
    """Remembers the state after each step, the rows and the files of runs that must be equal.

    Args:
      reference: the folder of the undisturbed run, finished.
      cache: its trunk cache.
    """

    def __init__(self, reference: Path, cache: Path) -> None:
        self.reference = reference
        self.entries = entries(cache)
        self._rows = list(map(without_times, read_rows(reference)[0]))
        self._states: dict[str, str] = {}
        self._json: dict[str, Any] = {}
        self.checked_states = 0
        found = self.trusted_wrongly(reference, cache)
        if found:
            raise RuntimeError(f"the undisturbed run is not consistent: {found}")

    def trusted_wrongly(self, run: Path, cache: Path) -> list[str]:
        """Returns what a later run would trust and should not, at any moment, also after a kill."""
        found = []
        for path in pointed(run):
            name = Path(path).name
            try:
                state = digest_of(path)
            except Exception as error:  # whatever TensorFlow raises for a damaged file
                found.append(f"{name} is named by a pointer and cannot be read: {error}")
                continue
            self.checked_states += 1
            if self._states.setdefault(name, state) != state:
                found.append(f"{name} is another state than in other runs")
        rows, torn = read_rows(run)
        for row in map(without_times, rows):
            if row not in self._rows:
                found.append(f"a row of metrics.jsonl is of no undisturbed run: {row}")
        if torn > 1:
            found.append(f"{torn} lines of metrics.jsonl are no JSON")
        found += self._wrong_json(run)
        for name, files in entries(cache).items():
            if files != self.entries.get(name):
                found.append(f"entry {name} of the trunk cache is not that of other runs")
        return found

    def unlike(self, run: Path, cache: Path, besides: str = ".none") -> list[str]:
        """Returns in what a finished run differs from the undisturbed one.

        Files of the ending `besides` may be more.
        """
        found = self.trusted_wrongly(run, cache)
        for which in KINDS:
            ours, theirs = (str(one / "checkpoints" / which) for one in (run, self.reference))
            if digest_of(ours) != digest_of(theirs):
                found.append(f"the {which} checkpoint is not that of the undisturbed run")
        rows, torn = read_rows(run)
        if torn or list(map(without_times, rows)) != self._rows:
            found.append("metrics.jsonl has not the rows of the undisturbed run")
        seconds = [row["seconds"] for row in rows]
        if seconds != sorted(seconds):
            found.append(f"the clock ran backwards: {seconds}")
        left, expected = files_left(run), files_left(self.reference)
        more = [name for name in (left - expected).elements() if not name.endswith(besides)]
        if more or expected - left:
            found.append(f"files too many: {more}, missing: {list(expected - left)}")
        if torn_files := unfinished(run, cache):
            found.append(f"left unfinished: {torn_files}")
        return found

    def _wrong_json(self, run: Path) -> list[str]:
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
                found.append(f"{name} is not that of other runs")
        return found


def read_rows(run: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the rows of metrics.jsonl, and how many lines are none."""
    file = run / "metrics.jsonl"
    rows, torn = [], 0
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            torn += 1
    return rows, torn


def pointed(run: Path) -> list[str]:
    """Returns the paths of all checkpoints that a run's pointer files name."""
    states = [tf.train.get_checkpoint_state(str(run / "checkpoints" / which)) for which in KINDS]
    return [path for state in states if state for path in state.all_model_checkpoint_paths]


def files_left(run: Path) -> collections.Counter[str]:
    """Counts a run's files but the event files by name, checkpoints whatever their step."""
    return collections.Counter(
        re.sub(r"step-\d+(-unvalidated)?", "step", str(file.relative_to(run)))
        for file in run.rglob("*")
        if file.is_file() and "events" not in file.parts
    )


def unfinished(*folders: Path) -> list[str]:
    """Returns the names of files and folders that are not written to the end."""
    return sorted(
        str(file.relative_to(folder))
        for folder in folders
        for file in folder.rglob("*")
        if re.search(r"^partial-|^partial$|\.partial$", file.name)
    )


def file_sizes(run: Path) -> list[tuple[Path, int]]:
    """Returns the files of a run and their bytes, also while it writes and removes some."""
    found = []
    for folder, _, names in os.walk(run):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                file = Path(folder, name)
                found.append((file, file.stat().st_size))
    return found


def event_bytes(run: Path) -> tuple[int, int]:
    """Returns how many event files a run has, and their bytes."""
    sizes = [size for file, size in file_sizes(run) if ".tfevents." in file.name]
    return len(sizes), sum(sizes)
