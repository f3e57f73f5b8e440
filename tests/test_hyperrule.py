from __future__ import annotations

import dataclasses

import pytest

from research.settings.hyperrule import follow_hyperrule
from research.settings.train_config import CHOSEN_BY_HYPERRULE, TrainConfig
from research.system.errors import UserError


@pytest.mark.parametrize(
    ("photos", "updates", "warmup", "mixup"),
    [
        (20, 500, 100, 0.0),
        (1_600, 500, 100, 0.0),
        (19_999, 500, 100, 0.0),
        (20_000, 10_000, 500, 0.1),
        (600_000, 20_000, 500, 0.1),
    ],
)
@pytest.mark.parametrize("batch_size", [8, 32, 512])
def test_the_number_of_photos_determines_the_settings(photos, updates, warmup, mixup, batch_size):
    config = TrainConfig(hyperrule=True, batch_size=batch_size)
    ruled = follow_hyperrule(config, photos)
    assert ruled.epochs * ruled.steps_per_epoch == pytest.approx(updates, rel=0.02)
    assert (ruled.warmup, ruled.mixup) == (f"{warmup}steps", mixup)
    assert ruled.steps_per_epoch <= config.steps_per_pass(photos)
    assert ruled.head_schedule == ruled.backbone_schedule == "staircase"


def test_a_config_without_hyperrule_is_unchanged():
    config = TrainConfig()
    assert follow_hyperrule(config, 1_600) is config


def test_settings_that_the_rule_chooses_cannot_be_given():
    assert TrainConfig(hyperrule=True, head_epochs=0, steps_per_epoch=0)  # as in its recipe
    with pytest.raises(UserError, match="hyperrule chooses --warmup by"):
        TrainConfig(hyperrule=True, warmup="3steps")


@pytest.mark.parametrize("photos", [1_600, 20_000])
def test_the_rule_changes_only_the_settings_that_it_lists(photos):
    config = TrainConfig(hyperrule=True)
    ruled = follow_hyperrule(config, photos)
    before, after = map(dataclasses.asdict, (config, ruled))
    changed = {name for name, value in after.items() if value != before[name]}
    assert changed - {"hyperrule"} <= set(CHOSEN_BY_HYPERRULE)
