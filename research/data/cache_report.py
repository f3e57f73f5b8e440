"""Lists the entries of the photo cache and of the trunk cache, and removes some of them."""

from __future__ import annotations

import collections
import json
import time
from collections.abc import Sequence
from pathlib import Path

from research.data.cache_store import (
    Entry,
    entries_of,
    remove_entries,
    surplus_entries,
    unused_entries,
)
from research.data.photo_cache import PHOTOS_FOLDER, cache_folder


def tidy(
    folder: str | None, unused_days: float | None = None, keep_gigabytes: float | None = None
) -> None:
    """Removes entries, if requested, and prints a table of the others.

    Args:
      folder: of the caches. None for the user's cache folder.
      unused_days: removes the entries that no run used in the last days.
      keep_gigabytes: removes the least recently used entries until the others take at most so much.
    """
    root = cache_folder(folder)
    entries = _entries(root)
    removed = 0
    if unused_days is not None:
        removed += remove_entries(unused_entries(entries, unused_days))
    if keep_gigabytes is not None:
        removed += remove_entries(surplus_entries(_entries(root), keep_gigabytes * 1e9))
    if removed or (unused_days, keep_gigabytes) != (None, None):
        print(f"removed {_megabytes(removed)}")
    print("\n".join(table(root, _entries(root))))


def table(root: Path, entries: Sequence[Entry]) -> list[str]:
    """Returns a line for each kind of entry, the most recently used first, and their sum."""
    groups: dict[str, list[Entry]] = collections.defaultdict(list)
    for entry in reversed(entries):
        # A split is kept in several entries.
        made_from = {name: value for name, value in entry.made_from.items() if name != "first"}
        groups[json.dumps(made_from, sort_keys=True)].append(entry)
    total = f"{_megabytes(sum(entry.size for entry in entries))} in {root}"
    if not entries:
        return [total]
    lines = [f"{'kept':<14}{'photos':>12}{'pixels':>8}{'size':>14}   last used"]
    for found in groups.values():
        kept, photos, pixels = (
            str(found[0].made_from.get(name, "-")) for name in ("kept", "photos", "size")
        )
        days = (time.time() - max(entry.used for entry in found)) / 86400
        used = "today" if days < 1 else f"{days:.0f} days ago"
        count = f"{int(photos):,}" if photos.isdigit() else photos
        size = _megabytes(sum(entry.size for entry in found))
        lines.append(f"{kept[:13]:<14}{count:>12}{pixels[:7]:>8}{size:>14}   {used}")
    return [*lines, total]


def _entries(root: Path) -> list[Entry]:
    found = [*entries_of(root), *entries_of(root / PHOTOS_FOLDER)]
    return sorted(found, key=lambda entry: entry.used)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
