"""Whether training is to end before its end: the loop asks, signals and other workers answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from research.batches import Batch
from research.hosts.team import Team
from research.process.interruption import SIGNALS, Interrupted, Request


class Ending:
    """Whether this process, or another of its team, was asked to end by a signal.

    A process that trains alone ends after the step under way, or within a validation. The workers
    of a team wait for each other in every step: they end together, where all of them ask.

    Args:
      team: who trains.
      request: what this process was asked.
    """

    def __init__(self, team: Team, request: Request) -> None:
        self._team = team
        self._request = request

    def is_asked(self) -> bool:
        """Tells whether to end without a word to others; never in a team."""
        return self._team.cluster is None and self._request.is_made

    def signal(self, all_ask: bool) -> int | None:
        """Returns the signal to end by, None to go on.

        Args:
          all_ask: whether all workers of a team ask at this step; they go on if not.
        """
        if self._team.cluster is None:
            return self._request.number
        if not all_ask:
            return None
        asked = self._team.add_up([float(self._request.number == number) for number in SIGNALS])
        return next((number for number, by in zip(SIGNALS, asked, strict=True) if by), None)

    def until_asked(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yields batches; raises `Interrupted` instead of the next one where asked to end."""
        for batch in batches:
            if self.is_asked():
                raise Interrupted(self._request.number or 0)
            yield batch
