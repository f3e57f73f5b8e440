"""Pictures of a data set that was looked through: some of its photos, and its duplicates."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from research.data.decode import decode_image, oddities_ignored
from research.data.loader import DataLoader
from research.data.source import SPLITS, Source
from research.inspect_data.inspect import Inspection, Photo
from research.inspect_data.report import shorten
from research.runs.pictures import photo_grid

PHOTOS = 20
DUPLICATES = 12
SIDE = 320  # of a duplicate as drawn, in pixels, at most


def sample_grid(source: Source) -> Figure:
    """Draws some training photos, each with its label and its shape, as at a run's beginning."""
    loader = DataLoader(source=source)
    drawn = loader.get_random_raw_images(PHOTOS)
    return photo_grid(
        [(photo, f"{loader.get_label_name(label)}\n{photo.shape}") for photo, label in drawn]
    )


def duplicate_grid(source: Source, inspection: Inspection) -> Figure | None:
    """Draws two photos of each duplicate, first those across splits; None where there is none."""
    found = sorted(inspection.duplicates, key=lambda one: (not one.is_leak, -one.distance))
    pairs = [duplicate.photos[:2] for duplicate in found[:DUPLICATES]]
    if not pairs:
        return None
    wanted = {(photo.split, photo.place) for pair in pairs for photo in pair}
    pixels = {}
    for split in SPLITS:
        places = [place for of_split, place in wanted if of_split == split]
        last = max(places, default=-1)
        for place, example in zip(range(last + 1), source.examples(split), strict=False):
            if place in places:
                with oddities_ignored():
                    photo = Image.fromarray(decode_image(example.image))
                photo.thumbnail((SIDE, SIDE))
                pixels[split, place] = np.asarray(photo)

    def title(photo: Photo) -> str:
        label = inspection.class_names[photo.label]
        return f"{shorten(label, 30)}, {photo.split}\n{shorten(photo.name, 32)}"

    return photo_grid(
        [(pixels[photo.split, photo.place], title(photo)) for pair in pairs for photo in pair],
        columns=4,
    )
