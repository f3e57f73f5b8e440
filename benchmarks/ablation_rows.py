"""The rows of the ablation: changes to the default in training and in evaluation."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from flags.command_line import parse_config
from research.settings.fields import setting_of
from research.settings.train_config import TrainConfig

# The flags of each row, added to the defaults of run_train.py.
ROWS: dict[str, tuple[str, ...]] = {
    "default": (),
    "article": ("--flagfile=recipes/article.flags",),
    "fast": ("--flagfile=recipes/fast.flags",),
    "best": ("--flagfile=recipes/best.flags",),
    "from layer 54": ("--unfreeze_from=54",),
    "every layer": ("--unfreeze_from=0",),
    "trained at 192": ("--image_size=192",),
    "no head-only epochs": ("--head_epochs=0", "--head_learning_rate=1e-4"),
    "20 head-only epochs": ("--head_epochs=20",),
    "5 epochs": ("--epochs=5",),
    "20 epochs": ("--epochs=20",),
    "backbone rate / 3": ("--backbone_learning_rate=1e-5",),
    "backbone rate x 3": ("--backbone_learning_rate=1e-4",),
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
    "random crops": ("--random_crop_area=0.5",),
    "colour jitter": ("--colour_jitter=0.3",),
    "RandAugment": ("--rand_augment=5",),
    "mixup": ("--mixup=0.2",),
    "CutMix": ("--cutmix=1",),
    "weights not averaged": ("--weight_averaging=0",),
    "early stopping": ("--early_stopping=3",),
    "balanced class weights": ("--class_weights=balanced",),
}
# Rows whose code was removed, with the hash of their settings: their runs stay in the table.
REMOVED = {"fixed crops": "57685b990100"}
# Settings that are newer than the runs in `results/`, with the values that these runs had. They are
# left out of the hash of a row's settings.
LATER_SETTINGS: dict[str, Any] = {
    "resize": "squash",
    "labels": None,
    "label_columns": None,
    "label_pattern": None,
    "folder_layout": "auto",
    "split": "80/10/10",
}
# Flags of a data set, added to each row. A mirrored digit is a different symbol, and digits always
# fill their images to the same extent, so that evaluation must use the training size.
DATA_FLAGS = {"digits": ("--nohorizontal_flip", "--nomirror_averaging", "--evaluation_scale=1")}
# Ways to evaluate a run, with the changed fields of `EvalConfig`.
EVALUATIONS: dict[str, dict[str, Any]] = {
    "": {},
    "checkpoint of lowest validation loss": {"checkpoint": ("best",)},
    "no mirror averaging": {"mirror_averaging": "off"},
    "evaluated at 160": {"image_size": 160},
    "evaluated at 224": {"image_size": 224},
}


def evaluations_of(row: str) -> list[str]:
    """Returns the names of the `EVALUATIONS` of a row's runs."""
    if row == "early stopping":  # its last epochs did not lower the validation loss
        return ["", "checkpoint of lowest validation loss"]
    return list(EVALUATIONS) if row == "default" else [""]


def key_of(evaluation: str, figure: str) -> str:
    """Returns the key of a figure in a run's JSON line."""
    return f"{evaluation}: {figure}" if evaluation else figure


def title_of(row: str, evaluation: str) -> str:
    """Returns the name of a row and an evaluation in the table."""
    return f"{row}, {evaluation}" if evaluation else row


def settings_of(row: str) -> str:
    """Returns a hash of a row's settings; runs with another hash are ignored."""
    parsed = parse_config(TrainConfig, list(ROWS[row]))
    config = {
        field.name: getattr(parsed, field.name)
        for field in dataclasses.fields(parsed)
        if setting_of(field).changes_result
    }
    for name, value in LATER_SETTINGS.items():
        if config[name] == value:
            del config[name]
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]
