"""`StopRequest`: whether to stop training early, because of a signal to this or another worker."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from research.system.interruption import SIGNALS, Interrupted, Request
from research.system.team import Team

T = TypeVar("T")


class StopRequest:
    """Whether this process, or another of its team, received a signal that asks it to stop.

    A process that trains alone stops after the current step, or within a validation. The workers of
    a team wait for each other in every step: they stop together, at a step where all of them check.

    Args:
      team: this process and those that train with it.
      request: the signal that this process received, if any.
    """

    def __init__(self, team: Team, request: Request) -> None:
        self._team = team
        self._request = request

    def is_asked(self) -> bool:
        """Tells whether to stop without asking others; never in a team."""
        return self._team.cluster is None and self._request.is_made

    def signal(self, all_ask: bool) -> int | None:
        """Returns the signal to stop for, None to go on.

        Args:
          all_ask: whether all workers of a team check at this step; they go on if not.
        """
        if self._team.cluster is None:
            return self._request.number
        if not all_ask:
            return None
        asked = self._team.add_up([float(self._request.number == number) for number in SIGNALS])
        return next((number for number, by in zip(SIGNALS, asked, strict=True) if by), None)

    def until_asked(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields batches; raises `Interrupted` instead of the next one once asked to stop."""
        for batch in batches:
            if self.is_asked():
                raise Interrupted(self._request.number or 0)
            yield batch
