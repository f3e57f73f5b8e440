"""`Tracker`: sends a run's records elsewhere, such as to an experiment tracker."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from research.system.errors import one_line
from research.system.python_file import load_from_file


class Tracker:
    """Receives a run's records. Subclass it in a file of your own; every method has a default.

    Give the subclass with `--tracker=FILE.py:Class`. It is built without arguments, in the process
    that keeps the run's records. An exception in it is told once; training goes on without it.
    """

    def begin(self, settings: Mapping[str, Any], folder: str) -> None:
        """Called before the first step, and again when a run is resumed.

        Args:
          settings: the run's settings by name, as in config.json.
          folder: of the run.
        """

    def interval(self, step: int, figures: Mapping[str, float]) -> None:
        """Called every few steps with figures since the last call, such as `loss`."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Called after each validation with the row of metrics.jsonl."""

    def end(self, result: Mapping[str, Any]) -> None:
        """Called once a run is finished, with the content of result.json."""


class SafeTracker(Tracker):
    """Passes records on to a tracker until it raises an exception for the first time.

    Args:
      tracker: None to drop all records.
    """

    def __init__(self, tracker: Tracker | None) -> None:
        self._tracker = tracker

    def begin(self, settings: Mapping[str, Any], folder: str) -> None:
        self._call("begin", settings, folder)

    def interval(self, step: int, figures: Mapping[str, float]) -> None:
        self._call("interval", step, figures)

    def epoch(self, row: Mapping[str, Any]) -> None:
        self._call("epoch", row)

    def end(self, result: Mapping[str, Any]) -> None:
        self._call("end", result)

    def _call(self, method: str, *arguments: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*arguments)
        except Exception as error:  # whatever somebody's tracker raises
            name, self._tracker = type(self._tracker).__name__, None
            print(
                f"note: the tracker {name} failed in {method}() ({type(error).__name__}: "
                f"{one_line(error)}); training goes on without it",
                file=sys.stderr,
                flush=True,
            )


def open_tracker(reference: str | None) -> SafeTracker:
    """Builds the tracker of a file, FILE.py:Class; None for none.

    Raises:
      UserError: the file cannot be imported or has no such subclass of `Tracker`.
    """
    return SafeTracker(load_from_file("tracker", reference, Tracker)() if reference else None)
