"""What was found in a data set, as text for people and as JSON for programs."""

from __future__ import annotations

import collections
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from research.data.source import SPLITS
from research.inspect_data.duplicates import PAIRS_AT_MOST
from research.inspect_data.inspect import KINDS, LOOKS_ALIKE, Duplicate, Inspection, Photo

WIDTH = 80
MOST_SHOWN = 10  # of each kind of finding; the JSON has all


def report(inspection: Inspection) -> str:
    """Returns all sections, and the counts in the last line; no line is longer than 80 letters."""
    within = [d for d in inspection.duplicates if not d.is_leak and not d.is_contradiction]
    sections = [
        _photos(inspection),
        _sizes(inspection),
        _damaged(inspection.damaged),
        _duplicates(inspection),
        _listed("Leaks: one photo in several splits", inspection, inspection.leaks),
        _listed("Contradictions: one photo, several labels", inspection, inspection.contradictions),
        _listed("Other duplicates, within a split", inspection, within),
        [summary(inspection)],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def summary(inspection: Inspection) -> str:
    """Returns the counts in a line."""
    counts = {
        "photo": inspection.photos,
        "duplicate": inspection.duplicates,
        "leak": inspection.leaks,
        "contradiction": inspection.contradictions,
    }
    counted = [
        f"{len(found):,} {noun}{'' if len(found) == 1 else 's'}" for noun, found in counts.items()
    ]
    return ", ".join([counted[0], f"{len(inspection.damaged):,} damaged", *counted[1:]])


def _photos(inspection: Inspection) -> list[str]:
    counts = collections.Counter((photo.label, photo.split) for photo in inspection.usable)
    damaged = collections.Counter(photo.split for photo in inspection.damaged)
    rows = {
        name: [counts[label, split] for split in SPLITS]
        for label, name in enumerate(inspection.class_names)
    }
    everything = [sum(row[index] for row in rows.values()) for index, _ in enumerate(SPLITS)]
    lines = ["Photos", _columns("class", *SPLITS, "all")]
    for name, row in [
        *rows.items(),
        ("all", everything),
        ("damaged", [damaged[split] for split in SPLITS]),
    ]:
        lines.append(_columns(name, *(f"{count:,}" for count in (*row, sum(row)))))
    return lines


def _sizes(inspection: Inspection) -> list[str]:
    if not inspection.usable:
        return []
    sizes = np.array([(photo.width, photo.height) for photo in inspection.usable])
    measured = {
        "width": (sizes[:, 0], "{:,.0f}"),
        "height": (sizes[:, 1], "{:,.0f}"),
        "width / height": (sizes[:, 0] / sizes[:, 1], "{:.2f}"),
    }
    lines = ["Sizes in pixels", _columns("", "least", "median", "greatest")]
    for name, (values, form) in measured.items():
        figures = (values.min(), np.median(values), values.max())
        lines.append(_columns(name, *(form.format(figure) for figure in figures)))
    return lines


def _damaged(photos: Sequence[Photo]) -> list[str]:
    if not photos:
        return []
    reasons = collections.Counter(photo.damage for photo in photos)
    lines = ["Damaged: skipped in training"]
    lines += [
        f"  {count:>6,}  {shorten(str(reason), 70)}"
        for reason, count in reasons.most_common(MOST_SHOWN)
    ]
    lines += [_and_more(len(reasons), "reasons")] if len(reasons) > MOST_SHOWN else []
    for photo in photos[:MOST_SHOWN]:
        reason = shorten(str(photo.damage), 46)
        lines.append(f"  {shorten(photo.name, WIDTH - 4 - len(reason))}: {reason}")
    return lines + ([_and_more(len(photos), "photos")] if len(photos) > MOST_SHOWN else [])


def _duplicates(inspection: Inspection) -> list[str]:
    lines = ["Duplicates", _columns("", "within a split", "across splits")]
    for kind in KINDS:
        of_kind = [found for found in inspection.duplicates if found.kind == kind]
        leaks = sum(found.is_leak for found in of_kind)
        lines.append(_columns(kind, f"{len(of_kind) - leaks:,}", f"{leaks:,}"))
    if inspection.is_cut:
        lines.append(f"  only the first {PAIRS_AT_MOST:,} that look alike; give a lower --distance")
    return lines


def _listed(title: str, inspection: Inspection, found: Sequence[Duplicate]) -> list[str]:
    if not found:
        return []
    lines = [title]
    for duplicate in found[:MOST_SHOWN]:
        kind = duplicate.kind
        if kind == LOOKS_ALIKE:
            kind += f", {duplicate.distance} bits differ"
        lines.append(f"  {kind}")
        for photo in duplicate.photos[:MOST_SHOWN]:
            label = shorten(inspection.class_names[photo.label], 20)
            name = shorten(photo.name, WIDTH - 19 - len(label))
            lines.append(f"    {photo.split:<10}  {name} ({label})")
        if len(duplicate.photos) > MOST_SHOWN:
            lines.append("  " + _and_more(len(duplicate.photos), "photos"))
    return lines + ([_and_more(len(found), "findings")] if len(found) > MOST_SHOWN else [])


def _and_more(count: int, noun: str) -> str:
    return f"  ... and {count - MOST_SHOWN:,} more {noun}, which --out=DIR writes down"


def _columns(name: str, *cells: str) -> str:
    return f"  {shorten(name, 20):<20}" + "".join(f"{cell:>14}" for cell in cells)


def shorten(text: str, width: int) -> str:
    """Returns a text of at most so many letters, without its middle where it is longer."""
    if len(text) <= width:
        return text
    end = (width - 3) // 2
    return f"{text[: width - 3 - end]}...{text[len(text) - end :]}"


def as_json(inspection: Inspection) -> str:
    """Returns everything that was found: all photos, damaged ones with reasons, all duplicates."""

    def describe(photo: Photo) -> dict[str, Any]:
        label = inspection.class_names[photo.label]
        described = {"split": photo.split, "name": photo.name, "label": label}
        if photo.damage is not None:
            return {**described, "damage": photo.damage}
        return {**described, "width": photo.width, "height": photo.height}

    found = {
        "classes": inspection.class_names,
        "photos": [describe(photo) for photo in inspection.usable],
        "damaged": [describe(photo) for photo in inspection.damaged],
        "duplicates": [
            {
                "kind": duplicate.kind,
                "distance": duplicate.distance,
                "is_leak": duplicate.is_leak,
                "is_contradiction": duplicate.is_contradiction,
                "photos": [describe(photo) for photo in duplicate.photos],
            }
            for duplicate in inspection.duplicates
        ],
        "duplicates_are_complete": not inspection.is_cut,
    }
    return json.dumps(found, indent=1) + "\n"
