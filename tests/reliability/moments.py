"""Draws the moments at which programs are killed: at any time, or within a given phase."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

from tests.reliability.phases import Phases

IMPORTS = "imports"  # in a new Python process, which does not report its phase
ANY = "any moment"
# The phases to kill each program in, with their relative frequencies.
AIMS = {
    "run_train.py": {
        ANY: 6,
        "checkpoint": 5,
        "trunk cache": 12,  # only while the cache is incomplete
        "training": 2,
        "validation": 2,
        "records": 2,
        IMPORTS: 1,
    },
    "run_eval.py": {ANY: 2, "evaluation files": 3},
    "run_export.py": {ANY: 2, "export files": 3},
}


class Moments:
    """Draws moments for kills, from the durations of undisturbed programs.

    Args:
      generator: source of random numbers.
      phases: of the running program.
    """

    def __init__(self, generator: random.Random, phases: Phases) -> None:
        self._random = generator
        self.phases = phases
        self._seconds: dict[str, float] = {}  # duration of each program
        self._usual: dict[str, tuple[int, float]] = {}  # entries and mean seconds of each phase

    def learn(self, program: str, seconds: float) -> None:
        """Stores the duration and the phases of an undisturbed program that has just ended."""
        self._seconds[program] = seconds
        for phase in self.phases.names:
            if entries := self.phases.entries(phase):
                self._usual[phase] = entries, self.phases.mean_seconds(phase)

    def draw(self, program: str, makes_cache: bool) -> tuple[str, Iterator[Callable[[], bool]]]:
        """Draws the phase to kill a program in.

        Args:
          program: the script.
          makes_cache: whether the program still has to build its trunk cache.

        Returns:
          The phase, and the conditions to wait for, one after the other, once the program has
          started. The iterator is lazy, as the times count from the previous condition.
        """
        possible = {ANY, IMPORTS, *self._usual}
        if not makes_cache:
            possible.discard("trunk cache")
        aims = {aim: often for aim, often in AIMS[program].items() if aim in possible}
        (aim,) = self._random.choices(list(aims), list(aims.values()))
        return aim, self._until(aim, program)

    def _until(self, aim: str, program: str) -> Iterator[Callable[[], bool]]:
        if aim in self._usual:
            entries, seconds = self._usual[aim]
            wanted = self._random.randint(1, max(1, entries // 2))
            yield lambda: self.phases.entries(aim) >= wanted
            seconds *= 1.2
        else:
            seconds = 4.0 if aim == IMPORTS else self._seconds[program]
        deadline = time.monotonic() + self._random.uniform(0, seconds)
        yield lambda: time.monotonic() >= deadline
