"""BiT-HyperRule: settings that follow from the number of photos alone."""

from __future__ import annotations

import dataclasses
import math

from research.settings.train_config import TrainConfig

# Photos below which so many updates are made; above all of them, the last number.
UPDATES = ((20_000, 500), (500_000, 10_000))
MOST_UPDATES = 20_000
MIXUP_FROM = 20_000


def follow_hyperrule(config: TrainConfig, photos: int) -> TrainConfig:
    """Fills in what the rule decides (Kolesnikov et al. 2020, arXiv 1912.11370, section 3.3).

    500, 10,000 or 20,000 updates; the rate warms up in 500 of them, a fifth where there are only
    500, and falls to a tenth after 30, 60 and 90 %; mixup 0.1 except for small sets. The optimizer,
    its rate, batch and image size are the recipe's.

    Args:
      config: returned as it is unless `hyperrule` is set.
      photos: that are trained on.
    """
    if not config.hyperrule:
        return config
    updates = next((count for limit, count in UPDATES if photos < limit), MOST_UPDATES)
    steps = math.ceil(photos / (config.batch_size * config.accumulate_steps))
    epochs = max(1, round(updates / steps))
    return dataclasses.replace(
        config,
        hyperrule=False,
        epochs=epochs,
        head_epochs=0,
        head_schedule="staircase",
        backbone_schedule="staircase",
        warmup=f"{min(500, updates // 5)}steps",
        mixup=0.0 if photos < MIXUP_FROM else 0.1,
    )
