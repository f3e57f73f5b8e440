"""Metrics of predictions, compared with scikit-learn, Keras and values computed by hand."""

from __future__ import annotations

import collections
import math
import tracemalloc

import keras
import numpy as np
import pytest
from scipy import special
from sklearn import metrics

from research.evaluation import figures as drawn_figures
from research.evaluation import ranking
from research.evaluation.calibration import decide, fit_temperature, fit_threshold, smoothed_targets
from research.evaluation.ranking import areas
from research.evaluation.scores import (
    Decisions,
    Predictions,
    Resamples,
    bootstrap_interval,
    calibration_error,
    confusion,
    of_classes,
    overall,
    percentiles,
    wilson_interval,
)
from research.evaluation.single_label import SingleLabel


def drawn(classes: int, photos: int = 120, decimals: int = 1) -> Predictions:
    """Returns random predictions that are mostly correct, some with equal logits."""
    generator, separation = np.random.default_rng(0), 1.5
    labels = generator.integers(classes, size=photos)
    labels[:classes] = np.arange(classes)
    if classes == 2:
        logits = generator.normal(size=(photos, 1)) + separation * (2 * labels[:, np.newaxis] - 1)
    else:
        logits = generator.normal(size=(photos, classes))
        logits[np.arange(photos), labels] += separation
    return of_logits(labels, logits.round(decimals))


def of_logits(labels, logits) -> Predictions:
    labels, logits = np.array(labels), np.array(logits, np.float32)
    return Predictions(tuple(f"{row:03}.jpg" for row in range(len(labels))), labels, logits)


@pytest.mark.parametrize("classes", [2, 5])
def test_metrics_match_scikit_learn(classes):
    predictions = drawn(classes)
    labels, shares = predictions.labels, predictions.probabilities
    figures = {name: one.value for name, one in overall(predictions, resamples=5).items()}
    assert shares.sum(axis=1) == pytest.approx(1)
    assert figures["accuracy"] == metrics.accuracy_score(labels, shares.argmax(axis=1))
    assert figures["loss"] == pytest.approx(metrics.log_loss(labels, shares))
    scores = shares[:, 1] if classes == 2 else shares
    roc = metrics.roc_auc_score(labels, scores, multi_class="ovr")
    assert figures["roc_auc"] == pytest.approx(roc)
    average = metrics.average_precision_score(labels, scores)
    assert figures["average_precision"] == pytest.approx(average)
    pairs, numbers = confusion(labels, predictions.predicted)
    counts = metrics.confusion_matrix(labels, shares.argmax(axis=1))
    assert pairs.tolist() == np.argwhere(counts).tolist()
    assert numbers.tolist() == counts[counts > 0].tolist()


def test_metrics_of_two_classes_match_keras():
    predictions = drawn(2)
    labels, second = predictions.labels, predictions.probabilities[:, 1]
    figures = {name: one.value for name, one in overall(predictions, resamples=0).items()}
    loss = keras.metrics.BinaryCrossentropy(from_logits=True)
    accuracy = keras.metrics.BinaryAccuracy()
    loss.update_state(labels[:, np.newaxis], predictions.logits)
    accuracy.update_state(labels, second)
    assert figures["loss"] == pytest.approx(float(loss.result()), rel=1e-5)
    assert figures["accuracy"] == pytest.approx(float(accuracy.result()))
    dog = of_classes(predictions, ("cat", "dog"), resamples=0)[1]
    precision, recall = keras.metrics.Precision(), keras.metrics.Recall()
    roc = keras.metrics.AUC(num_thresholds=2000)
    for metric in (precision, recall, roc):
        metric.update_state(labels, second)
    assert dog.precision.value == pytest.approx(float(precision.result()))
    assert dog.recall.value == pytest.approx(float(recall.result()))
    assert figures["roc_auc"] == pytest.approx(float(roc.result()), abs=2e-3)


def test_metrics_of_many_classes_match_keras():
    predictions = drawn(4, decimals=6)  # Keras counts both of two equal logits
    names = ("a", "b", "c", "d")
    loss = keras.metrics.SparseCategoricalCrossentropy(from_logits=True)
    loss.update_state(predictions.labels, predictions.logits)
    assert overall(predictions, resamples=0)["loss"].value == pytest.approx(
        float(loss.result()), rel=1e-5
    )
    f1 = keras.metrics.F1Score()
    f1.update_state(np.eye(4)[predictions.labels], predictions.probabilities)
    found = [one.f1.value for one in of_classes(predictions, names, resamples=0)]
    assert found == pytest.approx([float(value) for value in f1.result()], rel=1e-5)


def test_calibration_error_by_hand():
    """Two bins: mean confidence 0.62 with 1 of 2 correct, and 0.9 with 2 of 2 correct."""
    confidence = np.array([0.61, 0.63, 0.89, 0.91])
    correct = np.array([True, False, True, True])
    assert calibration_error(confidence, correct) == pytest.approx(0.5 * 0.12 + 0.5 * 0.1)
    # Bins are weighted by their numbers of photos, three and one.
    confidence, correct = np.array([0.9, 0.9, 0.9, 0.6]), np.array([True, True, False, True])
    expected = (3 * abs(2 / 3 - 0.9) + abs(1 - 0.6)) / 4
    assert calibration_error(confidence, correct) == pytest.approx(expected)
    assert calibration_error(np.array([1.0]), np.array([True])) == 0
    assert calibration_error(np.array([1.0]), np.array([False])) == 1


@pytest.mark.parametrize("classes", [2, 4])
def test_areas_of_resamples_match_scikit_learn(classes):
    predictions = drawn(classes, photos=30)
    labels = predictions.labels
    scores = predictions.logits if classes == 2 else predictions.probabilities
    resamples = Resamples(30, 60)  # more than one block
    found = areas(labels, scores, resamples)
    for index, rows in enumerate([np.arange(30), *resamples]):
        own = [labels[rows] == k for k in ([1] if classes == 2 else range(classes))]
        columns = scores[rows].T
        pairs = [(of_k, s) for of_k, s in zip(own, columns, strict=True) if 0 < of_k.sum() < 30]
        roc = np.mean([metrics.roc_auc_score(*pair) for pair in pairs])
        average = np.mean([metrics.average_precision_score(*pair) for pair in pairs])
        assert found[:, index] == pytest.approx([roc, average])


def test_areas_where_a_class_is_missing():
    labels, scores = np.array([0, 1, 1, 0]), np.array([[0.2], [0.8], [0.4], [0.4]])
    found = areas(labels, scores, [np.array([0, 3, 3, 0])])
    assert found[:, 0] == pytest.approx([0.875, 1 / 2 + 1 / 2 * 2 / 3])
    assert np.isnan(found[:, 1]).all()
    assert np.isnan(areas(np.array([1, 1]), scores[:2], [np.array([0, 1])])).all()


@pytest.mark.parametrize("decimals", [1, 6])
def test_areas_of_many_classes_are_not_computed_anew_for_each_resample(decimals, monkeypatch):
    predictions = drawn(60, 900, decimals)
    resamples = Resamples(900, 100)
    exact = areas(predictions.labels, predictions.probabilities, resamples)
    monkeypatch.setattr(ranking, "MOST_PAIRS", 0)
    found = areas(predictions.labels, predictions.probabilities, resamples)
    assert found.shape == exact.shape
    assert found[:, 0] == pytest.approx(exact[:, 0])
    for one, other, width, shift in zip(found, exact, (0.02, 0.1), (0.02, 0.7), strict=True):
        deviation = other[1:].std()
        assert one[1:].std() == pytest.approx(deviation, rel=width)
        assert np.corrcoef(one[1:], other[1:])[0, 1] > 0.97
        assert abs(one[1:].mean() - other[1:].mean()) < shift * deviation
    # Resamples repeat photos, which raises the average precision; here, a little less.
    assert exact[1, 0] < found[1, 1:].mean() < exact[1, 1:].mean()
    # A class without photos is left out, and so are all if there is only one.
    labels = np.where(predictions.labels == 7, 8, predictions.labels)
    (roc, average), _ = areas(labels, predictions.probabilities, Resamples(900, 1)).T
    monkeypatch.undo()
    everything = areas(labels, predictions.probabilities, [])
    assert (roc, average) == pytest.approx(tuple(everything[:, 0]))
    monkeypatch.setattr(ranking, "MOST_PAIRS", 0)
    assert np.isnan(areas(0 * labels, predictions.probabilities, Resamples(900, 2))).all()


def test_nothing_grows_with_the_square_of_the_number_of_classes():
    classes, photos = 3000, 100
    generator = np.random.default_rng(0)
    labels = generator.integers(classes, size=photos)
    logits = generator.normal(size=(photos, classes))
    logits[np.arange(photos), labels] += 4
    said, names = of_logits(labels, logits), tuple(map(str, range(classes)))
    variant = SingleLabel(names)
    tracemalloc.start()
    scores = variant.score(said, decide(said), 3)
    matrix = drawn_figures.confusion_matrix(said, names)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < classes**2 * 4  # bytes
    predicted = logits.argmax(axis=1)
    pairs = collections.Counter(zip(labels.tolist(), predicted.tolist(), strict=True))
    found = {(int(one.label), int(one.predicted)): one.photos for one in scores.confusion}
    assert found == pairs
    assert scores.figures["accuracy"].value == (predicted == labels).mean()
    own = special.log_softmax(logits.astype(np.float32), axis=1)[np.arange(photos), labels]
    assert scores.figures["loss"].value == pytest.approx(-own.mean(), rel=1e-5)
    areas_of_present = [
        metrics.roc_auc_score(labels == k, said.probabilities[:, k]) for k in np.unique(labels)
    ]
    assert scores.figures["roc_auc"].value == pytest.approx(np.mean(areas_of_present))
    f1 = metrics.f1_score(labels, predicted, labels=range(classes), average=None, zero_division=0)
    for k in np.unique(labels).tolist():
        assert scores.classes[k].f1.value == pytest.approx(f1[k])
        assert scores.classes[k].photos == (labels == k).sum()
    # The worst classes are printed and drawn, and the number of the others.
    rows = scores.class_table()
    worst = min(f1[np.unique(labels)])
    assert rows[1].split()[-2 if "(" in rows[1] else -1] == f"{worst:.2f}"
    assert rows[41] == "... and 2,960 more classes, whose F1 is not lower"
    assert matrix.axes[0].get_title() == "the 50 of 3,000 classes that are confused most often"
    assert len(matrix.axes[0].get_xticklabels()) == 50


def test_wilson_interval_matches_published_values():
    """Newcombe (1998), table I: 81 of 263 and 0 of 20, score method without correction."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    low, high = wilson_interval(20, 20)
    assert high == 1.0
    assert low == pytest.approx(1 - 0.1611, abs=5e-5)
    assert math.isfinite(low)
    assert wilson_interval(0, 0) is None


def test_intervals_by_resampling():
    """The interval of a mean is about 1.96 standard errors to each side."""
    predictions = drawn(2, photos=400)
    losses = predictions.losses()
    low, high = overall(predictions, resamples=1000)["loss"].interval
    half = 1.96 * losses.std() / 20
    assert (low, high) == pytest.approx((losses.mean() - half, losses.mean() + half), rel=0.06)
    assert overall(predictions, resamples=0)["loss"].interval is None
    assert overall(predictions, resamples=0)["accuracy"].interval is not None
    assert percentiles([math.nan, math.nan]) is None
    assert percentiles([math.nan, *range(101)]) == (2.5, 97.5)


def test_intervals_of_classes():
    labels = [0] * 10 + [1] * 10
    logits = [[-1]] * 8 + [[1]] * 2 + [[1]] * 9 + [[-1]]
    cat, dog = of_classes(of_logits(labels, logits), ("cat", "dog"), resamples=300)
    assert (cat.name, cat.photos, dog.photos) == ("cat", 10, 10)
    assert cat.precision.value == 8 / 9
    assert cat.precision.interval == wilson_interval(8, 9)
    assert cat.recall.interval == wilson_interval(8, 10)
    assert dog.precision.value == 9 / 11
    low, high = cat.f1.interval
    assert 0.5 < low < cat.f1.value < high <= 1


def test_a_class_without_photos():
    predictions = of_logits([0, 1, 0], [[3, 0, 1], [0, 2, 0], [0, 0, 4]])
    figures = overall(predictions, resamples=20)
    # The mean is over the classes with photos.
    labels, shares = predictions.labels, predictions.probabilities
    roc = np.mean([metrics.roc_auc_score(labels == k, shares[:, k]) for k in (0, 1)])
    assert figures["roc_auc"].value == pytest.approx(roc)
    of_c = of_classes(predictions, ("a", "b", "c"), resamples=20)[2]
    assert (of_c.photos, of_c.precision, of_c.recall, of_c.f1) == (0, None, None, None)


def test_one_photo():
    predictions = of_logits([1], [[2.0]])
    figures = overall(predictions, decide(drawn(2)), resamples=20)
    assert figures["accuracy"].value == 1
    assert figures["accuracy"].interval == wilson_interval(1, 1)
    assert figures["loss"].value == pytest.approx(math.log1p(math.exp(-2)))
    assert "roc_auc" not in figures
    never_predicted = of_logits([1], [[-2.0]])
    assert of_classes(never_predicted, ("cat", "dog"), resamples=0)[1].precision.interval is None


def test_extreme_logits_give_finite_losses():
    assert of_logits([0, 1], [[500.0], [-500.0]]).losses() == pytest.approx([500, 500])
    assert of_logits([1], [[900.0, 0.0, 0.0]]).losses() == pytest.approx([900])


@pytest.mark.parametrize("classes", [2, 4])
def test_temperature_recovers_a_factor_of_the_logits(classes):
    """Labels are drawn from the probabilities of the logits, which are then multiplied by 3."""
    generator = np.random.default_rng(1)
    logits = 2 * generator.normal(size=(4000, 1 if classes == 2 else classes))
    shares = of_logits(np.zeros(4000, int), logits).probabilities
    labels = (shares.cumsum(axis=1) < generator.uniform(size=(4000, 1))).sum(axis=1)
    predictions = of_logits(labels, 3 * logits)
    temperature = fit_temperature(predictions)
    assert temperature == pytest.approx(3, rel=0.08)
    scaled = overall(predictions, Decisions(temperature, None), resamples=0)
    assert scaled["loss_at_temperature"].value < scaled["loss"].value - 0.1
    assert scaled["loss_at_temperature"].value == pytest.approx(
        of_logits(labels, 3 * logits / temperature).losses().mean(), rel=1e-5
    )


@pytest.mark.parametrize("classes", [2, 10])
def test_temperature_is_bounded_without_mistakes_in_validation(classes):
    """With 100 photos and no mistake, the confidence becomes 101 / 102."""
    labels = np.arange(100) % classes
    logits = 8.0 * (2 * labels[:, np.newaxis] - 1) if classes == 2 else 9.0 * np.eye(10)[labels]
    predictions = of_logits(labels, logits)
    temperature = fit_temperature(predictions)
    assert 0.5 < temperature < 3
    scaled = np.exp(predictions.log_probabilities(temperature)).max(axis=1)
    assert scaled == pytest.approx(101 / 102, abs=1e-4)
    # So one mistake among other photos adds little to the loss.
    mistaken = of_logits([*labels, 1 - labels[0]], [*logits, logits[0]])
    assert mistaken.losses(temperature).mean() < 0.1


def test_smoothed_targets():
    assert smoothed_targets(2, 3) == pytest.approx((6 / 8, 1 / 8))


def test_threshold_maximizes_accuracy():
    # Above 0.3 are all dogs and one cat. A threshold of 0.5 would miss two dogs.
    shares = np.array([0.1, 0.2, 0.25, 0.35, 0.4, 0.45, 0.9, 0.95])
    labels = np.array([0, 0, 0, 1, 0, 1, 1, 1])
    predictions = of_logits(labels, np.log(shares / (1 - shares))[:, np.newaxis])
    threshold = fit_threshold(predictions)
    assert threshold == pytest.approx(0.425)
    figures = overall(predictions, Decisions(1.0, threshold), resamples=0)
    assert figures["accuracy"].value == 6 / 8
    assert figures["accuracy_at_threshold"].value == 7 / 8
    assert fit_threshold(of_logits([0, 1], [[-3.0], [3.0]])) == 0.5
    assert fit_threshold(of_logits([1, 1], [[-3.0], [-2.0]])) == pytest.approx(1 / (1 + math.e**3))
    assert fit_threshold(of_logits([0, 0], [[3.0], [2.0]])) > 1 / (1 + math.e**-3)
    assert decide(drawn(3)).threshold is None


def test_intervals_of_average_precision_contain_the_true_value():
    """With ten photos per class, the percentiles of resampled photos are all too high."""
    generator, classes = np.random.default_rng(0), 30

    def draw(photos: int) -> tuple[np.ndarray, np.ndarray]:
        labels = generator.integers(classes, size=photos)
        logits = generator.normal(size=(photos, classes))
        logits[np.arange(photos), labels] += 1.5
        return labels, logits.astype(np.float32)

    names = ("roc_auc", "average_precision")
    many, covered = of_logits(*draw(20_000)), dict.fromkeys(names, 0)
    exact = dict(zip(names, areas(many.labels, many.probabilities, [])[:, 0], strict=True))
    for _ in range(12):
        figures = overall(of_logits(*draw(10 * classes)), resamples=60)
        for name, true in exact.items():
            low, high = figures[name].interval
            assert 0 <= low <= figures[name].value <= high <= 1
            covered[name] += low <= true <= high
    assert covered["average_precision"] >= 7  # none without the correction
    assert covered["roc_auc"] >= 10
    assert bootstrap_interval("average_precision", 0.5, [math.nan]) is None


def test_the_calibration_error_has_no_interval():
    assert overall(drawn(3), resamples=5)["calibration_error"].interval is None
