"""The settings of a run: frozen, validated when built, and the one place that declares them.

The command line is generated from these fields (`flags/`), so a default, a help text or a list of
choices stands here and nowhere else. This module must stay free of TensorFlow: `--help` and flag
errors answer at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import typing
from collections.abc import Mapping
from typing import Any

from research.backbones import find_backbone
from research.errors import UserError

OPTIMIZERS = ("sgd", "rmsprop", "adam", "adamw", "lion")
SCHEDULES = ("constant", "cosine")
WEIGHTS_BY_NAME = ("imagenet", "none")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known of one setting besides its name, type and default.

    Attributes:
      help: one or two sentences for `--help`.
      choices: the values allowed, where they can be listed.
      minimum: the least number allowed, inclusive unless `exclusive`.
      exclusive: the number must be greater than `minimum`, not equal to it.
      maximum: the greatest number allowed.
      is_path: the value is a path, kept in its absolute form.
      changes_result: a run resumed with another value would not be the same run.
    """

    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    exclusive: bool = False
    maximum: float = 2**31 - 1
    is_path: bool = False
    changes_result: bool = True


def setting_of(field: dataclasses.Field[Any]) -> Setting:
    """Returns the `Setting` that a config field carries."""
    return typing.cast(Setting, field.metadata["setting"])


def _declare(default: Any, setting: Setting) -> Any:
    return dataclasses.field(default=default, metadata={"setting": setting})


def _count(
    default: int | None,
    text: str,
    minimum: int = 0,
    changes_result: bool = True,
    maximum: int = 2**31 - 1,
) -> Any:
    setting = Setting(text, minimum=minimum, maximum=maximum, changes_result=changes_result)
    return _declare(default, setting)


def _rate(default: float | None, text: str, maximum: float = 2**31 - 1) -> Any:
    return _declare(default, Setting(text, minimum=0.0, exclusive=True, maximum=maximum))


def _strength(default: float | None, text: str, maximum: float = 2**31 - 1) -> Any:
    return _declare(default, Setting(text, minimum=0.0, maximum=maximum))


def _choice(default: str, choices: tuple[str, ...], text: str, changes_result: bool = True) -> Any:
    return _declare(default, Setting(text, choices=choices, changes_result=changes_result))


def _path(text: str, changes_result: bool = True) -> Any:
    return _declare(None, Setting(text, is_path=True, changes_result=changes_result))


def _text(default: str | None, text: str, changes_result: bool = True) -> Any:
    return _declare(default, Setting(text, changes_result=changes_result))


def _switch(default: bool, text: str) -> Any:
    return _declare(default, Setting(text))


def value_type(config_class: type, name: str) -> tuple[type, bool]:
    """Returns the type of a field's value (int, float, str or bool), and if None is allowed."""
    hint = typing.get_type_hints(config_class)[name]
    types = typing.get_args(hint) or (hint,)
    return next(t for t in types if t is not type(None)), type(None) in types


def _check_value(config_class: type, field: dataclasses.Field[Any], value: Any) -> Any:
    """Returns the value in its canonical form; raises `UserError` for one that is not allowed."""
    kind, optional = value_type(config_class, field.name)
    if value is None and optional:
        return None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{field.name} is {value!r}; expected a value of type {kind.__name__}")
    return _check_range(field.name, setting_of(field), kind, value)


def _check_range(name: str, setting: Setting, kind: type, value: Any) -> Any:
    if setting.choices and value not in setting.choices:
        raise UserError(f"{name} is {value!r}; expected one of: {', '.join(setting.choices)}")
    if setting.minimum is not None:
        noun = "a whole number" if kind is int else "a number"
        low = value <= setting.minimum if setting.exclusive else value < setting.minimum
        if value > setting.maximum:
            raise UserError(f"{name} is {value}; expected {noun} of at most {setting.maximum}")
        if low or math.isnan(value):
            bound = "greater than" if setting.exclusive else "of at least"
            raise UserError(f"{name} is {value}; expected {noun} {bound} {setting.minimum:g}")
    if kind is str and (not value or not value.isprintable()):
        raise UserError(f"{name} is {value!r}; expected text that can be printed")
    return os.path.abspath(os.path.expanduser(value)) if setting.is_path else value


class _Validated:
    """Checks each field when a config is built, so that no other code has to."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(typing.cast(Any, self)):
            checked = _check_value(type(self), field, getattr(self, field.name))
            object.__setattr__(self, field.name, checked)


def parse_steps(text: str | None) -> range:
    """Returns the steps, counted from 1, that 'A:B' means; none for None.

    Raises:
      UserError: the text is none such.
    """
    if text is None:
        return range(0)
    first, _, last = text.partition(":")
    digits = first.isdecimal() and last.isdecimal() and len(first) < 10 and len(last) < 10
    if not digits or not 0 < int(first) <= int(last):
        raise UserError(
            f"profile_steps is {text!r}; expected two steps as A:B, counted from 1, such as 20:30"
        )
    return range(int(first), int(last) + 1)


@dataclasses.dataclass(frozen=True)
class TrainConfig(_Validated):
    """Everything that decides a training run. Raises `UserError` when a value is not allowed."""

    dataset: str = _text(
        "cats_vs_dogs",
        "any TFDS image classification data set by name; 'sketches' is built in: cats and dogs "
        "drawn by program, no download",
    )
    image_folder: str | None = _path(
        "a folder with one subfolder of images a class, instead of --dataset"
    )
    data_dir: str | None = _path(
        "where TFDS keeps prepared data sets; TFDS's own default if not given",
        changes_result=False,
    )
    image_size: int = _count(
        160, "height and width in pixels that photos are resized to", 8, maximum=4096
    )
    batch_size: int = _count(32, "photos a batch, over all devices together", 1, maximum=2**16)
    accumulate_steps: int = _count(
        1,
        "make each update from so many batches, computed one after another: that of one batch so "
        "many times as large, in the memory of one",
        1,
        maximum=2**16,
    )
    shuffle_size: int = _count(1000, "photos that the next one is drawn from; 1 keeps the order", 1)
    horizontal_flip: bool = _switch(
        False, "mirror training photos left to right, one in two by chance, anew each epoch"
    )
    fixed_crops: bool = _switch(
        False,
        "show training photos whole or one of five crops of them (centre, corners; 7/8 as high and "
        "wide), by chance, anew each epoch",
    )
    random_crop_area: float | None = _rate(
        None, "train on a random part of each photo of at least this share of its area", 1.0
    )
    colour_jitter: float = _strength(
        0.0,
        "vary brightness, contrast and saturation of training photos by up to this share each",
        1.0,
    )
    backbone: str = _text("ResNet101V2", "the pretrained network, by its Keras name")
    weights: str = _text(
        "imagenet",
        "'imagenet', 'none', or a file: Keras weights, or a saved Keras model that contains the "
        "backbone",
    )
    unfreeze_from: str = _text(
        "100",
        "first backbone layer that is trained: its index, its name or a stage; 'none' trains the "
        "head alone",
    )
    epochs: int = _count(10, "epochs of fine-tuning the head and the unfrozen layers", 0)
    head_epochs: int = _count(0, "epochs that train the head alone, before --epochs", 0)
    steps_per_epoch: int | None = _count(None, "end each epoch after so many steps", 1)
    head_optimizer: str = _choice("rmsprop", OPTIMIZERS, "optimizer of the new head")
    head_learning_rate: float = _rate(1e-4, "learning rate of the new head")
    head_schedule: str = _choice("constant", SCHEDULES, "how the head's learning rate develops")
    backbone_optimizer: str = _choice("rmsprop", OPTIMIZERS, "optimizer of the unfrozen layers")
    backbone_learning_rate: float = _rate(1e-4, "learning rate of the unfrozen backbone layers")
    backbone_schedule: str = _choice(
        "constant", SCHEDULES, "how the backbone's learning rate develops"
    )
    warmup_steps: int = _count(
        0, "steps in which each group's learning rate rises from near zero to its value", 0
    )
    clip_norm: float | None = _rate(
        None, "scale an update's gradient down to this norm over all layers where it is greater"
    )
    weight_decay: float | None = _strength(
        None,
        "take this times the learning rate off each weight in each step, biases and norms spared; "
        "default: 0.004 for adamw, none for the others",
    )
    l2_penalty: float = _strength(
        0.0, "add this times the squared weights of every trained kernel to the loss"
    )
    bn_mode: str = _choice(
        "frozen",
        ("frozen", "train", "sync"),
        "BatchNorm of the unfrozen layers: 'frozen' as pretrained, 'train' by each device's part "
        "of the batch, 'sync' by the batch over all devices",
    )
    precision: str = _choice(
        "auto",
        ("auto", "float32", "bfloat16", "float16"),
        "number format of the backbone's computation, with a dynamic loss scale for 'float16'; "
        "'auto' takes what the device is fast in",
    )
    xla: str = _choice(
        "auto",
        ("auto", "on", "off"),
        "compile each device's forward and backward pass with XLA; 'auto' does so on GPUs",
        changes_result=False,
    )
    distribution: str = _choice(
        "auto",
        ("auto", "none", "mirrored", "multi_worker"),
        "'mirrored' trains on all devices of this machine, 'multi_worker' on those of all machines "
        "that the environment variable TF_CONFIG names; 'auto' takes what there is",
        changes_result=False,
    )
    worker_timeout: int = _count(
        600, "seconds to wait for the other workers before giving up", 1, False, 86400
    )
    virtual_devices: int = _count(
        1, "split the CPU in so many logical devices, to try --distribution=mirrored", 1, False, 64
    )
    trunk_cache: str = _choice(
        "auto",
        ("auto", "memory", "disk", "off"),
        "keep what the frozen layers compute for each photo, instead of computing it every epoch; "
        "'auto' does so where it pays, in memory or a temporary file, in at most half of what is "
        "free; 'disk' keeps it for later runs too",
    )
    cache_dir: str | None = _path(
        "where --trunk_cache=disk keeps files; default: ~/.cache/finetune-loop",
        changes_result=False,
    )
    checkpoint_every: int | None = _count(
        None, "also write a checkpoint every so many steps, not only after each epoch", 1, False
    )
    profile_steps: str | None = _text(
        None, "A:B writes a trace of the steps from A to B for TensorBoard's profiler", False
    )
    ckpt_dir: str | None = _path(
        "folder of the run: checkpoints, config.json, metrics.jsonl, TensorBoard events and "
        "pictures; run again with the same one to resume; default: a new folder under runs/",
        changes_result=False,
    )
    seed: int = _count(0, "seed of the head's initial weights and of the order of photos", 0)
    deterministic: bool = _switch(
        False, "use only deterministic operations, so that two runs end bit-identical on a GPU"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights not in WEIGHTS_BY_NAME:
            object.__setattr__(self, "weights", os.path.abspath(os.path.expanduser(self.weights)))
        smallest = find_backbone(self.backbone).minimum_size
        if self.image_size < smallest:
            raise UserError(
                f"image_size is {self.image_size}; {self.backbone} takes at least {smallest}"
            )
        if self.epochs + self.head_epochs == 0:
            raise UserError("epochs is 0 and head_epochs is 0; expected at least one epoch")
        self._check_augmentation()
        parse_steps(self.profile_steps)

    def _check_augmentation(self) -> None:
        if self.fixed_crops and self.random_crop_area is not None:
            raise UserError(
                "fixed_crops and random_crop_area are both given; expected one kind of crop"
            )
        endless = "random_crop_area" if self.random_crop_area is not None else "colour_jitter"
        if getattr(self, endless) and self.trunk_cache in ("memory", "disk"):
            raise UserError(
                f"trunk_cache is {self.trunk_cache!r} and {endless} is {getattr(self, endless)}, "
                "which shows each photo otherwise every time; give --trunk_cache=auto, or only "
                "--horizontal_flip and --fixed_crops, whose views can be cached"
            )

    def to_json(self) -> str:
        """Returns the settings as a JSON object, one setting a line."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Builds the config that `to_json` wrote; raises `UserError` where that is not possible."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise UserError(f"config.json is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise UserError("config.json holds no JSON object of settings")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"config.json has settings this version does not know: {unknown}")
        return cls(**values)

    def differences(self, other: TrainConfig) -> Mapping[str, tuple[Any, Any]]:
        """Returns the settings that would make `other` another run, each with both values."""
        return {
            field.name: (getattr(self, field.name), getattr(other, field.name))
            for field in dataclasses.fields(self)
            if setting_of(field).changes_result
            and getattr(self, field.name) != getattr(other, field.name)
        }


@dataclasses.dataclass(frozen=True)
class EvalConfig(_Validated):
    """What `run_eval.py` is asked for; everything else comes from the run's config.json."""

    ckpt_dir: str | None = _path("folder of the run to evaluate (required)")
    checkpoint: str = _text(
        "best",
        "'best' by validation loss, 'latest', or the path of a checkpoint without its ending",
    )
    split: str = _text(
        "test", "train, validation, test, or a TFDS expression such as 'train[:10%]'"
    )
    dataset: str | None = _text(None, "evaluate on this TFDS data set instead of the run's own")
    image_folder: str | None = _path("evaluate on this folder of one subfolder a class instead")
    data_dir: str | None = _path("where TFDS keeps prepared data sets, instead of the run's own")
    batch_size: int | None = _count(None, "photos a step, instead of the run's own", 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ckpt_dir is None:
            raise UserError("ckpt_dir is not given; expected --ckpt_dir=DIR of a training run")
        if self.dataset and self.image_folder:
            raise UserError("dataset and image_folder are both given; expected one of them")
