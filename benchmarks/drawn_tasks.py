"""Tasks whose pictures a program draws: beetles (fine-grained), textures, and scans of typefaces.

The ablation uses them beside real photos, because their pictures differ from those of ImageNet in
other ways. Each is a source for `--source`, such as `--source=benchmarks/drawn_tasks.py:Beetles`.
A picture depends only on its class and number, so that all runs use the same pictures. What does
not define the class (colours, pose, scale, light) has the same distribution in all classes.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from research.data.built_in.drawing import (
    OVERSAMPLING,
    Pen,
    both_sides,
    choose_coat,
    draw_background,
    pick_colour,
    vary_light,
)
from research.data.source import Example, Source

SIDE = 160  # height and width of a picture in pixels
PER_CLASS = 100
DARK, PALE = bytes.fromhex("20201c 4a2c1a 16324a 5a1620"), bytes.fromhex("f0e4c0 d8c070 e8a060")


class DrawnSource(Source):
    """Pictures of a program, all in the split `train`; a benchmark divides them into folds.

    Subclasses define `class_names` and `draw`.
    """

    def draw(self, label: int, rng: np.random.Generator) -> Image.Image:
        """Draws a picture of a class, RGB of `SIDE` by `SIDE` pixels."""
        raise NotImplementedError

    def count(self, split: str) -> int:
        return PER_CLASS * len(self.class_names) if split == "train" else 0

    def examples(self, split: str) -> Iterator[Example]:
        for index in range(self.count(split)):
            label, number = index % len(self.class_names), index // len(self.class_names)
            picture = self.draw(label, np.random.default_rng((label, number)))
            file = io.BytesIO()
            picture.save(file, "png", compress_level=1)
            yield Example(file.getvalue(), label, f"{self.class_names[label]} {number:03}.png")


class Beetles(DrawnSource):
    """Eight species of beetles, which differ in three small details.

    They have two or three pairs of spots, clubbed or plain antennae, and a collar in the colour of
    the spots or of the wings.
    """

    class_names = tuple(
        f"{spots} {antennae} {collar}"
        for spots in ("two", "three")
        for antennae in ("plain", "clubbed")
        for collar in ("dark", "bright")
    )

    def draw(self, label: int, rng: np.random.Generator) -> Image.Image:
        spots, clubbed, bright = 2 + label // 4, label // 2 % 2, label % 2
        side = SIDE * OVERSAMPLING
        image = draw_background(side, side, rng)
        canvas = ImageDraw.Draw(image, "RGBA")
        coat = choose_coat(rng)
        wings, spot = pick_colour(DARK, rng, 20), pick_colour(PALE, rng, 20)
        if rng.random() < 0.5:
            wings, spot = spot, wings
        unit = side * rng.uniform(0.11, 0.15)
        middle = rng.uniform(0.42, 0.58, 2) * side
        pen = Pen(canvas, (middle[0], middle[1]), unit, rng.uniform(0, 2 * np.pi), 1, 3.0)
        for side_of in (-1, 1):
            for at, reach in ((-0.9, -0.7), (-0.1, 0.0), (0.7, 0.9)):
                knee = (side_of * rng.uniform(1.2, 1.5), at + 0.6 * reach)
                foot = (side_of * rng.uniform(1.6, 1.9), at + 1.3 * reach)
                pen.stroke([(side_of * 0.6, at), knee, foot], coat.line, 0.12)
            tip = (side_of * rng.uniform(0.8, 1.2), -rng.uniform(2.6, 2.9))
            pen.stroke([(side_of * 0.2, -1.8), (side_of * 0.7, -2.2), tip], coat.line, 0.08)
            if clubbed:
                pen.ellipse(*tip, (0.14, 0.14), coat.line)
        pen.ellipse(0, -1.75, (0.42, 0.35), wings, coat.line)
        pen.ellipse(0, -1.25, (0.75, 0.42), spot if bright else wings, coat.line)
        pen.blob(both_sides([(0.5, -1.2), (1.15, -0.4), (1.1, 1.0), (0.5, 1.9)]), wings, coat.line)
        pen.stroke([(0, -1.0), (0, 1.6)], coat.line, 0.05)
        radii = (rng.uniform(0.2, 0.28), rng.uniform(0.15, 0.21))
        for place in np.linspace(-0.45, 1.05, spots):
            shift = rng.uniform(-0.08, 0.08)
            for side_of in (-1, 1):
                pen.ellipse(side_of * 0.5, place + shift, radii, spot)
        return vary_light(image.resize((SIDE, SIDE), Image.Resampling.BOX), rng)


class Textures(DrawnSource):
    """Eight textures: only the statistics of the surface differ, no shape does."""

    class_names = (
        "blotches",
        "bricks",
        "cells",
        "fibres",
        "grains",
        "ripples",
        "scratches",
        "weave",
    )

    def draw(self, label: int, rng: np.random.Generator) -> Image.Image:
        heights = _surface(self.class_names[label], rng)
        low, high = np.percentile(heights, (2, 98))
        shares = np.clip((heights - low) / max(high - low, 1e-6), 0, 1)[..., None]
        first, second = (np.array(pick_colour(palette, rng, 40), float) for palette in (DARK, PALE))
        if rng.random() < 0.5:
            first, second = second, first
        # A low contrast, so that the colours of a picture tell little.
        second = first + (second - first) * rng.uniform(0.25, 0.8)
        pixels = first + (second - first) * shares
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        blurred = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.6)))
        return vary_light(blurred, rng)


def _surface(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Returns the heights of a texture, float (SIDE, SIDE), of any scale."""
    down, across = np.meshgrid(*[np.arange(SIDE, dtype=float)] * 2, indexing="ij")
    angle, period = rng.uniform(0, np.pi), rng.uniform(9, 26)
    along = across * np.cos(angle) + down * np.sin(angle)
    beside = down * np.cos(angle) - across * np.sin(angle)
    smooth = _noise(rng, period, period)
    along, beside = along + 3 * smooth, beside + 3 * _noise(rng, period, period)
    if kind == "blotches":
        return smooth + 0.3 * _noise(rng, period / 3, period / 3)
    if kind == "grains":
        return np.abs(smooth) ** 0.5
    if kind == "fibres":
        return _noise(rng, 3 * period, period / 4, angle)
    if kind == "ripples":
        return np.sin(2 * np.pi * (along + 0.25 * period * smooth) / period)
    if kind == "weave":
        over = np.sin(2 * np.pi * along / period) * np.sin(2 * np.pi * beside / period) > 0
        threads = [np.abs(np.sin(4 * np.pi * line / period)) for line in (along, beside)]
        return np.where(over, *threads)
    if kind == "bricks":
        rows = np.floor(beside / period)
        joint = np.minimum(beside % period, (along + period * (rows % 2)) % (2 * period))
        return np.minimum(joint, 3) + 0.3 * smooth
    if kind == "cells":
        count = int((SIDE / period) ** 2)
        centres = rng.uniform(-10, SIDE + 10, (count, 2))
        distances = np.full((2, SIDE, SIDE), np.inf)
        for y, x in centres:
            far = (down - y) ** 2 + (across - x) ** 2
            distances = np.sort(np.concatenate([distances, far[None]]), axis=0)[:2]
        return np.minimum(np.sqrt(distances[1]) - np.sqrt(distances[0]), 4)
    lines = Image.new("L", (SIDE, SIDE))
    canvas = ImageDraw.Draw(lines)
    for x, y, turn, length in rng.uniform(0, 1, (int(40_000 / period**2) + 20, 4)):
        lean = angle + 0.6 * (turn - 0.5)
        step = (1 + 3 * length) * period / 2
        ends = (x * SIDE, y * SIDE, x * SIDE + step * np.cos(lean), y * SIDE + step * np.sin(lean))
        canvas.line(ends, fill=int(120 + 130 * turn), width=1 + int(2 * length))
    return np.asarray(lines, float) + 10 * smooth


def _noise(rng: np.random.Generator, along: float, beside: float, angle: float = 0.0) -> np.ndarray:
    """Returns smooth noise of standard deviation 1, float (SIDE, SIDE).

    Args:
      rng: draws the noise.
      along: the wavelength in pixels along `angle`.
      beside: the wavelength at right angles to it.
      angle: in radians, from the horizontal.
    """
    down, across = np.meshgrid(np.fft.fftfreq(SIDE), np.fft.rfftfreq(SIDE), indexing="ij")
    first = across * np.cos(angle) + down * np.sin(angle)
    second = down * np.cos(angle) - across * np.sin(angle)
    radius = np.hypot(first * along, second * beside)
    spectrum = np.fft.rfft2(rng.standard_normal((SIDE, SIDE))) * np.exp(-2 * (radius - 0.7) ** 2)
    spectrum[0, 0] = 0
    noise = np.fft.irfft2(spectrum, (SIDE, SIDE))
    return noise / noise.std()


class Typefaces(DrawnSource):
    """Scans of a few lines of text in seven typefaces, all of about the same size."""

    class_names = (  # the names of their files; those with cm are TeX's Computer Modern
        "DejaVuSans",
        "DejaVuSansMono",
        "DejaVuSerif",
        "STIXGeneral",
        "cmr10",
        "cmss10",
        "cmtt10",
    )

    def draw(self, label: int, rng: np.random.Generator) -> Image.Image:
        side = 2 * SIDE
        paper, ink = int(rng.integers(215, 250)), int(rng.integers(15, 90))
        page = Image.new("L", (side, side), paper)
        canvas = ImageDraw.Draw(page)
        # The letter x has the same height in all typefaces: the size must not tell the class.
        _, highest, _, lowest = _typeface(self.class_names[label], 100).getbbox("x")
        size = round(100 * rng.uniform(19, 22) / (lowest - highest))
        font = _typeface(self.class_names[label], size)
        top = int(rng.integers(-40, 10))
        while top < side:
            line = " ".join(_word(rng) for _ in range(6))
            canvas.text((int(rng.integers(-60, 0)), top), line, fill=ink, font=font)
            top += int(rng.integers(52, 66))
        turned = page.rotate(rng.normal(0, 1.5), Image.Resampling.BICUBIC, fillcolor=paper)
        small = turned.resize((SIDE, SIDE), Image.Resampling.BOX)
        blurred = small.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.1)))
        return vary_light(blurred.convert("RGB"), rng)


@functools.cache
def _typeface(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Loads one of the typefaces that Matplotlib installs."""
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    return ImageFont.truetype(str(file), size)


def _word(rng: np.random.Generator) -> str:
    letters = rng.choice(list("abcdefghijklmnopqrstuvwxyz"), int(rng.integers(2, 9)))
    return "".join(letters)


DRAWN = {"beetles": Beetles, "textures": Textures, "typefaces": Typefaces}
