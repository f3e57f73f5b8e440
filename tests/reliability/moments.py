"""At which moments programs are killed: at any of their life, or within a phase of it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

from benchmarks.phases import Phases

IMPORTS = "imports"  # of a new Python, which tells nothing
ANY = "any moment"
# What a kill is aimed at, and how often.
AIMS = {
    "run_train.py": {
        ANY: 6,
        "checkpoint": 5,
        "trunk cache": 12,  # as long as there is none
        "training": 2,
        "validation": 2,
        "records": 2,
        IMPORTS: 1,
    },
    "run_eval.py": {ANY: 2, "evaluation files": 3},
    "run_export.py": {ANY: 2, "export files": 3},
}


class Moments:
    """Draws moments, of programs that run as long as they did undisturbed.

    Args:
      generator: draws.
      phases: of the program that runs.
    """

    def __init__(self, generator: random.Random, phases: Phases) -> None:
        self._random = generator
        self.phases = phases
        self._life: dict[str, float] = {}
        self._usual: dict[str, tuple[int, float]] = {}  # entries and mean seconds of each phase

    def learn(self, program: str, seconds: float) -> None:
        """Takes note of how long a program that has just ended took, and its phases."""
        self._life[program] = seconds
        for phase in self.phases.names:
            if entries := self.phases.entries(phase):
                self._usual[phase] = entries, self.phases.mean_seconds(phase)

    def draw(self, program: str, makes_cache: bool) -> tuple[str, Iterator[Callable[[], bool]]]:
        """Draws what to aim at.

        Args:
          program: the script.
          makes_cache: whether it has a trunk cache still to make.

        Returns:
          The aim; and what must have come about, one after another, once the program is started.
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
            seconds = 4.0 if aim == IMPORTS else self._life[program]
        deadline = time.monotonic() + self._random.uniform(0, seconds)
        yield lambda: time.monotonic() >= deadline
