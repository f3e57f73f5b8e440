"""Parameter groups by stage, and what a config makes of the loss and the photos."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from research.data.augmentation import AugmentationPipeline
from research.data.loader import DataLoader
from research.loop.builder import make_augmentation, make_task, set_class_weights
from research.loop.preparation import check_views
from research.settings.automatic import without_auto
from research.settings.train_config import TrainConfig
from research.system.errors import UserError
from tests.learners import CONFIG, feed, make_learner, model_of, some_photos

STAGES = dataclasses.replace(CONFIG, unfreeze_from="stage1", stage_decay=0.5)


def rates(learner, step: int) -> dict[str, float]:
    return {group.name: float(group.schedule(step)) for group in learner.groups}


def test_each_stage_has_a_rate_from_the_last_one_down():
    learner = make_learner(STAGES)
    assert rates(learner, 0) == pytest.approx(
        {
            "head": 0.5,
            "backbone_stage3": 0.01,
            "backbone_stage2": 0.005,
            "backbone_stage1": 0.0025,
        }
    )
    names = [variable.path for group in learner.groups for variable in group.variables]
    assert len(names) == len(model_of(learner).trainable_variables)


def test_a_step_moves_each_stage_by_its_own_rate():
    """With gradient descent, half the rate is half the way."""
    moved = []
    for decay in (1.0, 0.5):
        learner = make_learner(dataclasses.replace(STAGES, stage_decay=decay))
        variables = {variable.path: variable for variable in model_of(learner).trainable_variables}
        before = {path: variable.numpy() for path, variable in variables.items()}
        (batch,) = feed(learner, some_photos(8), 8)
        learner.train_step(batch)
        moved.append({path: variables[path].numpy() - before[path] for path in variables})
    factors = {"stage1": 0.25, "stage2": 0.5, "stage3": 1.0}
    for path, way in moved[0].items():
        stage = path.split("/")[0].split("_")[0]
        np.testing.assert_allclose(
            moved[1][path], factors.get(stage, 1.0) * way, rtol=1e-3, atol=1e-7
        )


def test_gradual_unfreezing_begins_one_stage_after_another():
    config = dataclasses.replace(
        CONFIG, unfreeze_from="stage1", gradual_unfreezing=2, head_epochs=1, epochs=6
    )
    learner = make_learner(config, photos=24)  # three steps an epoch
    begin = {group.name: group.schedule.first_step for group in learner.groups}
    assert begin == {
        "head": 0,
        "backbone_stage3": 3,
        "backbone_stage2": 9,
        "backbone_stage1": 15,
    }


def test_stages_that_would_never_begin_are_refused():
    config = dataclasses.replace(
        CONFIG, unfreeze_from="stage1", gradual_unfreezing=2, head_epochs=1, epochs=4
    )
    with pytest.raises(UserError, match="give at least --epochs=5"):
        make_learner(config, photos=24)
    assert make_learner(dataclasses.replace(config, epochs=5), photos=24)
    assert make_learner(dataclasses.replace(config, epochs=0), photos=24)  # the head alone


def test_augmentation_comes_from_the_settings():
    def pipeline_of(**settings: Any) -> AugmentationPipeline:
        return make_augmentation(without_auto(TrainConfig(**settings)))

    assert not pipeline_of(horizontal_flip=False)
    pipeline = pipeline_of(mixup=0.1, cutmix=0.2, rand_augment=3, colour_jitter=0.4)
    assert [one.name for one in pipeline.steps] == [
        "rand_augment",
        "horizontal_flip",
        "colour_jitter",
    ]
    rand_augment, _, jitter = pipeline.steps
    assert (pipeline.mixing.mixup, pipeline.mixing.cutmix) == (0.1, 0.2)
    assert (rand_augment.magnitude, jitter.strength) == (3, 0.4)
    for name in ("random_crop_area", "mixup", "cutmix", "rand_augment", "colour_jitter"):
        assert pipeline_of(**{name: 0.5}).endless == name
    assert pipeline_of(horizontal_flip=True).endless is None


@pytest.mark.parametrize("setting", ["memory", "disk"])
@pytest.mark.parametrize("endless", ["random_crop_area", "colour_jitter"])
def test_endless_views_and_a_cached_trunk_exclude_each_other(setting, endless):
    def check(**settings):
        config = without_auto(TrainConfig(trunk_cache=setting, **settings))
        loader = DataLoader(source=object(), augmentation=make_augmentation(config))
        check_views(config, loader)

    with pytest.raises(UserError, match=f"{endless} shows .* give --trunk_cache=auto"):
        check(**{endless: 0.3})
    check(horizontal_flip=True)
    with pytest.raises(UserError, match=f"{endless} is given, but epochs is 0"):
        check(epochs=0, **{endless: 0.3})


def test_balanced_class_weights_count_the_photos_that_are_trained_on():
    class Photos:
        class_names = ("cat", "dog")

        def examples(self, split):
            assert split == "train"
            return some_photos(20)

    labels = some_photos(20).labels
    task = make_task(TrainConfig(class_weights="balanced", label_smoothing=0.1))
    set_class_weights(task, Photos())
    expected = tuple(20 / (2 * np.sum(labels == label)) for label in (0, 1))
    assert task.class_weights == pytest.approx(expected)
    assert task.label_smoothing == 0.1
    assert make_task(TrainConfig()).class_weights is None
    plain = task.for_validation()
    assert (plain.label_smoothing, plain.class_weights) == (0.0, None)
