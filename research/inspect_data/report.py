"""Reports an inspection as text, as JSON and as figures."""

from __future__ import annotations

import collections
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from research.data.decode import decode_image
from research.data.loader import DataLoader
from research.data.source import SPLITS, Source
from research.data.thread_pool import pillow_warnings_hidden
from research.inspect_data.fingerprints import MAX_PAIRS
from research.inspect_data.inspect import KINDS, LOOKS_ALIKE, Duplicate, Inspection, Photo
from research.runs.photo_grid import labelled_grid, photo_grid
from research.tasks.labels import joined

WIDTH = 80
MAX_SHOWN = 10  # entries per list; the JSON holds all
MAX_CLASSES = 40  # in the table of the classes
SAMPLE_PHOTOS = 20
GRID_DUPLICATES = 12
MAX_SIDE = 320  # of a duplicate in the figure, in pixels


def report(inspection: Inspection) -> str:
    """Returns a text with lines of at most 80 characters. The last line is a summary."""
    found = inspection.duplicates
    leaks = [duplicate for duplicate in found if duplicate.is_leak]
    contradictions = [duplicate for duplicate in found if duplicate.is_contradiction]
    others = [one for one in found if not one.is_leak and not one.is_contradiction]
    summary = [
        _count(len(inspection.photos), "photo"),
        f"{len(inspection.damaged):,} damaged",
        _count(len(found), "duplicate"),
        _count(len(leaks), "leak"),
        _count(len(contradictions), "contradiction"),
    ]
    sections = [
        _photos(inspection),
        _sizes(inspection.usable),
        _damaged(inspection.damaged),
        _duplicates(inspection),
        _listed("Leaks: one photo in several splits", inspection, leaks),
        _listed("Contradictions: one photo, several labels", inspection, contradictions),
        _listed("Other duplicates, within a split", inspection, others),
        [", ".join(summary)],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _label_text(inspection: Inspection, photo: Photo) -> str:
    return joined(inspection.class_names[label] for label in photo.labels)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _photos(inspection: Inspection) -> list[str]:
    counts = collections.Counter(
        (label, photo.split) for photo in inspection.usable for label in photo.labels
    )
    damaged = collections.Counter(photo.split for photo in inspection.damaged)
    rows = [
        (name, [counts[label, split] for split in SPLITS])
        for label, name in enumerate(inspection.class_names)
    ]
    left_out = len(rows) - MAX_CLASSES
    if left_out > 0:
        rows = sorted(rows, key=lambda row: sum(row[1]))[:MAX_CLASSES]
    usable = collections.Counter(photo.split for photo in inspection.usable)
    rows.append(("all", [usable[split] for split in SPLITS]))
    rows.append(("damaged", [damaged[split] for split in SPLITS]))
    lines = ["Photos", _columns("class", *SPLITS, "all")]
    lines += [_columns(name, *(f"{n:,}" for n in (*row, sum(row)))) for name, row in rows]
    if left_out > 0:
        lines.append(f"  ... and {left_out:,} more classes, which do not have fewer photos")
    return lines


def _sizes(photos: Sequence[Photo]) -> list[str]:
    if not photos:
        return []
    width, height = np.array([(photo.width, photo.height) for photo in photos]).T
    lines = ["Sizes in pixels", _columns("", "minimum", "median", "maximum")]
    for name, values, form in [
        ("width", width, "{:,.0f}"),
        ("height", height, "{:,.0f}"),
        ("width / height", width / height, "{:.2f}"),
    ]:
        figures = (values.min(), np.median(values), values.max())
        lines.append(_columns(name, *(form.format(figure) for figure in figures)))
    return lines


def _damaged(photos: Sequence[Photo]) -> list[str]:
    if not photos:
        return []
    reasons = collections.Counter(str(photo.damage) for photo in photos)
    lines = ["Damaged: skipped in training"]
    for reason, count in reasons.most_common(MAX_SHOWN):
        lines.append(f"  {count:>6,}  {_shorten(reason, 70)}")
    lines += _and_more(len(reasons), "reasons")
    for photo in photos[:MAX_SHOWN]:
        reason = _shorten(str(photo.damage), 46)
        lines.append(f"  {_shorten(photo.name, WIDTH - 4 - len(reason))}: {reason}")
    return lines + _and_more(len(photos), "photos")


def _duplicates(inspection: Inspection) -> list[str]:
    lines = ["Duplicates", _columns("", "within a split", "across splits")]
    for kind in KINDS:
        of_kind = [found for found in inspection.duplicates if found.kind == kind]
        leaks = sum(found.is_leak for found in of_kind)
        lines.append(_columns(kind, f"{len(of_kind) - leaks:,}", f"{leaks:,}"))
    if inspection.is_cut:
        lines.append(f"  only the first {MAX_PAIRS:,} that look alike; give a lower --distance")
    return lines


def _listed(title: str, inspection: Inspection, found: Sequence[Duplicate]) -> list[str]:
    if not found:
        return []
    lines = [title]
    for duplicate in found[:MAX_SHOWN]:
        distance = f", {duplicate.distance} bits differ" if duplicate.kind == LOOKS_ALIKE else ""
        lines.append(f"  {duplicate.kind}{distance}")
        for photo in duplicate.photos[:MAX_SHOWN]:
            label = _shorten(_label_text(inspection, photo), 20)
            name = _shorten(photo.name, WIDTH - 19 - len(label))
            lines.append(f"    {photo.split:<10}  {name} ({label})")
        lines += ["  " + line for line in _and_more(len(duplicate.photos), "photos")]
    return lines + _and_more(len(found), "findings")


def _and_more(count: int, noun: str) -> list[str]:
    """Returns a line for the entries that are not shown, if there are any."""
    rest = count - MAX_SHOWN
    return [f"  ... and {rest:,} more {noun}, which --out=DIR writes to disk"] if rest > 0 else []


def _columns(name: str, *cells: str) -> str:
    return f"  {_shorten(name, 20):<20}" + "".join(f"{cell:>14}" for cell in cells)


def _shorten(text: str, width: int) -> str:
    """Returns a text of at most `width` characters; the middle of a longer text is left out."""
    if len(text) <= width:
        return text
    end = (width - 3) // 2
    return f"{text[: width - 3 - end]}...{text[len(text) - end :]}"


def as_json(inspection: Inspection) -> str:
    """Returns the whole inspection: all photos, damaged ones with reasons, and all duplicates."""

    def describe(photo: Photo) -> dict[str, Any]:
        size = {"width": photo.width, "height": photo.height}
        state = size if photo.damage is None else {"damage": photo.damage}
        label = _label_text(inspection, photo)
        return {"split": photo.split, "name": photo.name, "label": label, **state}

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


def sample_grid(source: Source) -> bytes:
    """Draws some training photos with their labels and shapes, as at the start of a run.

    Returns:
      The content of a PNG file.
    """
    drawn = DataLoader(source=source).get_random_raw_images(SAMPLE_PHOTOS)
    return labelled_grid(drawn, source.class_names)


def duplicate_grid(source: Source, inspection: Inspection) -> bytes | None:
    """Draws two photos of each duplicate, leaks first.

    Returns:
      The content of a PNG file; None without duplicates.
    """
    found = sorted(inspection.duplicates, key=lambda one: (not one.is_leak, -one.distance))
    shown = [photo for duplicate in found[:GRID_DUPLICATES] for photo in duplicate.photos[:2]]
    if not shown:
        return None
    pixels = {}
    for split in SPLITS:
        places = {photo.place for photo in shown if photo.split == split}
        last = max(places, default=-1)
        for place, example in zip(range(last + 1), source.examples(split), strict=False):
            if place in places:
                with pillow_warnings_hidden():
                    image = Image.fromarray(decode_image(example.image))
                image.thumbnail((MAX_SIDE, MAX_SIDE))
                pixels[split, place] = np.asarray(image)

    def title(photo: Photo) -> str:
        label = _label_text(inspection, photo)
        return f"{_shorten(label, 30)}, {photo.split}\n{_shorten(photo.name, 32)}"

    return photo_grid(
        [(pixels[photo.split, photo.place], title(photo)) for photo in shown], columns=4
    )
