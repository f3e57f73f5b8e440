"""Few photos per class: the draws, the logistic regression and the table."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.few_photos import REGRESSION, draw_photos, regress, table
from benchmarks.tasks import DividedSource
from research.data.source import Example
from research.data.split_arrays import SplitArrays


def test_draws_have_the_same_test_photos_and_more_of_the_same_training_photos():
    blank = np.zeros((8, 8, 3), np.uint8)
    photos = [Example(blank, index % 3, f"{index}.png") for index in range(300)]
    source = DividedSource(("a", "b", "c"), {"train": photos[:200], "test": photos[200:]})

    def names(draw: int, per_class: int, split: str) -> set[str]:
        return {photo.name for photo in draw_photos(source, draw, per_class).examples(split)}

    assert names(0, 1, "test") == names(1, 25, "test")
    assert len(names(0, 1, "test")) == pytest.approx(100, abs=25)
    assert names(0, 5, "train") < names(0, 25, "train")
    assert names(0, 5, "train") != names(1, 5, "train")
    assert not names(0, 1000, "train") & names(0, 1, "test")
    labels = [photo.label for photo in draw_photos(source, 0, 5).examples("train")]
    assert sorted(labels) == [0] * 5 + [1] * 5 + [2] * 5
    assert draw_photos(source, 0, 5).count("validation") == 0


@pytest.mark.parametrize("classes", [2, 3])
def test_the_regression_averages_the_logits_of_the_views(classes):
    generator = np.random.default_rng(0)
    labels = np.arange(30) % classes
    centres = 4 * np.eye(classes, 5)
    train, test = (
        (centres[labels] + generator.standard_normal((2, 30, 5))).astype(np.float32)
        for _ in range(2)
    )
    names = tuple(map(str, range(30)))
    photos = SplitArrays((), labels, names)
    predictions = regress(train, labels, test, photos)
    assert predictions.names == names
    assert predictions.logits.shape == (30, 1 if classes == 2 else 3)
    assert predictions.correct.mean() > 0.9
    views = [
        regress(train, labels, test[[view]], SplitArrays((), labels, names)) for view in (0, 1)
    ]
    mean = (views[0].logits + views[1].logits) / 2
    np.testing.assert_allclose(predictions.logits, mean, rtol=1e-5)


def test_the_table_compares_the_default_with_the_others_on_the_same_draws():
    runs = [
        {
            "task": "t",
            "photos": photos,
            "draw": draw,
            "row": row,
            "accuracy": 0.5 + 0.01 * draw + gain,
            "log_loss": 1.0,
        }
        for photos in (5, 1)
        for draw in range(4)
        for row, gain in (("default", 0.1), ("fast", 0.0), (REGRESSION, 0.2 * (draw % 2)))
    ]
    lines = table(runs[:-1]).splitlines()  # one draw without the regression
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| t | 1 | 4 | 61.5 | **+10.0 (+10.0 to +10.0)** | +3.3 (")
    assert lines[3].startswith("| t | 5 | 4 | 61.5 | **+10.0 (+10.0 to +10.0)** | +0.0 (")
    assert "| 1.000 | +0.000 (+0.000 to +0.000) |" in lines[2]
