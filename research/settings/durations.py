"""Parses durations, step ranges and shares, such as '0.5epochs', '20:30' and '80/10/10'."""

from __future__ import annotations

import re

from research.system.errors import UserError


def parse_steps(text: str | None) -> range:
    """Returns the steps from A to B for the text 'A:B', counted from 1. None gives an empty range.

    Raises:
      UserError: the text does not have this form.
    """
    if text is None:
        return range(0)
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if found is None or not 0 < int(found[1]) <= int(found[2]):
        raise UserError(
            f"profile_steps is {text!r}; expected the first and last step as A:B, counted from 1, "
            "such as 20:30"
        )
    return range(int(found[1]), int(found[2]) + 1)


def count_steps(duration: str, steps_per_epoch: int) -> int:
    """Returns the number of steps in a duration such as '100steps' or '0.5epochs'.

    Raises:
      UserError: the text is not a duration.
    """
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?(step|epoch)s?", duration)
    if found is None or (found[2] == "step" and "." in found[1]):
        raise UserError(
            f"warmup is {duration!r}; expected a number and a unit, such as 100steps or 0.5epochs"
        )
    return round(float(found[1]) * (steps_per_epoch if found[2] == "epoch" else 1))


def parse_shares(text: str) -> tuple[int, int, int]:
    """Returns the percentages of train, validation and test in a text such as '80/10/10'.

    Raises:
      UserError: these are not three whole numbers that sum to 100, or there is nothing to train on.
    """
    found = re.fullmatch(r"(\d{1,3})/(\d{1,3})/(\d{1,3})", text)
    shares = tuple(map(int, found.groups())) if found else (0, 0, 0)
    if sum(shares) != 100 or not shares[0]:
        raise UserError(
            f"split is {text!r}; expected three percentages that sum to 100, for training, "
            "validation and test, such as 80/10/10 or 90/10/0"
        )
    return shares[0], shares[1], shares[2]
