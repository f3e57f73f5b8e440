"""The built-in data set: 2,000 procedural drawings of cats and dogs, made without any download.

Colours, sizes, poses and backgrounds come from the same distributions for both classes, so only
the shapes (ears, muzzle, whiskers, pupils, tail) tell a cat from a dog.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

CLASS_NAMES = ("cat", "dog")
DRAWINGS_PER_CLASS = 1_000
SEED = 20_240
MARKINGS = ("plain", "stripes", "eye patch", "blaze")
OVERSAMPLING = 2  # Pillow draws hard edges, so drawings are made larger and averaged down

Colour = tuple[int, ...]  # red, green, blue and optionally opacity, each 0 to 255
Point = tuple[float, float]

# Palettes: three bytes (red, green, blue) a colour.
FUR = bytes.fromhex("e29448 3e3a3e 8e8e96 f0deba 865a38 f6f2ec c49868 686a78 b8683e")
IRISES = bytes.fromhex("c69e2e 70a24a 5c96c4 84542c d6b65c")
NOSES = bytes.fromhex("3a2e30 d67e80 744842")
BACKDROPS = bytes.fromhex(
    "a4d0e8 f6e2b2 c4deb2 eec0b4 cec4e4 78a0b2 e8e8e2 968674 689468 f6cc78 546280 be7468 80c4ba"
)
INNER_EAR, TONGUE, PUPIL = (232, 170, 164), (236, 118, 130), (24, 20, 26)
WHITE, SHADOW, LEAF = (255, 255, 255), (20, 20, 40), (60, 120, 50)

# For every pose: its probability, the lowest and highest head radius as a fraction of the shorter
# side, and how many head radii the subject reaches left, above, right and below its head's centre.
POSES = {
    "face": (0.4, (0.27, 0.38), (1.2, 1.35), (1.2, 1.1)),
    "sitting": (0.35, (0.19, 0.25), (1.3, 1.35), (1.6, 2.8)),
    "standing": (0.25, (0.19, 0.24), (1.2, 1.35), (3.0, 2.5)),
}


@dataclasses.dataclass(frozen=True)
class Coat:
    """The colours and the markings of one animal; nothing in here depends on its class."""

    fur: Colour
    patch: Colour
    light: Colour
    line: Colour
    iris: Colour
    nose: Colour
    marking: str


@dataclasses.dataclass(frozen=True)
class Pen:
    """Draws in head coordinates: the head's centre is the origin, its radius is 1, y points down.

    `origin`, `unit` (the head radius) and `line_width` are in pixels, `angle` is in radians.
    """

    canvas: ImageDraw.ImageDraw
    origin: Point
    unit: float
    angle: float
    mirror: int
    line_width: float

    def blob(self, corners: ArrayLike, fill: Colour, outline: Colour | None = None) -> None:
        """Fills a smooth closed shape inside the control polygon `corners`, shape (n, 2)."""
        self._fill(_smooth(corners, closed=True), fill, outline)

    def ellipse(
        self, x: float, y: float, radii: Point, fill: Colour, outline: Colour | None = None
    ) -> None:
        """Fills an ellipse around (x, y)."""
        self._fill(_regular_polygon(28) * radii + (x, y), fill, outline)

    def stroke(self, points: ArrayLike, colour: Colour, width: float) -> None:
        """Draws a smooth line near `points`, shape (n, 2); `width` is in head radii."""
        self._line(self._place(_smooth(points, closed=False)), colour, width * self.unit)

    def limb(self, points: ArrayLike, coat: Coat, width: float) -> None:
        """Draws a furry tube with an outline: a leg or a tail."""
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
        for x, y in placed:  # round ends, and no notches where two segments meet
            self.canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _regular_polygon(corners: int, start: float = 0.0) -> NDArray[np.float64]:
    """Returns the corners of a polygon on the unit circle, shape (corners, 2)."""
    turn = start + np.arange(corners) * (2 * np.pi / corners)
    return np.stack([np.cos(turn), np.sin(turn)], axis=1)


def _smooth(points: ArrayLike, closed: bool) -> NDArray[np.float64]:
    """Rounds a control polygon, shape (n, 2), by cutting its corners three times."""
    curve = np.asarray(points, dtype=np.float64)
    for _ in range(3):
        following = np.roll(curve, -1, axis=0)
        cut = np.stack([0.75 * curve + 0.25 * following, 0.25 * curve + 0.75 * following], axis=1)
        inner = cut.reshape(-1, 2)
        curve = inner if closed else np.concatenate([curve[:1], inner[:-2], curve[-1:]])
    return curve


def _both_sides(right: Sequence[Point]) -> list[Point]:
    """Completes the right half of a symmetric outline, listed from top to bottom."""
    return [*right, *((-x, y) for x, y in reversed(right))]


def _pick(palette: bytes, rng: np.random.Generator, jitter: int = 8) -> Colour:
    """Takes one colour of a palette and varies it a little."""
    colour = rng.choice(np.frombuffer(palette, np.uint8).reshape(-1, 3))
    return tuple((colour + rng.integers(-jitter, jitter + 1, 3)).clip(0, 255).tolist())


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    """Blends `share` (0 to 1) of the second colour into the first."""
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))


def _choose_coat(rng: np.random.Generator) -> Coat:
    fur, patch, iris, nose = (_pick(palette, rng) for palette in (FUR, FUR, IRISES, NOSES))
    light, line = _mix(fur, WHITE, rng.uniform(0.35, 0.8)), _mix(fur, SHADOW, rng.uniform(0.6, 0.9))
    return Coat(fur, patch, light, line, iris, nose, marking=str(rng.choice(MARKINGS)))


def _draw_background(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Paints a gradient, translucent clutter and often a ground."""
    corners = np.asarray([[_pick(BACKDROPS, rng)] * 2 for _ in range(2)])
    corners += rng.integers(-30, 31, (2, 2, 1))
    four_pixels = Image.fromarray(corners.clip(0, 255).astype(np.uint8))
    image = four_pixels.resize((width, height), Image.Resampling.BILINEAR)
    canvas = ImageDraw.Draw(image, "RGBA")  # this mode blends colours that have an opacity
    for _ in range(rng.integers(3, 12)):
        # Triangles, quadrilaterals and ellipses: an ear's outline alone must not give a class away.
        centre, radii = rng.random(2) * (width, height), rng.uniform(0.05, 0.25, 2)
        turned = _regular_polygon(rng.choice((3, 4, 24)), start=rng.uniform(0, 2))
        placed = turned * radii * min(width, height) + centre
        colour = (*_pick(BACKDROPS, rng, 30), int(rng.integers(70, 200)))
        canvas.polygon([(x, y) for x, y in placed.tolist()], fill=colour)
    if rng.random() < 0.7:
        _draw_ground(canvas, width, height, rng)
    return image


def _draw_ground(
    canvas: ImageDraw.ImageDraw, width: int, height: int, rng: np.random.Generator
) -> None:
    """Covers the lower part with a lawn or with a floor of boards."""
    horizon, colour = height * rng.uniform(0.55, 0.85), _pick(BACKDROPS, rng, 20)
    canvas.rectangle((0, horizon, width, height), fill=colour)
    if rng.random() < 0.5:
        for x in np.arange(-0.5, 1.6, rng.uniform(0.1, 0.3)) * width:
            board = (x, horizon, 2 * x - width / 2, height)
            canvas.line(board, _mix(colour, SHADOW, 0.25), 3)
        return
    for x, y, length, lean in rng.random((int(rng.integers(20, 90)), 4)):
        root = (x * width, horizon + y * (height - horizon))
        tip = (root[0] + 18 * (lean - 0.5), root[1] - (0.04 + 0.06 * length) * width)
        canvas.line((root, tip), _mix(colour, LEAF, 0.2 + 0.5 * lean), 3)


def _draw_body(label: int, pose: str, pen: Pen, coat: Coat, rng: np.random.Generator) -> None:
    """Draws what is below the head, tail first so that the body covers its root."""
    sway = rng.uniform(-0.2, 0.2)
    if pose == "face":
        pen.blob(_both_sides([(0.5, 0.3), (1.2, 1.6), (1.6, 3.6)]), coat.fur, coat.line)
        return
    tail_root = (0.8, 2.4) if pose == "sitting" else (2.3, 0.9)
    curl = [(0, 0), (0.8, 0.2), (1.15, sway - 0.6), (0.8, -1.5), (0.3, -1.5), (0.5, -1.1)]
    wag = [(0, 0), (0.5, -0.2), (sway + 0.7, -0.75)]
    pen.limb(np.asarray((curl, wag)[label]) + tail_root, coat, (0.16, 0.3)[label])
    if pose == "sitting":
        torso = _both_sides([(0.5, 0.2), (0.75, 1.4), (1.25, 2.2), (1.05, 2.85)])
        legs = [(-0.34, sway / 3), (0.34, -sway / 3)]
    else:
        torso = [(0, 0.1), (1.2, 0.3), (2.4, 0.2), (2.8, 1), (2.2, 1.75), (0.1, 1.8), (-0.4, 1)]
        legs = [(0.3, sway), (1.7, -sway)]
        for x, step in ((0.7, -sway), (2.1, sway)):  # the far legs, behind the torso
            pen.limb([(x, 1.2), (x, 1.8), (x + step, 2.3)], coat, 0.28)
    pen.blob(torso, coat.fur, coat.line)
    for x, step in legs:
        pen.limb([(x, 1.5), (x, 2.0), (x + step, 2.5)], coat, 0.3)
        pen.ellipse(x + step - 0.05, 2.6, (0.28, 0.16), coat.light, coat.line)


def _draw_marking(pen: Pen, coat: Coat) -> None:
    """Decorates the forehead, the same way for both classes."""
    if coat.marking == "stripes":
        for x in (-0.28, 0.0, 0.28):
            pen.stroke([(x, -0.78), (x * 0.7, -0.42)], coat.patch, 0.1)
    elif coat.marking == "eye patch":
        pen.ellipse(0.42, -0.15, (0.38, 0.4), coat.patch)
    elif coat.marking == "blaze":
        pen.blob(_both_sides([(0.08, -0.85), (0.12, -0.2), (0.35, 0.5)]), coat.light)


def _draw_eye(pen: Pen, x: float, y: float, radii: Point, pupil: Point, coat: Coat) -> None:
    pen.ellipse(x, y, radii, coat.iris, coat.line)
    pen.ellipse(x, y, pupil, PUPIL)
    pen.ellipse(x + 0.06, y - 0.08, (0.05, 0.05), WHITE)


def _draw_cat_head(pen: Pen, coat: Coat, rng: np.random.Generator) -> None:
    """Pointed ears, slit pupils, a small nose and whiskers."""
    height, spread = rng.uniform(1.3, 1.55), rng.uniform(0.8, 1.05)
    x, y = rng.uniform(-0.14, 0.14, 2)  # the face shifts inside the head, as when the head turns
    ear_colour = coat.patch if coat.marking == "eye patch" else coat.fur
    for side in (-1, 1):
        tip, inner_tip = (side * spread, -height), (side * spread * 0.94, -height * 0.88)
        ear = [(side * 1.05, -0.1), tip, tip, (side * 0.1, -0.85), (side * 0.4, -0.2)]
        pen.blob(ear, ear_colour, coat.line)
        pen.blob([(side * 0.88, -0.4), inner_tip, inner_tip, (side * 0.38, -0.75)], INNER_EAR)
    skull = _both_sides([(0.4, -0.9), (0.95, -0.75), (1.15, 0.1), (1.2, 0.55), (0.6, 0.95)])
    pen.blob(skull, coat.fur, coat.line)
    _draw_marking(pen, coat)
    for side in (-1, 1):
        _draw_eye(pen, x + side * 0.45, y - 0.1, (0.27, 0.23), (0.07, 0.2), coat)
        pen.ellipse(x + side * 0.2, y + 0.5, (0.27, 0.21), coat.light)
        mouth = [(x, y + 0.42), (x + side * 0.05, y + 0.66), (x + side * 0.3, y + 0.56)]
        pen.stroke(mouth, coat.line, 0.06)
        for rise in (-0.22, 0.0, 0.22):
            start = (x + side * 0.35, y + 0.48 + rise / 3)
            end = (side * 1.5, 0.45 + 1.6 * rise)
            pen.stroke([start, (side * 0.9, 0.4 + rise), end], coat.line, 0.045)
    pen.blob([(x - 0.2, y + 0.27), (x + 0.2, y + 0.27), (x, y + 0.5)], coat.nose, coat.line)


def _draw_dog_head(pen: Pen, coat: Coat, rng: np.random.Generator) -> None:
    """Hanging round ears, a protruding muzzle with a big nose, and often the tongue out."""
    length, spread = rng.uniform(0.45, 0.85), rng.uniform(1.2, 1.5)
    x, y = rng.uniform(-0.14, 0.14, 2)  # the face shifts inside the head, as when the head turns
    ear_colour = coat.patch if coat.marking == "eye patch" else coat.fur
    skull = _both_sides([(0.4, -1.0), (0.95, -0.8), (1.0, 0.2), (0.8, 0.75), (0.4, 1.1)])
    pen.blob(skull, coat.fur, coat.line)
    _draw_marking(pen, coat)
    for side in (-1, 1):
        front = [(side * 0.45, -0.95), (side * 1.05, -1.05), (side * spread, -0.2)]
        back = [(side * spread, length), (side * 0.95, length + 0.1), (side * 0.8, -0.1)]
        pen.blob(front + back, ear_colour, coat.line)
        _draw_eye(pen, x + side * 0.38, y - 0.22, (0.17, 0.18), (0.11, 0.12), coat)
    x, y = 1.4 * x, 1.2 * y  # the muzzle is nearer than the eyes, so it shifts further
    if rng.random() < 0.6:
        tip = [(x + 0.3, y + 1.25), (x + 0.02, y + 1.4), (x - 0.2, y + 1.25)]
        pen.blob([(x - 0.2, y + 0.6), (x + 0.25, y + 0.6), *tip], TONGUE, coat.line)
    pen.ellipse(x, y + 0.48, (0.58, 0.44), coat.light, coat.line)
    for side in (-1, 1):
        mouth = [(x, y + 0.3), (x + side * 0.02, y + 0.75), (x + side * 0.4, y + 0.62)]
        pen.stroke(mouth, coat.line, 0.06)
    pen.ellipse(x, y + 0.26, (0.27, 0.19), coat.nose, coat.line)
    pen.ellipse(x + 0.08, y + 0.19, (0.07, 0.04), (*WHITE, 160))


def _draw_occluder(
    canvas: ImageDraw.ImageDraw, width: int, height: int, rng: np.random.Generator
) -> None:
    """Puts a ball in front of the lower border or a post near the left or right one."""
    colour = _pick(BACKDROPS, rng, 30)
    x, radius = width * rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.18) * min(width, height)
    if rng.random() < 0.5:
        ball = (x - radius, height - 1.8 * radius, x + radius, height + 0.2 * radius)
        canvas.ellipse(ball, colour, _mix(colour, SHADOW, 0.6), 4)
    else:
        x = width * rng.choice((0.12, 0.88))
        canvas.rectangle((x - radius / 4, -9, x, height), colour, _mix(colour, SHADOW, 0.6), 3)


def _light(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Varies brightness, contrast and tint, lights one side more, and adds grain."""
    contrast, brightness, grain = rng.uniform((0.75, -22, 0.5), (1.15, 22, 5)).tolist()
    down, across = (np.linspace(1, 1 + rng.uniform(-0.3, 0.3), side) for side in image.size[::-1])
    # Single precision is plenty for 8-bit pixels and twice as fast.
    light = (down[:, None, None] * across[:, None] * rng.uniform(0.95, 1.05, 3)).astype(np.float32)
    pixels = (np.asarray(image, np.float32) - 128) * contrast + (128 + brightness)
    noise = rng.standard_normal((image.height, image.width, 1), dtype=np.float32)
    return Image.fromarray((pixels * light + noise * grain).clip(0, 255).astype(np.uint8))


def draw_sketch(label: int, rng: np.random.Generator) -> Image.Image:
    """Draws a cat (label 0) or a dog (label 1).

    Returns an RGB picture whose shorter side has 96 to 220 pixels and whose longer side is at
    most a third longer. The head spans at least 38 % of the shorter side.
    """
    shorter = int(rng.integers(96, 221))
    sides = [OVERSAMPLING * shorter, OVERSAMPLING * int(shorter * rng.uniform(1, 4 / 3))]
    width, height = sides if rng.random() < 0.5 else sides[::-1]
    image, coat = _draw_background(width, height, rng), _choose_coat(rng)
    pose = rng.choice(list(POSES), p=[probability for probability, *_ in POSES.values()])
    _, radius_range, before, after = POSES[pose]
    unit, mirror = rng.uniform(*radius_range) * min(sides), int(rng.choice((-1, 1)))
    if mirror == -1:
        before, after = (after[0], before[1]), (before[0], after[1])
    free = np.asarray((width, height)) - unit * np.add(before, after)
    x, y = unit * np.asarray(before) + rng.random(2) * free
    canvas = ImageDraw.Draw(image, "RGBA")
    body_angle, head_angle = rng.normal() * 0.05, rng.uniform(-0.35, 0.35)
    pen = Pen(canvas, (x, y), unit, body_angle, mirror, unit * rng.uniform(0.04, 0.1))
    _draw_body(label, pose, pen, coat, rng)
    draw_head = (_draw_cat_head, _draw_dog_head)[label]
    draw_head(dataclasses.replace(pen, angle=body_angle + head_angle), coat, rng)
    if rng.random() < 0.3:
        _draw_occluder(canvas, width, height, rng)
    return _light(image.reduce(OVERSAMPLING), rng)


def sketch_jpeg(label: int, index: int) -> bytes:
    """Returns drawing number `index` of a class as a JPEG file, the same one at every call."""
    rng = np.random.default_rng([SEED, label, index])
    image, quality = draw_sketch(label, rng), int(rng.integers(85, 96))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


class Sketches(tfds.core.GeneratorBasedBuilder):
    """The drawings as a TFDS data set, `sketches`, with one split, `train`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First drawings."}

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "image/filename": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=list(CLASS_NAMES)),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Procedural drawings of cats and dogs, half of each, made on this machine.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing to download
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for index in range(DRAWINGS_PER_CLASS):
            for label, class_name in enumerate(CLASS_NAMES):
                name = f"{class_name}.{index:04d}.jpg"
                image = io.BytesIO(sketch_jpeg(label, index))
                yield name, {"image": image, "image/filename": name, "label": label}
