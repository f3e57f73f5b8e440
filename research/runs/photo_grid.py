"""Draws photos with titles in a grid, with Pillow: Matplotlib takes half a second longer."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from research.data.source import classes_of

# In pixels.
CELL_SIDE, PHOTO_SIDE = 220, 202
LINE_HEIGHT, FONT_SIZE, GAP = 16, 12.5, 6


def plain(text: str, longest: int | None = None) -> str:
    """Replaces unprintable characters in a name by `?`, and keeps at most its last characters."""
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return shown if longest is None or len(shown) <= longest else f"...{shown[3 - longest :]}"


def label_title(class_names: Sequence[str], label: Any) -> str:
    """Returns the class names of a label, or the label itself if it names no classes.

    Args:
      class_names: by label.
      label: a class index, an array with a 0 or 1 per class, or another value of the source.
    """
    classes = classes_of(label, len(class_names))
    if classes is None:
        return str(label)
    if np.ndim(label) == 0:
        return class_names[classes[0]]
    return shortened([class_names[k] for k in classes]) if classes else "(no label)"


def labelled_grid(photos: Iterable[tuple[np.ndarray, Any]], class_names: Sequence[str]) -> bytes:
    """Draws photos with their labels and shapes as titles; see `label_title` and `photo_grid`."""
    return photo_grid(
        [(photo, f"{label_title(class_names, label)}\n{photo.shape}") for photo, label in photos]
    )


def shortened(names: Sequence[str], longest: int = 26) -> str:
    """Returns names in one line of at most `longest` characters: "cat, dog, +3" for five names."""
    for count in range(len(names), 0, -1):
        rest = [f"+{len(names) - count}"] if count < len(names) else []
        line = ", ".join([*map(plain, names[:count]), *rest])
        if len(line) <= longest:
            return line
    rest = [f"+{len(names) - 1}"] if len(names) > 1 else []
    return ", ".join([plain(names[0], longest - sum(len(one) + 2 for one in rest)), *rest])


def photo_grid(photos: Sequence[tuple[np.ndarray, str]], columns: int = 5) -> bytes:
    """Draws photos in a grid, each below its title.

    Args:
      photos: pairs of a uint8 RGB photo, shape (height, width, 3), and a title of some lines.
      columns: number of photos per row.

    Returns:
      The content of a PNG file.
    """
    rows = max(1, math.ceil(len(photos) / columns))
    lines = max((title.count("\n") + 1 for _, title in photos), default=1)
    title_height = LINE_HEIGHT * lines + 2 * GAP
    row_height = title_height + CELL_SIDE
    grid = Image.new("RGB", (CELL_SIDE * columns, row_height * rows), "white")
    canvas, font = ImageDraw.Draw(grid), _font()
    for index, (photo, title) in enumerate(photos):
        row, column = divmod(index, columns)
        scale = PHOTO_SIDE / max(photo.shape[:2])
        height, width = (max(1, round(scale * side)) for side in photo.shape[:2])
        center = column * CELL_SIDE + CELL_SIDE // 2
        top = row * row_height + title_height + (CELL_SIDE - height) // 2
        # The pixels of a tiny photo are shown as squares.
        resample = Image.Resampling.NEAREST if scale > 3 else Image.Resampling.BICUBIC
        drawn = Image.fromarray(photo).resize((width, height), resample, reducing_gap=2.0)
        grid.paste(drawn, (center - width // 2, top))
        for below, line in enumerate(reversed(title.split("\n"))):
            place = center, top - GAP - LINE_HEIGHT * below
            canvas.text(place, plain(line), "black", font, anchor="md")
    buffer = io.BytesIO()
    grid.save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def _font() -> ImageFont.FreeTypeFont:
    """Returns the font of Matplotlib's pictures, which is in its package."""
    found = importlib.util.find_spec("matplotlib")
    assert found is not None and found.origin is not None
    fonts = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf"
    return ImageFont.truetype(fonts / "DejaVuSans.ttf", FONT_SIZE)
