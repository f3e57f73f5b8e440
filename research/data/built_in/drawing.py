"""Drawing with Pillow: a pen with its own coordinates, colours, backgrounds and light.

The parts that drawings of cats and of dogs share. Nothing here depends on the class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

MARKINGS = ("plain", "stripes", "eye patch", "blaze")
OVERSAMPLING = 2  # drawings are made larger and averaged, because Pillow draws hard edges

Colour = tuple[int, ...]  # red, green, blue and optionally opacity, each in [0, 255]
Point = tuple[float, float]

# Palettes: three bytes (red, green, blue) per colour.
FUR = bytes.fromhex("e29448 3e3a3e 8e8e96 f0deba 865a38 f6f2ec c49868 686a78 b8683e")
IRISES = bytes.fromhex("c69e2e 70a24a 5c96c4 84542c d6b65c")
NOSES = bytes.fromhex("3a2e30 d67e80 744842")
BACKDROPS = bytes.fromhex(
    "a4d0e8 f6e2b2 c4deb2 eec0b4 cec4e4 78a0b2 e8e8e2 968674 689468 f6cc78 546280 be7468 80c4ba"
)
INNER_EAR, TONGUE, PUPIL = (232, 170, 164), (236, 118, 130), (24, 20, 26)
WHITE, SHADOW, LEAF = (255, 255, 255), (20, 20, 40), (60, 120, 50)


@dataclasses.dataclass(frozen=True)
class Coat:
    """The colours and the marking of one animal. They do not depend on its class."""

    fur: Colour
    patch: Colour
    light: Colour
    line: Colour
    iris: Colour
    nose: Colour
    marking: str


@dataclasses.dataclass(frozen=True)
class Pen:
    """Draws in head coordinates: the origin is the head's centre, the unit its radius, y is down.

    `origin`, `unit` (the head's radius) and `line_width` are in pixels, `angle` is in radians.
    `mirror` is -1 to flip horizontally, else 1.
    """

    canvas: ImageDraw.ImageDraw
    origin: Point
    unit: float
    angle: float
    mirror: int
    line_width: float

    def blob(self, corners: ArrayLike, fill: Colour, outline: Colour | None = None) -> None:
        """Fills a smooth closed shape given by the control polygon `corners`, shape (n, 2)."""
        self._fill(_smooth(corners, closed=True), fill, outline)

    def ellipse(
        self, x: float, y: float, radii: Point, fill: Colour, outline: Colour | None = None
    ) -> None:
        """Fills an ellipse around (x, y)."""
        self._fill(_regular_polygon(28) * radii + (x, y), fill, outline)

    def stroke(self, points: ArrayLike, colour: Colour, width: float) -> None:
        """Draws a smooth line along `points`, shape (n, 2); `width` is in head radii."""
        self._line(self._place(_smooth(points, closed=False)), colour, width * self.unit)

    def limb(self, points: ArrayLike, coat: Coat, width: float) -> None:
        """Draws a leg or a tail: a stroke with an outline."""
        self.stroke(points, coat.line, width + 2 * self.line_width / self.unit)
        self.stroke(points, coat.fur, width)

    def _fill(self, points: NDArray[np.float64], fill: Colour, outline: Colour | None) -> None:
        placed = self._place(points)
        self.canvas.polygon(placed, fill=fill)
        if outline is not None:
            self._line([*placed, placed[0]], outline, self.line_width)

    def _place(self, points: NDArray[np.float64]) -> list[Point]:
        x, y = points.T * [[self.unit * self.mirror], [self.unit]]
        cosine, sine = np.cos(self.angle), np.sin(self.angle)
        placed = np.stack([x * cosine - y * sine, x * sine + y * cosine], axis=1) + self.origin
        return [(across, down) for across, down in placed.tolist()]

    def _line(self, placed: list[Point], colour: Colour, width: float) -> None:
        thickness = max(1, round(width))
        self.canvas.line(placed, fill=colour, width=thickness)
        radius = (thickness - 1) / 2
        for x, y in placed:  # rounds the ends and the joints
            self.canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _regular_polygon(corners: int, start: float = 0.0) -> NDArray[np.float64]:
    """Returns the corners of a polygon on the unit circle, shape (corners, 2)."""
    turn = start + np.arange(corners) * (2 * np.pi / corners)
    return np.stack([np.cos(turn), np.sin(turn)], axis=1)


def _smooth(points: ArrayLike, closed: bool) -> NDArray[np.float64]:
    """Smooths a control polygon, shape (n, 2), by cutting its corners three times."""
    curve = np.asarray(points, dtype=np.float64)
    for _ in range(3):
        following = np.roll(curve, -1, axis=0)
        cut = np.stack([0.75 * curve + 0.25 * following, 0.25 * curve + 0.75 * following], axis=1)
        inner = cut.reshape(-1, 2)
        curve = inner if closed else np.concatenate([curve[:1], inner[:-2], curve[-1:]])
    return curve


def both_sides(right: Sequence[Point]) -> list[Point]:
    """Adds the left half to the right half of a symmetric outline, listed from top to bottom."""
    return [*right, *((-x, y) for x, y in reversed(right))]


def pick_colour(palette: bytes, rng: np.random.Generator, jitter: int = 8) -> Colour:
    """Returns a random colour of a palette, with each channel changed by at most `jitter`."""
    colour = rng.choice(np.frombuffer(palette, np.uint8).reshape(-1, 3))
    return tuple((colour + rng.integers(-jitter, jitter + 1, 3)).clip(0, 255).tolist())


def mix_colours(first: Colour, second: Colour, share: float) -> Colour:
    """Blends two colours; `share`, in [0, 1], is the weight of the second."""
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))


def choose_coat(rng: np.random.Generator) -> Coat:
    """Returns random colours and a random marking."""
    fur, patch, iris, nose = (pick_colour(palette, rng) for palette in (FUR, FUR, IRISES, NOSES))
    light = mix_colours(fur, WHITE, rng.uniform(0.35, 0.8))
    line = mix_colours(fur, SHADOW, rng.uniform(0.6, 0.9))
    return Coat(fur, patch, light, line, iris, nose, marking=str(rng.choice(MARKINGS)))


def draw_background(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Draws a gradient, translucent shapes and often a ground."""
    corners = np.asarray([[pick_colour(BACKDROPS, rng)] * 2 for _ in range(2)])
    corners += rng.integers(-30, 31, (2, 2, 1))
    four_pixels = Image.fromarray(corners.clip(0, 255).astype(np.uint8))
    image = four_pixels.resize((width, height), Image.Resampling.BILINEAR)
    canvas = ImageDraw.Draw(image, "RGBA")  # the mode RGBA blends translucent colours
    for _ in range(rng.integers(3, 12)):
        # Triangles, quadrilaterals and ellipses, so that a pointed shape alone does not mean a cat.
        centre, radii = rng.random(2) * (width, height), rng.uniform(0.05, 0.25, 2)
        turned = _regular_polygon(int(rng.choice((3, 4, 24))), start=rng.uniform(0, 2))
        placed = turned * radii * min(width, height) + centre
        colour = (*pick_colour(BACKDROPS, rng, 30), int(rng.integers(70, 200)))
        canvas.polygon([(x, y) for x, y in placed.tolist()], fill=colour)
    if rng.random() < 0.7:
        _draw_ground(canvas, width, height, rng)
    return image


def _draw_ground(
    canvas: ImageDraw.ImageDraw, width: int, height: int, rng: np.random.Generator
) -> None:
    """Draws a lawn or a floor of boards over the lower part."""
    horizon, colour = height * rng.uniform(0.55, 0.85), pick_colour(BACKDROPS, rng, 20)
    canvas.rectangle((0, horizon, width, height), fill=colour)
    if rng.random() < 0.5:
        for left in np.arange(-0.5, 1.6, rng.uniform(0.1, 0.3)) * width:
            x = float(left)
            board = (x, float(horizon), 2 * x - width / 2, height)
            canvas.line(board, mix_colours(colour, SHADOW, 0.25), 3)
        return
    for x, y, length, lean in rng.random((int(rng.integers(20, 90)), 4)):
        root = (x * width, horizon + y * (height - horizon))
        tip = (root[0] + 18 * (lean - 0.5), root[1] - (0.04 + 0.06 * length) * width)
        canvas.line((root, tip), mix_colours(colour, LEAF, 0.2 + 0.5 * lean), 3)


def draw_occluder(
    canvas: ImageDraw.ImageDraw, width: int, height: int, rng: np.random.Generator
) -> None:
    """Draws a ball at the lower border, or a post near the left or the right border."""
    colour = pick_colour(BACKDROPS, rng, 30)
    outline = mix_colours(colour, SHADOW, 0.6)
    x, radius = width * rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.18) * min(width, height)
    if rng.random() < 0.5:
        ball = (x - radius, height - 1.8 * radius, x + radius, height + 0.2 * radius)
        canvas.ellipse(ball, colour, outline, 4)
    else:
        x = width * rng.choice((0.12, 0.88))
        canvas.rectangle((x - radius / 4, -9, x, height), colour, outline, 3)


def vary_light(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Varies brightness, contrast and tint, adds a gradient of light, and adds noise."""
    contrast, brightness, grain = rng.uniform((0.75, -22, 0.5), (1.15, 22, 5)).tolist()
    down, across = (np.linspace(1, 1 + rng.uniform(-0.3, 0.3), side) for side in image.size[::-1])
    # Single precision suffices for 8-bit pixels and is twice as fast.
    light = (down[:, None, None] * across[:, None] * rng.uniform(0.95, 1.05, 3)).astype(np.float32)
    pixels = (np.asarray(image, np.float32) - 128) * contrast + (128 + brightness)
    noise = rng.standard_normal((image.height, image.width, 1), dtype=np.float32)
    return Image.fromarray((pixels * light + noise * grain).clip(0, 255).astype(np.uint8))
