from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from research.loop.learning_rate_finder import (
    IGNORED_STEPS,
    Sweep,
    find_learning_rates,
    smooth,
    suggest_rate,
)
from research.loop.open_photos import photos_of_run
from research.loop.preparation import set_up
from research.system.team import Team
from tests.helpers import SMALL_CONFIG

RATES = np.geomspace(1e-6, 1.0, 60)


def test_the_smoothed_loss_is_an_average_without_a_bias_to_zero():
    assert smooth([2.0] * 5) == pytest.approx([2.0] * 5)
    assert smooth([1.0, 2.0]) == pytest.approx([1.0, (0.09 * 1 + 0.1 * 2) / 0.19])


def test_the_suggestion_is_where_the_loss_falls_fastest():
    falls_at = 1e-3
    losses = 1 - 0.8 / (1 + (falls_at / RATES) ** 2)
    losses[-10:] = 5  # it diverges
    suggestion = suggest_rate(list(RATES), list(losses))
    assert suggestion == pytest.approx(falls_at, rel=0.3)


@pytest.mark.parametrize("losses", [np.ones(60), np.linspace(1, 2, 60)])
def test_no_suggestion_where_the_loss_never_falls(losses):
    assert suggest_rate(list(RATES), list(losses)) is None


def test_no_suggestion_from_too_few_steps():
    assert suggest_rate(list(RATES[:IGNORED_STEPS]), [1.0] * IGNORED_STEPS) is None


def test_why_there_is_none_is_told():
    assert "within 4 steps" in Sweep("head", (1e-3,) * 3, (1.0,) * 3, None).why_none
    flat = Sweep("head", (1e-3,) * 60, (1.0,) * 60, None)
    assert flat.why_none == "because the loss does not fall"


def test_photos_that_the_step_finishes_give_the_same_losses(photo_folder):
    config = dataclasses.replace(
        SMALL_CONFIG, image_folder=str(photo_folder), unfreeze_from="none", trunk_cache="off"
    )
    sweeps = []
    for finishes_on_device in (False, True):
        run = set_up(config, Team(tf.distribute.get_strategy()), photos_of_run(config))
        run.loader.finishes_on_device = finishes_on_device
        sweeps.append(find_learning_rates(run))
    (plain,), (finished,) = sweeps
    assert len(plain.losses) > IGNORED_STEPS
    np.testing.assert_allclose(finished.losses, plain.losses, rtol=1e-4)
