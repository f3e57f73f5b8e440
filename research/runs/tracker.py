"""`Tracker`: forwards a run's records, for example to an experiment tracker."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from research.system.errors import one_line
from research.system.python_file import load_from_file


class Tracker:
    """Receives a run's records. Subclass it in your own file; every method has a default.

    Give the subclass with `--tracker=FILE.py:Class`. It is constructed without arguments, in the
    process that keeps the run's records. Its first exception is reported in one line, and training
    continues without the tracker.
    """

    def begin(self, settings: Mapping[str, Any], folder: str) -> None:
        """Called before the first step, and again when a run is resumed.

        Args:
          settings: the run's settings by name, as in config.json.
          folder: path of the run's folder.
        """

    def interval(self, step: int, figures: Mapping[str, float]) -> None:
        """Called every few steps with the values since the last call, such as `loss`."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Called after each epoch and its validation with the row of metrics.jsonl."""

    def end(self, result: Mapping[str, Any]) -> None:
        """Called when a run is finished, with the content of result.json."""


class SafeTracker:
    """Forwards records to a tracker until the tracker raises an exception.

    Args:
      tracker: the tracker; None drops all records.
    """

    def __init__(self, tracker: Tracker | None) -> None:
        self._tracker = tracker

    def send(self, method: str, *arguments: Any) -> None:
        """Calls a method of the tracker."""
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*arguments)
        except Exception as error:  # user code may raise anything
            name, self._tracker = type(self._tracker).__name__, None
            _note_failure(f"{name} failed in {method}()", error)


def _note_failure(what: str, error: Exception) -> None:
    print(
        f"note: the tracker {what} ({type(error).__name__}: {one_line(error)}); training continues "
        "without it",
        file=sys.stderr,
        flush=True,
    )


def open_tracker(reference: str | None) -> SafeTracker:
    """Constructs the tracker given as FILE.py:Class, or one that drops all records for None.

    Raises:
      UserError: the file cannot be imported, or defines no such subclass of `Tracker`.
    """
    if reference is None:
        return SafeTracker(None)
    kind = load_from_file("tracker", reference, Tracker)
    try:
        return SafeTracker(kind())
    except Exception as error:  # user code may raise anything
        _note_failure(f"{kind.__name__} cannot be constructed", error)
        return SafeTracker(None)
