"""Built-in data set `sketches`: 2,000 procedural drawings of cats and dogs, without a download.

Colours, sizes, poses and backgrounds have the same distributions for both classes. Only the shapes
(ears, muzzle, whiskers, pupils, tail) distinguish a cat from a dog.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw

from research.data.built_in.drawing import (
    INNER_EAR,
    OVERSAMPLING,
    PUPIL,
    TONGUE,
    WHITE,
    Coat,
    Pen,
    Point,
    both_sides,
    choose_coat,
    draw_background,
    draw_occluder,
    vary_light,
)

CLASS_NAMES = ("cat", "dog")
DRAWINGS_PER_CLASS = 1_000
SEED = 20_240

# For each pose: its probability, the range of the head radius as a fraction of the shorter side,
# and the extent of the animal to the left and above, and to the right and below its head's centre,
# in head radii.
POSES = {
    "face": (0.4, (0.27, 0.38), (1.2, 1.35), (1.2, 1.1)),
    "sitting": (0.35, (0.19, 0.25), (1.3, 1.35), (1.6, 2.8)),
    "standing": (0.25, (0.19, 0.24), (1.2, 1.35), (3.0, 2.5)),
}


def _draw_body(label: int, pose: str, pen: Pen, coat: Coat, rng: np.random.Generator) -> None:
    """Draws the body. The tail comes first, so that the body covers its root."""
    sway = rng.uniform(-0.2, 0.2)
    if pose == "face":
        pen.blob(both_sides([(0.5, 0.3), (1.2, 1.6), (1.6, 3.6)]), coat.fur, coat.line)
        return
    tail_root = (0.8, 2.4) if pose == "sitting" else (2.3, 0.9)
    curl = [(0, 0), (0.8, 0.2), (1.15, sway - 0.6), (0.8, -1.5), (0.3, -1.5), (0.5, -1.1)]
    wag = [(0, 0), (0.5, -0.2), (sway + 0.7, -0.75)]
    pen.limb(np.asarray((curl, wag)[label]) + tail_root, coat, (0.16, 0.3)[label])
    if pose == "sitting":
        torso = both_sides([(0.5, 0.2), (0.75, 1.4), (1.25, 2.2), (1.05, 2.85)])
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
    """Draws the marking of the forehead, the same for both classes."""
    if coat.marking == "stripes":
        for x in (-0.28, 0.0, 0.28):
            pen.stroke([(x, -0.78), (x * 0.7, -0.42)], coat.patch, 0.1)
    elif coat.marking == "eye patch":
        pen.ellipse(0.42, -0.15, (0.38, 0.4), coat.patch)
    elif coat.marking == "blaze":
        pen.blob(both_sides([(0.08, -0.85), (0.12, -0.2), (0.35, 0.5)]), coat.light)


def _draw_eye(pen: Pen, x: float, y: float, radii: Point, pupil: Point, coat: Coat) -> None:
    pen.ellipse(x, y, radii, coat.iris, coat.line)
    pen.ellipse(x, y, pupil, PUPIL)
    pen.ellipse(x + 0.06, y - 0.08, (0.05, 0.05), WHITE)


def _draw_cat_head(pen: Pen, coat: Coat, rng: np.random.Generator) -> None:
    """Draws pointed ears, slit pupils, a small nose and whiskers."""
    height, spread = rng.uniform(1.3, 1.55), rng.uniform(0.8, 1.05)
    x, y = rng.uniform(-0.14, 0.14, 2)  # moves the face, as if the head turned
    ear_colour = coat.patch if coat.marking == "eye patch" else coat.fur
    for side in (-1, 1):
        tip, inner_tip = (side * spread, -height), (side * spread * 0.94, -height * 0.88)
        ear = [(side * 1.05, -0.1), tip, tip, (side * 0.1, -0.85), (side * 0.4, -0.2)]
        pen.blob(ear, ear_colour, coat.line)
        pen.blob([(side * 0.88, -0.4), inner_tip, inner_tip, (side * 0.38, -0.75)], INNER_EAR)
    skull = both_sides([(0.4, -0.9), (0.95, -0.75), (1.15, 0.1), (1.2, 0.55), (0.6, 0.95)])
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
    """Draws hanging round ears, a large muzzle with a big nose, and often a tongue."""
    length, spread = rng.uniform(0.45, 0.85), rng.uniform(1.2, 1.5)
    x, y = rng.uniform(-0.14, 0.14, 2)  # moves the face, as if the head turned
    ear_colour = coat.patch if coat.marking == "eye patch" else coat.fur
    skull = both_sides([(0.4, -1.0), (0.95, -0.8), (1.0, 0.2), (0.8, 0.75), (0.4, 1.1)])
    pen.blob(skull, coat.fur, coat.line)
    _draw_marking(pen, coat)
    for side in (-1, 1):
        front = [(side * 0.45, -0.95), (side * 1.05, -1.05), (side * spread, -0.2)]
        back = [(side * spread, length), (side * 0.95, length + 0.1), (side * 0.8, -0.1)]
        pen.blob(front + back, ear_colour, coat.line)
        _draw_eye(pen, x + side * 0.38, y - 0.22, (0.17, 0.18), (0.11, 0.12), coat)
    x, y = 1.4 * x, 1.2 * y  # the muzzle is nearer than the eyes, so it moves farther
    if rng.random() < 0.6:
        tip = [(x + 0.3, y + 1.25), (x + 0.02, y + 1.4), (x - 0.2, y + 1.25)]
        pen.blob([(x - 0.2, y + 0.6), (x + 0.25, y + 0.6), *tip], TONGUE, coat.line)
    pen.ellipse(x, y + 0.48, (0.58, 0.44), coat.light, coat.line)
    for side in (-1, 1):
        mouth = [(x, y + 0.3), (x + side * 0.02, y + 0.75), (x + side * 0.4, y + 0.62)]
        pen.stroke(mouth, coat.line, 0.06)
    pen.ellipse(x, y + 0.26, (0.27, 0.19), coat.nose, coat.line)
    pen.ellipse(x + 0.08, y + 0.19, (0.07, 0.04), (*WHITE, 160))


def draw_sketch(label: int, rng: np.random.Generator) -> Image.Image:
    """Draws a cat (label 0) or a dog (label 1).

    Returns an RGB image. Its shorter side has 96 to 220 pixels, and its longer side is at most a
    third longer. The diameter of the head is at least 38 % of the shorter side.
    """
    shorter = int(rng.integers(96, 221))
    sides = [OVERSAMPLING * shorter, OVERSAMPLING * int(shorter * rng.uniform(1, 4 / 3))]
    width, height = sides if rng.random() < 0.5 else sides[::-1]
    image, coat = draw_background(width, height, rng), choose_coat(rng)
    pose = str(rng.choice(list(POSES), p=[probability for probability, *_ in POSES.values()]))
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
        draw_occluder(canvas, width, height, rng)
    return vary_light(image.reduce(OVERSAMPLING), rng)


def sketch_jpeg(label: int, index: int) -> bytes:
    """Returns drawing number `index` of a class as a JPEG file, the same at every call."""
    rng = np.random.default_rng([SEED, label, index])
    image, quality = draw_sketch(label, rng), int(rng.integers(85, 96))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


class Sketches(tfds.core.GeneratorBasedBuilder):
    """The drawings as a TFDS data set with one split, `train`."""

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
