"""A progress bar over photos."""

from __future__ import annotations

import sys

import tqdm


def photo_bar(description: str, total: int | None = None) -> tqdm.tqdm:
    """Returns a bar that counts photos; it shows nothing where standard error is no terminal.

    Args:
      description: what is done to them.
      total: how many there are; None where that shows later.
    """
    return tqdm.tqdm(
        desc=description,
        total=total,
        unit=" photos",
        leave=False,
        ncols=79,
        disable=not sys.stderr.isatty(),
    )
