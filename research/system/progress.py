"""A progress bar over photos."""

from __future__ import annotations

import sys

import tqdm


def photo_bar(description: str, total: int | None = None) -> tqdm.tqdm:
    """Returns a bar that counts photos; hidden if standard error is not a terminal.

    Args:
      description: the text before the bar.
      total: number of photos; None if unknown.
    """
    return tqdm.tqdm(
        desc=description,
        total=total,
        unit=" photos",
        leave=False,
        ncols=79,
        disable=not sys.stderr.isatty(),
    )
