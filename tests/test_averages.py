from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from research.loop.learner import Learner
from research.optimization.averages import WeightAverages
from tests.learners import CONFIG, TASK, feed, make_learner, model_of, some_photos, weights

DECAY = 0.15  # limited to 1/10 in the first step, but not to 2/11 in the second


def averaging(learner: Learner) -> Learner:
    """The same learner, with averages of all trained variables."""
    with learner.strategy.scope():
        averages = WeightAverages(model_of(learner).trainable_variables, DECAY)
    return Learner(
        learner.strategy,
        TASK,
        learner.network,
        learner.groups,
        learner.state,
        learner.options,
        averages,
    )


@pytest.mark.parametrize("replicas", [1, 2])
def test_averages_follow_the_formula(replicas):
    learner = averaging(make_learner(CONFIG, replicas))
    trained = model_of(learner).trainable_variables
    expected = [variable.numpy() for variable in trained]
    for step, batch in enumerate(feed(learner, some_photos(24), 8)):
        learner.train_step(batch)
        kept = min(DECAY, (1 + step) / (10 + step))
        now = [variable.numpy() for variable in trained]
        expected = [kept * e + (1 - kept) * value for e, value in zip(expected, now, strict=True)]
    for average, value in zip(learner.averages.variables, expected, strict=True):
        np.testing.assert_allclose(average.numpy(), value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("replicas", [1, 2])
def test_evaluation_uses_the_averages(replicas):
    learner = averaging(make_learner(dataclasses.replace(CONFIG, head_learning_rate=5.0), replicas))
    examples = some_photos(24)
    for batch in feed(learner, examples, 8):
        learner.train_step(batch)
    before = weights(learner)
    averaged = learner.evaluate(feed(learner, examples, 8))
    for variable, value in zip(model_of(learner).variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    plain = Learner(learner.strategy, TASK, learner.network, (), learner.state)
    assert plain.evaluate(feed(plain, examples, 8)).loss != pytest.approx(averaged.loss, rel=1e-3)
    pairs = zip(model_of(learner).trainable_variables, learner.averages.variables, strict=True)
    for variable, average in pairs:
        variable.assign(average.numpy())
    expected = plain.evaluate(feed(plain, examples, 8))
    assert expected.loss == pytest.approx(averaged.loss, rel=1e-6)


def test_averages_of_a_later_group_forget_the_initial_value_from_its_first_step():
    learner = averaging(make_learner(dataclasses.replace(CONFIG, head_epochs=1), photos=24))
    backbone = learner.groups[1]
    assert backbone.schedule.first_step == 3  # 24 photos in batches of 8
    learner.state.step.assign(3)
    places = [id(one) for one in model_of(learner).trainable_variables]
    averages = [learner.averages.variables[places.index(id(one))] for one in backbone.variables]
    before = [average.numpy() for average in averages]
    (batch,) = feed(learner, some_photos(8), 8)
    learner.train_step(batch)
    for average, old, variable in zip(averages, before, backbone.variables, strict=True):
        expected = 0.1 * old + 0.9 * variable.numpy()  # (1 + 0) / (10 + 0)
        np.testing.assert_allclose(average.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_a_step_updates_only_the_averages_of_its_variables():
    learner = averaging(make_learner(CONFIG))
    head = Learner(
        learner.strategy,
        TASK,
        learner.network,
        learner.groups[:1],
        learner.state,
        averages=learner.averages,
    )
    before = [average.numpy() for average in learner.averages.variables]
    (batch,) = feed(learner, some_photos(8), 8)
    head.train_step(batch)
    changed = [
        not np.array_equal(average.numpy(), value)
        for average, value in zip(learner.averages.variables, before, strict=True)
    ]
    trained = model_of(learner).trainable_variables
    assert changed == [variable.path.startswith("head") for variable in trained]
