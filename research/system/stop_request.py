"""`StopRequest`: whether to stop training, because this or another worker received a signal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from research.system.interruption import SIGNALS, Interrupted, Request
from research.system.team import Team

T = TypeVar("T")


class StopRequest:
    """Whether this process, or another worker, received a signal that asks it to stop.

    A process that trains alone stops after the current step, or within a validation. Workers wait
    for each other in every step: they stop together, at a step where all of them check.

    Args:
      team: this process and the other workers.
      request: the request made by a signal to this process.
    """

    def __init__(self, team: Team, request: Request) -> None:
        self._team = team
        self._request = request

    def is_asked(self) -> bool:
        """Returns whether a process that trains alone must stop; False for several workers."""
        return self._team.cluster is None and self._request.number is not None

    def signal(self, all_ask: bool) -> int | None:
        """Returns the signal to stop for; None to continue.

        Args:
          all_ask: whether all workers check at this step; if not, several workers continue.
        """
        if self._team.cluster is None:
            return self._request.number
        if not all_ask:
            return None
        asked = self._team.add_up([float(self._request.number == number) for number in SIGNALS])
        return next((number for number, by in zip(SIGNALS, asked, strict=True) if by), None)

    def until_asked(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields batches. After a stop request it raises `Interrupted` instead of the next one."""
        for batch in batches:
            if self.is_asked():
                raise Interrupted(self._request.number or 0)
            yield batch
