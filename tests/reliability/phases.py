"""Reports the current phase of a program through memory shared with the process that watches it.

python -m tests.reliability.phases FILE SCRIPT [--flag=value ...]     # runs a script, watched
"""

from __future__ import annotations

import functools
import mmap
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from research.system.environment import import_tensorflow
from tests.signalled import replace_function

# A module, a function in it (`name` or `Class.method`), and the phase in which it runs.
MARKS = (
    ("research.train", "set_up", "set-up"),
    ("research.train", "begin_or_resume", "set-up"),
    ("research.data.cache_store", "CacheStore.find_or_make", "trunk cache"),
    ("research.train", "Loop.train_epoch", "training"),
    ("research.loop.learner", "Learner.evaluate", "validation"),
    ("research.runs.checkpoints", "Checkpoints.save", "checkpoint"),
    ("research.runs.logbook", "Logbook.begin", "records"),
    ("research.runs.logbook", "Logbook.interval", "records"),
    ("research.runs.logbook", "Logbook.epoch", "records"),
    ("research.runs.logbook", "Logbook.end", "records"),
    ("research.evaluation.evaluate", "evaluate", "evaluation"),
    ("research.evaluation.one_run", "Evaluator._write", "evaluation files"),
    ("research.serving.export", "export", "export"),
    ("keras.export", "ExportArchive.write_out", "export files"),
)
START_UP = "start-up"  # the phase before and between the marks


class Phases:
    """The current phase of a watched program, and the number and duration of its phases.

    Args:
      file: shared by the program and the process that watches it; created if it is missing.
    """

    def __init__(self, file: Path) -> None:
        self.names = [START_UP, *dict.fromkeys(phase for _, _, phase in MARKS)]
        # The index of the current phase; then the entries of each phase; then its seconds.
        size = 8 * (1 + 2 * len(self.names))
        if not file.exists():
            file.write_bytes(bytes(size))
        with file.open("r+b") as shared:
            self._shared = memoryview(mmap.mmap(shared.fileno(), size)).cast("d")

    def mark_functions(self) -> None:
        """Makes the functions of MARKS in this process report their phase."""
        for module, path, phase in MARKS:
            replace_function(module, path, functools.partial(self._marked, phase=phase))

    def _marked(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        shared, number, phases = self._shared, self.names.index(phase), len(self.names)

        @functools.wraps(function)
        def marked(*arguments: Any, **named: Any) -> Any:
            before, begin = shared[0], time.monotonic()
            shared[0] = number
            shared[1 + number] += 1
            try:
                return function(*arguments, **named)
            finally:
                shared[0] = before
                shared[1 + phases + number] += time.monotonic() - begin

        return marked

    def reset(self) -> None:
        """Clears the counts of earlier programs."""
        for index in range(len(self._shared)):
            self._shared[index] = 0

    @property
    def current(self) -> str:
        """The phase of the program now, or when it ended."""
        return self.names[int(self._shared[0])]

    def entries(self, phase: str) -> int:
        """Returns the number of times that a phase was entered."""
        return int(self._shared[1 + self.names.index(phase)])

    def mean_seconds(self, phase: str) -> float:
        """Returns the mean duration of a phase; 0 if it never ended."""
        seconds = self._shared[1 + len(self.names) + self.names.index(phase)]
        return seconds / max(self.entries(phase), 1)


def main() -> None:
    """Runs a script as Python itself would, watched."""
    import_tensorflow()
    Phases(Path(sys.argv[1])).mark_functions()
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
