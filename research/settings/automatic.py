"""Rules that choose the settings with the value `auto` from the photos.

This module must not import TensorFlow. The evidence comes from `research/loop/pilot.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from research.models.backbone import FirstLayers
from research.settings.fields import AUTO, setting_of
from research.settings.train_config import CHOSEN_BY_HYPERRULE, TrainConfig

FEWEST_STEPS = 20  # per epoch
HEAD_EPOCHS, FEWEST_HEAD_STEPS = 3, 80
EASY = 0.93  # accuracy of a linear classifier on frozen features
MANY_EASY, MANY_HARD = 1000, 400  # photos; with fewer, rates are lower
FEWEST_PHOTOS = 32  # to tell anything
FEWEST_TUNED = 160  # photos; with fewer, fine-tuning makes wrong predictions confident
PILOT_PHOTOS = 256  # at most
EASY_RATE = 3e-5
SMALLEST_CROP = 0.5  # share of a photo's area
RELIABLE = 0.5  # accuracy below which features do not tell whether crops keep what matters
HARD_RATE, LOWEST_HARD_RATE = 6e-4, 1.5e-4  # the first if the frozen features are always wrong


class Change(NamedTuple):
    """How the predictions change if another view of each photo is shown.

    Attributes:
      lost: number of photos that are right, and whose other view is wrong.
      won: number of photos that are wrong, and whose other view is right.
    """

    lost: int
    won: int

    @property
    def is_worse(self) -> bool:
        """Whether more are lost than chance explains: two standard deviations (McNemar 1947)."""
        return self.lost - self.won > 2 * math.sqrt(self.lost + self.won)

    def __str__(self) -> str:
        return f"{self.lost:,} answers wrong and {self.won:,} right"


@dataclasses.dataclass(frozen=True)
class Evidence:
    """How well a linear classifier on the frozen features predicts photos that it does not know.

    Attributes:
      photos: number of photos, a sample of the training photos.
      accuracy: share of them that is right, in [0, 1].
      mirrored: of mirror images.
    """

    photos: int
    accuracy: float
    mirrored: Change

    @property
    def is_easy(self) -> bool:
        """Whether the frozen features suffice for nearly all photos."""
        return self.accuracy >= EASY

    def __str__(self) -> str:
        return f"frozen features classify {self.accuracy:.0%} of {self.photos:,} photos correctly"


class Choice(NamedTuple):
    """A chosen value, and the reason in one line."""

    value: Any
    reason: str


Rule = Callable[[Evidence | str], Choice]


def automatic_settings(config: TrainConfig) -> list[str]:
    """Returns the names of the settings with the value `AUTO`."""
    return [
        field.name
        for field in dataclasses.fields(config)
        if setting_of(field).fallback is not None and getattr(config, field.name) == AUTO
    ]


def with_choices(config: TrainConfig, choices: Mapping[str, Choice]) -> TrainConfig:
    """Returns a config with the chosen values in place of `AUTO`, where there are any."""
    names = [name for name in automatic_settings(config) if name in choices]
    return dataclasses.replace(config, **{name: choices[name].value for name in names})


def without_auto(config: TrainConfig) -> TrainConfig:
    """Returns a config with the value that is used without evidence in place of each `AUTO`."""
    settings = {field.name: setting_of(field) for field in dataclasses.fields(config)}
    values = {name: settings[name].fallback for name in automatic_settings(config)}
    return dataclasses.replace(config, **values)


def choose(
    config: TrainConfig,
    photos: int,
    first_layers: FirstLayers,
    evidence: Callable[[], Evidence | str],
    cropped: Callable[[], Change],
    regression_obstacle: Callable[[], str | None],
) -> dict[str, Choice]:
    """Returns a choice for each setting with the value `AUTO` that is chosen before the training.

    Args:
      config: the settings.
      photos: number of training photos.
      first_layers: of the backbone.
      evidence: returns the evidence, or why there is none. It is only called if it is needed.
      cropped: returns how crops change the predictions of the evidence. It is only called if it is
        needed.
      regression_obstacle: returns why the head cannot start from a logistic regression. It is only
        called if it is needed.
    """
    names = automatic_settings(config)
    if config.hyperrule:
        names = [name for name in names if name not in CHOSEN_BY_HYPERRULE]
    start = {}
    if "head_start" in names:
        start["head_start"] = _head_start(config, photos, regression_obstacle)
        config = with_choices(config, start)
    rules = {
        "unfreeze_from": _unfreeze_from(config, photos, first_layers),
        "steps_per_epoch": _steps_per_epoch(config, photos),
        "head_epochs": _head_epochs(config, photos),
        "backbone_learning_rate": _backbone_learning_rate(config, photos),
        "horizontal_flip": _flips,
        "random_crop_area": _random_crop_area(config, photos, cropped),
        "mirror_averaging": _flips,
    }
    names = [name for name in rules if name in names]
    if not names:
        return start
    found = evidence()
    return start | {name: rules[name](found) for name in names}


def _head_start(config: TrainConfig, photos: int, obstacle: Callable[[], str | None]) -> Choice:
    if config.hyperrule or config.head_epochs != AUTO:
        given = "--hyperrule" if config.hyperrule else f"--head_epochs={config.head_epochs}"
        return Choice("initial", f"{given} is given")
    if photos > PILOT_PHOTOS:
        return Choice("initial", f"there are more than {PILOT_PHOTOS} photos")
    reason = obstacle()
    if reason:
        return Choice("initial", reason)
    return Choice("regression", f"on frozen features of all {photos:,} photos")


def _starts_trained(config: TrainConfig, photos: int) -> bool:
    """Returns whether the head starts from a regression on all photos."""
    return config.head_start == "regression" and photos <= PILOT_PHOTOS


def _steps_per_epoch(config: TrainConfig, photos: int) -> Rule:
    steps = config.steps_per_pass(photos)

    def rule(found: Evidence | str) -> Choice:
        if steps >= FEWEST_STEPS:
            return Choice(0, f"all {photos:,} photos once, in {steps:,} steps")
        tells = isinstance(found, Evidence) and (found.is_easy or photos < MANY_HARD)
        if tells or _starts_trained(config, photos):
            return Choice(0, f"all {photos:,} photos once; {found}")
        return Choice(FEWEST_STEPS, f"all {photos:,} photos once are only {steps:,} steps")

    return rule


def _head_epochs(config: TrainConfig, photos: int) -> Rule:
    def rule(found: Evidence | str) -> Choice:
        if _starts_trained(config, photos):
            return Choice(0, "the regression has trained the head")
        steps = config.steps_per_epoch
        if steps == AUTO:
            steps = _steps_per_epoch(config, photos)(found).value
        steps = steps or config.steps_per_pass(photos)
        epochs = max(HEAD_EPOCHS, math.ceil(FEWEST_HEAD_STEPS / steps))
        return Choice(epochs, f"{epochs * steps:,} steps")

    return rule


def _unfreeze_from(config: TrainConfig, photos: int, layers: FirstLayers) -> Rule:
    def rule(found: Evidence | str) -> Choice:
        if _starts_trained(config, photos) and photos < FEWEST_TUNED:
            return Choice("none", f"only {photos:,} photos")
        is_hard = isinstance(found, Evidence) and not found.is_easy
        return Choice(layers.half if is_hard else layers.usual, str(found))

    return rule


def _backbone_learning_rate(config: TrainConfig, photos: int) -> Rule:
    from_scratch = config.weights == "none"

    def rule(found: Evidence | str) -> Choice:
        if isinstance(found, Evidence) and not found.is_easy:
            rate, many = max(LOWEST_HARD_RATE, HARD_RATE * (1 - found.accuracy)), MANY_HARD
        elif isinstance(found, Evidence) or (photos < FEWEST_PHOTOS and not from_scratch):
            rate, many = EASY_RATE, MANY_EASY
        else:
            return Choice(EASY_RATE, found)
        if photos >= many:
            return Choice(float(f"{rate:.1e}"), str(found))
        # Few photos are learned by heart.
        return Choice(float(f"{rate * photos / many:.1e}"), f"only {photos:,} photos; {found}")

    return rule


def _random_crop_area(config: TrainConfig, photos: int, cropped: Callable[[], Change]) -> Rule:
    def rule(found: Evidence | str) -> Choice:
        if config.unfreeze_from == "none" or not config.epochs:
            return Choice(1.0, "only the head is trained")
        if config.trunk_cache in ("memory", "disk"):
            return Choice(1.0, f"--trunk_cache={config.trunk_cache} cannot keep random views")
        if isinstance(found, str) or found.is_easy or found.accuracy < RELIABLE:
            return Choice(1.0, str(found))
        if photos < MANY_HARD:
            return Choice(1.0, f"only {photos:,} photos; {found}")
        change = cropped()
        return Choice(1.0 if change.is_worse else SMALLEST_CROP, f"crops make {change}")

    return rule


def _flips(found: Evidence | str) -> Choice:
    if isinstance(found, str):
        return Choice(True, found)
    return Choice(not found.mirrored.is_worse, f"mirroring makes {found.mirrored}")
