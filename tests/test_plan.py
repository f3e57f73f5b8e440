from __future__ import annotations

from research.loop.plan import make_plan
from research.settings.train_config import TrainConfig


def test_the_short_last_batch_is_a_step_of_its_own():
    plan = make_plan(
        TrainConfig(batch_size=8, steps_per_epoch=0, epochs=3, head_epochs=1), photos=33
    )
    assert plan.steps_per_epoch == 5
    assert plan.head_steps == 5
    assert plan.steps == 20
    assert plan.visits == 4


def test_epochs_may_be_shorter_or_longer_than_a_pass():
    plan = make_plan(
        TrainConfig(batch_size=8, head_epochs=0, epochs=4, steps_per_epoch=2), photos=64
    )
    assert plan.steps_per_epoch == 2
    assert plan.visits == 1
    plan = make_plan(TrainConfig(batch_size=8, head_epochs=0, steps_per_epoch=16), photos=64)
    assert plan.steps_per_epoch == 16
    assert plan.visits == 20


def test_position_of_a_step():
    plan = make_plan(
        TrainConfig(batch_size=8, steps_per_epoch=0, head_epochs=0, epochs=3), photos=33
    )
    assert [plan.position(step) for step in (0, 4, 5, 14)] == [(0, 0), (0, 4), (1, 0), (2, 4)]


def test_steps_go_on_to_what_is_due_next_and_at_most_to_the_end_of_the_epoch():
    plan = make_plan(
        TrainConfig(batch_size=8, steps_per_epoch=0, head_epochs=0, epochs=3), photos=8 * 25
    )
    assert [plan.next_due(step, 10, None) for step in (0, 9, 10, 20, 24, 25)] == [
        *(10, 10, 20, 25),
        *(25, 30),
    ]
    assert plan.next_due(0, 100, 7) == 7
    assert plan.next_due(24, 100, 7) == 25
