"""The plots of an evaluation: selected photos and curves, and unusual names."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from research.evaluation import figures as drawn
from research.evaluation.scores import Decisions, Predictions
from research.evaluation.single_label import SingleLabel
from research.runs import pictures
from research.runs.photo_grid import photo_grid

ODD_NAMES = ("$x_{", "_hidden", "line\nbreak", "日本", "a" * 80)


def predictions(classes: int, photos: int = 60) -> Predictions:
    generator = np.random.default_rng(0)
    labels = np.arange(photos) % classes
    logits = generator.normal(size=(photos, 1 if classes == 2 else classes)) * 2
    names = tuple(f"{ODD_NAMES[row % 5]}{row}.jpg" for row in range(photos))
    return Predictions(names, labels, logits)


@pytest.mark.parametrize("classes", [2, 5, 60])
def test_each_plot_is_drawn_with_unusual_names(classes, recwarn):
    said = predictions(classes, 5 * classes)
    names = [f"{ODD_NAMES[k % 5]}{k}" for k in range(classes)]
    rows = drawn.most_confident_mistakes(said, limit=6)
    photos = np.random.default_rng(0).integers(255, size=(len(rows), 32, 32, 3)).astype(np.uint8)
    variant = SingleLabel(tuple(names))
    scores = variant.score(said, Decisions(2.0, 0.4 if classes == 2 else None), 2)
    titles = drawn.mistake_titles(rows, said, names)
    plots = map(pictures.png, variant.plots(said, scores).values())
    for png in (*plots, photo_grid(list(zip(photos, titles, strict=True)))):
        image = Image.open(io.BytesIO(png))
        assert max(image.size) <= 2500
        assert len(np.unique(np.asarray(image.convert("L")))) > 10  # not empty
    assert not recwarn.list


def test_curves_are_named_and_show_the_worst_classes():
    said = predictions(12, 120)
    names = [f"class {k}" for k in range(12)]
    curves = drawn.one_against_rest(said, names)
    own = [curve.probabilities[curve.of_class].mean() for curve in curves]
    assert own == sorted(own)
    assert len(curves) == 10
    figure = drawn.roc_curves(curves, 12)
    (axis,), (legend,) = figure.axes, figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    shown = [label.partition(" (")[0] for label in labels]
    assert shown == [*(curve.name for curve in curves), "chance"]
    assert axis.get_title() == "the 10 worst of 12 classes"


def test_a_class_without_photos_has_no_curve():
    said = Predictions(("a", "b"), np.array([0, 0]), np.array([[1.0], [2.0]]))
    assert drawn.one_against_rest(said, ("cat", "dog")) == []


def test_mistakes_are_named_and_sorted_by_confidence():
    logits = np.array([[3.0], [-1.0], [2.0], [5.0], [-4.0]])
    said = Predictions(("a", "b", "c", "d", "e"), np.array([0, 1, 1, 0, 0]), logits)
    rows = drawn.most_confident_mistakes(said)
    assert list(rows) == [3, 0, 1]
    assert list(drawn.most_confident_mistakes(said, limit=1)) == [3]
    assert drawn.mistake_titles(rows, said, ("cat", "dog")) == [
        "d\ncat, predicted\ndog 0.993",
        "a\ncat, predicted\ndog 0.953",
        "b\ndog, predicted\ncat 0.731",
    ]


def test_the_confusion_matrix_shows_shares_and_intervals():
    said = Predictions(tuple("abcd"), np.array([0, 0, 1, 1]), np.array([[-1.0], [1], [1], [1]]))
    texts = [text.get_text() for text in drawn.confusion_matrix(said, ("cat", "dog")).axes[0].texts]
    assert texts[0] == "1\n50.0%\n9.5% to 90.5%"
    assert texts[3].startswith("2\n100.0%")


def test_an_overlay_is_grey_where_the_heat_map_is_0():
    photo = np.full((1, 16, 16, 3), (10, 200, 90), np.uint8)
    heat = np.zeros((1, 4, 4))
    heat[0, 0, 0] = 1
    (laid,) = drawn.overlaid(photo, heat)
    assert laid.shape == (16, 16, 3)
    assert np.ptp(laid[1, 1].astype(int)) > 50
    assert np.ptp(laid[12, 12].astype(int)) == 0


def test_learning_curves_share_their_axes():
    def rows(losses):
        return [
            {"epoch": k, "train_loss": loss, "validation_loss": loss + 1, "train_accuracy": 0.5,
             "validation_accuracy": 0.6}
            for k, loss in enumerate(losses, start=1)
        ]  # fmt: skip

    figure = pictures.learning_curves([("one", rows([3, 2])), ("_two$", rows([5, 4, 3]))])
    loss = figure.axes[0]
    assert [list(line.get_ydata()) for line in loss.lines] == [[4, 3], [3, 2], [6, 5, 4], [5, 4, 3]]
    assert loss.lines[0].get_color() == loss.lines[1].get_color() != loss.lines[2].get_color()
    (legend,) = figure.legends
    assert [text.get_text().strip() for text in legend.get_texts()] == ["one", r"_two\$"]
    pictures.png(figure)


def test_unprintable_characters_in_a_title_are_replaced():
    photo = np.zeros((8, 8, 3), np.uint8)
    assert photo_grid([(photo, "a\rb\u2029c\x1c\nd")]) == photo_grid([(photo, "a?b?c?\nd")])
