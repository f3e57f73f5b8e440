"""The rows of the ablation: recipes, changes to the default, and recipes of others with `fit`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from benchmarks.fit_recipes import ARTICLE, KERAS_IO, TENSORFLOW_ORG
from benchmarks.harness import RESULTS
from flags.command_line import parse_config
from research.settings.automatic import automatic_settings
from research.settings.fields import setting_of
from research.settings.train_config import TrainConfig

# The flags of each row, added to the defaults of run_train.py.
ROWS: dict[str, tuple[str, ...]] = {
    "default": (),
    "article": ("--flagfile=recipes/article.flags",),
    "fast": ("--flagfile=recipes/fast.flags",),
    "best": ("--flagfile=recipes/best.flags",),
    "fastai": ("--flagfile=recipes/fastai.flags",),
    "fastai, BatchNorm training": ("--flagfile=recipes/fastai.flags", "--bn_mode=train"),
    "timm": ("--flagfile=recipes/timm.flags",),
    "first default": ("--flagfile=benchmarks/first_default.flags",),
    "from layer 100": ("--unfreeze_from=100",),
    "from layer 54": ("--unfreeze_from=54",),
    "every layer": ("--unfreeze_from=0",),
    "trained at 192": ("--image_size=192",),
    "no head-only epochs": ("--head_epochs=0", "--head_learning_rate=1e-4"),
    "20 head-only epochs": ("--head_epochs=20",),
    "5 epochs": ("--epochs=5",),
    "20 epochs": ("--epochs=20",),
    "backbone rate 3e-5": ("--backbone_learning_rate=3e-5",),
    "backbone rate 1e-4": ("--backbone_learning_rate=1e-4",),
    "backbone rate 3e-4": ("--backbone_learning_rate=3e-4",),
    "each photo once per epoch": ("--steps_per_epoch=0",),
    "constant rates": ("--head_schedule=constant", "--backbone_schedule=constant"),
    "one cycle": ("--head_schedule=one_cycle", "--backbone_schedule=one_cycle"),
    "no warm-up": ("--warmup=0steps",),
    "stage decay 0.7": ("--stage_decay=0.7",),
    "gradual unfreezing": ("--gradual_unfreezing=2",),
    "weight decay (AdamW 0.05)": ("--backbone_optimizer=adamw", "--weight_decay=0.05"),
    "RMSprop": ("--backbone_optimizer=rmsprop",),
    "BatchNorm training": ("--bn_mode=train",),
    "label smoothing 0.1": ("--label_smoothing=0.1",),
    "no mirror images in training": ("--nohorizontal_flip",),
    "no random crops": ("--random_crop_area=1",),
    "random crops": ("--random_crop_area=0.5",),
    "colour jitter": ("--colour_jitter=0.3",),
    "RandAugment": ("--rand_augment=5",),
    "mixup": ("--mixup=0.2",),
    "CutMix": ("--cutmix=1",),
    "weights not averaged": ("--weight_averaging=0",),
    "bfloat16": ("--precision=bfloat16",),
    "early stopping": ("--early_stopping=3",),
    "balanced class weights": ("--class_weights=balanced",),
}
# The rows that are trained with `fit`, see fit_recipes.py.
FIT_ROWS = {
    "tensorflow.org, with fit": TENSORFLOW_ORG,
    "keras.io, with fit": KERAS_IO,
    "article, with fit": ARTICLE,
}
# `first`: the settings of the first runs. They are always in the hash of a row's settings. `later`:
# settings that were added since, with their value in the runs before. In a hash, they are left out
# if they have this value. The ablation adds a new setting with its default, so that a later change
# of the default changes the hash. If a new setting changes results by default, write its value in
# earlier runs into this file before the next run.
SETTINGS = RESULTS / "ablation_settings.json"
# What `auto` chooses depends on the machine.
PRECISION = "--precision=float32"
# The version of the rules of `auto` and of the regression that a head starts from, which are not
# settings. Increase it when they change.
RULES = 4
# Ways to evaluate a run, with the changed fields of `EvalConfig`.
EVALUATIONS: dict[str, dict[str, Any]] = {
    "": {},
    "checkpoint of lowest validation loss": {"checkpoint": ("best",)},
    "evaluated at 160": {"image_size": 160},
}


def evaluations_of(row: str) -> list[str]:
    """Returns the names of the `EVALUATIONS` of a row's runs."""
    if row == "early stopping":  # its last epochs did not lower the validation loss
        return ["", "checkpoint of lowest validation loss"]
    return list(EVALUATIONS) if row == "default" else [""]


def has_few_views(row: str) -> bool:
    """Returns whether the epochs show the same few views of a photo, which can be cached."""
    config = parse_config(TrainConfig, list(ROWS.get(row, ())))
    return config.random_crop_area == 1 and not any(
        (config.colour_jitter, config.rand_augment, config.mixup, config.cutmix)
    )


def key_of(evaluation: str, figure: str) -> str:
    """Returns the key of a figure in a run's JSON line."""
    return f"{evaluation}: {figure}" if evaluation else figure


def title_of(row: str, evaluation: str) -> str:
    """Returns the name of a row and an evaluation in the table."""
    return f"{row}, {evaluation}" if evaluation else row


def settings_of(row: str) -> str:
    """Returns a hash of a row's settings; runs with another hash are ignored."""
    if row in FIT_ROWS:
        return _hash(dataclasses.asdict(FIT_ROWS[row]))
    known = json.loads(SETTINGS.read_text(encoding="utf-8"))
    unchanged = {**_settings(TrainConfig()), **known["later"]}
    config = parse_config(TrainConfig, [PRECISION, *ROWS[row]])
    found = _settings(config)
    used = {
        name: value
        for name, value in found.items()
        if name in known["first"] or value != unchanged[name]
    }
    return _hash({**used, "rules": RULES} if automatic_settings(config) else used)


def record_new_settings(file: Path = SETTINGS) -> None:
    """Adds settings that the file does not have, with their default; see `SETTINGS`."""
    known = json.loads(file.read_text(encoding="utf-8"))
    defaults = _settings(TrainConfig())
    new = {name: defaults[name] for name in defaults.keys() - known["later"].keys()}
    known["later"] |= {name: new[name] for name in sorted(new) if name not in known["first"]}
    file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Returns the settings that change the result, as JSON would give them back."""
    values = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if setting_of(field).changes_result
    }
    return json.loads(json.dumps(values))


def _hash(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
