"""Durations and stretches of steps as a user writes them, such as '0.5epochs' and '20:30'."""

from __future__ import annotations

import re

from research.system.errors import UserError


def parse_steps(text: str | None) -> range:
    """Returns the steps, counted from 1, that 'A:B' means; none for None.

    Raises:
      UserError: the text is none such.
    """
    if text is None:
        return range(0)
    first, _, last = text.partition(":")
    digits = first.isdecimal() and last.isdecimal() and len(first) < 10 and len(last) < 10
    if not digits or not 0 < int(first) <= int(last):
        raise UserError(
            f"profile_steps is {text!r}; expected two steps as A:B, counted from 1, such as 20:30"
        )
    return range(int(first), int(last) + 1)


def count_steps(duration: str, steps_per_epoch: int) -> int:
    """Returns the steps that a duration such as '100steps' or '0.5epochs' means.

    Raises:
      UserError: the text is none such.
    """
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?(step|epoch)s?", duration)
    if found is None or (found[2] == "step" and "." in found[1]):
        raise UserError(
            f"warmup is {duration!r}; expected a number and its unit, as in 100steps or 0.5epochs"
        )
    return round(float(found[1]) * (steps_per_epoch if found[2] == "epoch" else 1))
