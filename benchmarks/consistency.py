"""What a run's folder must be at any moment, and how it must end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from research.environment import import_tensorflow

import_tensorflow()  # before others do, and without what that prints

import tensorflow as tf  # noqa: E402

from tests.helpers import read_checkpoint  # noqa: E402

# What of a row of metrics.jsonl depends on the machine's speed.
TIMES = ("seconds", "photos_per_second", "share_of_step_waiting_for_input")


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """Returns what of a row, or of result.json, two equal runs have in common."""
    return {name: value for name, value in row.items() if name not in TIMES}


def digest_of(ckpt_dir: Path, which: str) -> str:
    """Hashes every tensor of a checkpoint but the time that the run took; checks their sums."""
    digest = hashlib.sha256()
    for name, value in sorted(read_checkpoint(ckpt_dir, which).items()):
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
        self._entries = entries(cache)
        self._rows = list(map(without_times, read_rows(reference)[0]))
        self._states: dict[int, str] = {}
        self._json: dict[str, Any] = {}
        self.checked_states = 0
        found = self.trusted_wrongly(reference, cache)
        if found:
            raise RuntimeError(f"the undisturbed run is not consistent: {found}")

    def trusted_wrongly(self, run: Path, cache: Path) -> list[str]:
        """Returns what a later run would trust and should not, at any moment, also after a kill."""
        found = []
        for which in ("latest", "best"):
            path = tf.train.latest_checkpoint(str(run / "checkpoints" / which))
            if path is None:
                continue
            try:
                state = digest_of(run, which)
            except Exception as error:  # whatever TensorFlow raises for a damaged file
                found.append(f"the pointer in {which} names {Path(path).name}: {error}")
                continue
            self.checked_states += 1
            if self._states.setdefault(int(path.rpartition("-")[2]), state) != state:
                found.append(f"{which}/{Path(path).name} is another state than in other runs")
        rows, torn = read_rows(run)
        for row in map(without_times, rows):
            if row not in self._rows:
                found.append(f"a row of metrics.jsonl is of no undisturbed run: {row}")
        if torn > 1:
            found.append(f"{torn} lines of metrics.jsonl are no JSON")
        found += self._wrong_json(run)
        for name, files in entries(cache).items():
            if files != self._entries.get(name):
                found.append(f"entry {name} of the trunk cache is not that of other runs")
        return found

    def unlike(self, run: Path, cache: Path, besides: str = ".none") -> list[str]:
        """Returns in what a finished run differs from the undisturbed one.

        Files of the ending `besides` may be more.
        """
        found = self.trusted_wrongly(run, cache)
        for which in ("latest", "best"):
            if digest_of(run, which) != digest_of(self.reference, which):
                found.append(f"the {which} checkpoint is not that of the undisturbed run")
        rows, torn = read_rows(run)
        if torn or list(map(without_times, rows)) != self._rows:
            found.append("metrics.jsonl has not the rows of the undisturbed run")
        seconds = [row["seconds"] for row in rows]
        if seconds != sorted(seconds):
            found.append(f"the clock ran backwards: {seconds}")
        ours, theirs = files_left(run, cache), files_left(self.reference, self.reference / "none")
        more = sorted(name for name in ours - theirs if not name.endswith(besides))
        if more:
            found.append(f"files left: {more}")
        if theirs - ours:
            found.append(f"files missing: {sorted(theirs - ours)}")
        return found

    def _wrong_json(self, run: Path) -> list[str]:
        found = []
        for file in run.rglob("*.json"):
            name = str(file.relative_to(run))
            text = file.read_text(encoding="utf-8").replace(str(run.parent), "")
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


def files_left(run: Path, cache: Path) -> set[str]:
    """Returns the names of a run's files but the event files, and of what is unfinished."""
    files = (file for file in run.rglob("*") if file.is_file() and not is_below(file, "events"))
    return {str(file.relative_to(run)) for file in files} | unfinished([run, cache])


def unfinished(folders: Iterable[Path]) -> set[str]:
    """Returns the names of files and folders below some folders that are not written to the end."""
    return {
        file.name
        for folder in folders
        for file in folder.rglob("*")
        if file.name.startswith("partial-")
        or file.name.endswith((".partial", "_temp"))
        or ".tempstate" in file.name
    }


def is_below(file: Path, folder: str) -> bool:
    """Tells whether one of the folders that a file lies in has this name."""
    return folder in file.parts


def event_bytes(run: Path) -> tuple[int, int]:
    """Returns how many event files a run has, and their bytes."""
    sizes = [file.stat().st_size for file in run.rglob("events.out.tfevents.*")]
    return len(sizes), sum(sizes)
