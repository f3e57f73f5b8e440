"""BiT-HyperRule: derives settings from the number of training photos."""

from __future__ import annotations

import dataclasses
import math

from research.settings.train_config import TrainConfig


def follow_hyperrule(config: TrainConfig, photos: int) -> TrainConfig:
    """Sets what BiT-HyperRule chooses (Kolesnikov et al. 2020, arXiv 1912.11370, section 3.3).

    The rule chooses 500 updates below 20,000 photos, 10,000 below 500,000, and 20,000 above. The
    learning rate warms up over 500 updates, or over 100 if there are only 500 in all, and falls to
    a tenth after 30, 60 and 90 % of the updates. From 20,000 photos on, mixup is 0.1. The rule does
    not choose the optimizer, its learning rate, the batch size or the image size.

    Args:
      config: is returned unchanged unless `hyperrule` is set.
      photos: number of training photos.
    """
    if not config.hyperrule:
        return config
    updates = 500 if photos < 20_000 else 10_000 if photos < 500_000 else 20_000
    epochs = math.ceil(updates / config.steps_per_pass(photos))
    return dataclasses.replace(
        config,
        hyperrule=False,
        epochs=epochs,
        head_epochs=0,
        steps_per_epoch=round(updates / epochs),
        head_schedule="staircase",
        backbone_schedule="staircase",
        warmup=f"{min(500, updates // 5)}steps",
        mixup=0.0 if photos < 20_000 else 0.1,
    )
