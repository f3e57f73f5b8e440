"""The task multi_label: its loss, metrics, thresholds and scores, against values found by hand."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from sklearn import metrics

from research.data.relabelled_source import RelabelledSource
from research.data.source import Example, Source
from research.evaluation.find_variant import variant_of
from research.evaluation.multi_label import MultiLabel as Evaluated
from research.evaluation.multi_label_scores import LabelPredictions, score
from research.evaluation.scores import Resamples, percentiles
from research.evaluation.thresholds import (
    Thresholds,
    fit_threshold,
    read_thresholds,
    thresholds_file,
    write_thresholds,
)
from research.loop.learner import Learner
from research.runs import pictures
from research.runs.photo_grid import photo_grid, shortened
from research.serving.answers import SeveralLabels
from research.system.errors import UserError
from research.tasks.checks import sum_shapes
from research.tasks.metrics import mean_metrics
from research.tasks.multi_label import MultiLabel, average_precisions
from research.tasks.task import Task
from tests.learners import CONFIG, feed, make_learner, some_photos, weights

NAMES = ("ant", "bee", "cat", "dog", "elk")


def random_labels(photos: int, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Labels int32 and logits float32, (photos, classes); the last class has no photo."""
    generator = np.random.default_rng(0)
    labels = (generator.random((photos, classes)) < 0.3).astype(np.int32)
    labels[:, -1] = 0
    logits = 2 * generator.normal(size=(photos, classes)) + 2 * labels - 1
    return labels, logits.astype(np.float32)


def cross_entropy(targets: np.ndarray, logits: np.ndarray, weights: object = 1.0) -> np.ndarray:
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    own = weights * targets * np.log(probabilities)
    return -(own + (1 - targets) * np.log(1 - probabilities)).mean(axis=1)


def test_the_loss_and_its_gradient_are_those_of_smoothed_mixed_and_weighted_targets():
    labels, logits = random_labels(6)
    partners, share = labels[::-1].copy(), np.linspace(0, 0.9, 6).astype(np.float32)
    batch = {"label": tf.constant(labels)}
    np.testing.assert_allclose(
        MultiLabel().losses(tf.constant(logits), batch), cross_entropy(labels, logits), rtol=1e-5
    )
    factors = np.array([1.0, 2.0, 0.5, 4.0, 1.0])
    task = MultiLabel(label_smoothing=0.2, class_weights=factors)
    mixed = {**batch, "partner_label": tf.constant(partners), "partner_share": tf.constant(share)}
    targets = 0.8 * ((1 - share[:, None]) * labels + share[:, None] * partners) + 0.1
    variable = tf.Variable(logits)
    with tf.GradientTape() as tape:
        losses = task.losses(variable.value(), mixed)
        total = tf.reduce_sum(losses)
    np.testing.assert_allclose(losses, cross_entropy(targets, logits, factors), rtol=1e-5)
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    slopes = (1 - targets) * probabilities - factors * targets * (1 - probabilities)
    np.testing.assert_allclose(tape.gradient(total, variable), slopes / 5, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(
        task.for_validation().losses(tf.constant(logits), batch),
        cross_entropy(labels, logits),
        1e-5,
    )


def test_a_class_index_is_the_only_label_of_its_photo():
    _, logits = random_labels(4)
    indices = tf.constant([0, 4, 2, 2])
    vectors = tf.one_hot(indices, 5, dtype=tf.int32)
    found, expected = (
        MultiLabel().losses(tf.constant(logits), {"label": labels}) for labels in (indices, vectors)
    )
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(UserError, match="expected one logit per class, also for two classes"):
        MultiLabel().losses(tf.zeros((2, 1)), {"label": tf.constant([0, 1])})


def test_balanced_weights_are_the_ratio_of_photos_without_and_with_a_label():
    labels = np.array([[1, 1, 0], [0, 1, 0], [0, 1, 0], [0, 0, 0]], np.int32)
    assert MultiLabel().balanced_weights(labels, 3) == (3.0, 1 / 3, 1.0)
    always = np.array([[1, 1], [1, 0], [1, 0]], np.int32)
    assert MultiLabel().balanced_weights(always, 2) == (1.0, 2.0)
    assert MultiLabel().balanced_weights(np.array([0, 1, 1, 1], np.int32), 3) == (3.0, 1 / 3, 1.0)


def test_average_precision_from_histograms():
    # From the highest bin: one with the label, one without, two with and one without.
    positives, negatives = np.array([[2.0, 0, 1], [0, 0, 0]]), np.array([[1.0, 1, 0], [1, 0, 2]])
    found = average_precisions(positives, negatives)
    assert found[0] == pytest.approx(1 / 3 * 1 + 2 / 3 * 3 / 5)
    assert np.isnan(found[1])


def test_the_metrics_of_an_epoch_do_not_depend_on_its_batches():
    labels, logits = random_labels(300)
    task = MultiLabel()
    task.make_head((1, 1, 4), NAMES, 0)
    weights = np.ones(300, np.float32)
    weights[:20] = 0  # padding
    total: dict[str, np.ndarray] = {}
    for part in np.array_split(np.arange(300), 7):
        batch = {"label": tf.constant(labels[part]), "weight": tf.constant(weights[part])}
        for name, value in task.sums(tf.constant(logits[part]), batch).items():
            total[name] = total.get(name, 0) + value.numpy()
    found = mean_metrics(total, task.figures).values
    labels, logits = labels[20:], logits[20:]
    right = (logits > 0) == (labels > 0)
    areas = [metrics.average_precision_score(labels[:, k], logits[:, k]) for k in range(4)]
    assert found["average_precision"] == pytest.approx(np.mean(areas), abs=0.01)
    assert found["average_precision/bee"] == pytest.approx(areas[1], abs=0.015)
    assert np.isnan(found["average_precision/elk"])
    assert found["exact_match"] == pytest.approx(right.all(axis=1).mean())
    assert found["label_accuracy"] == pytest.approx(right.mean())
    assert found["loss"] == pytest.approx(cross_entropy(labels, logits).mean(), rel=1e-5)
    own = cross_entropy(labels[:, 2:3], logits[:, 2:3]).mean()
    assert found["cross_entropy/cat"] == pytest.approx(own, rel=1e-5)


def test_a_thousand_classes_take_few_sums():
    spec = {"label": tf.TensorSpec((None, 1000), tf.int32)}
    shapes = sum_shapes(MultiLabel(), 1000, spec)
    assert sum(np.prod(shape, dtype=int) for shape in shapes.values()) < 140_000


def test_two_devices_and_accumulation_give_what_one_device_gives():
    labels, _ = random_labels(16)
    features = np.random.default_rng(1).normal(size=(16, 96)).astype(np.float32)
    examples = dataclasses.replace(some_photos(16), inputs=(features,), labels=labels)
    config = dataclasses.replace(CONFIG, unfreeze_from="none", head_learning_rate=0.05)
    spec = {"label": tf.TensorSpec((None, 5), tf.int32)}
    found = []
    for replicas, more in ((1, {}), (2, {"accumulate_steps": 2})):
        learner = make_learner(
            dataclasses.replace(config, **more),
            replicas,
            task=MultiLabel(),
            classes=NAMES,
            batch=spec,
        )
        network = dataclasses.replace(learner.network, input_kind="features")
        learner = Learner(
            learner.strategy, learner.task, network, learner.groups, learner.state, learner.options
        )
        before = weights(learner)
        for batch in feed(learner, examples, 4 if more else 8, None):
            learner.train_step(batch)
        found.append((weights(learner), learner.metrics(learner.state.tally.read()).values))
        assert any((one != two).any() for one, two in zip(before, found[-1][0], strict=True))
    for one, two in zip(*(values for values, _ in found), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4, nan_ok=True)


@pytest.mark.parametrize(
    ("task", "labels", "expected"),
    [
        (Task, np.zeros((4, 5), np.int32), "give --task=multi_label to learn several labels"),
        (Task, np.zeros((4, 3), np.int32), "shape (3,) per photo; expected one class index"),
        (Task, np.zeros(4, np.float32), "are float32 of shape () per photo; expected one class i"),
        (Task, np.zeros(4, np.float32), "a task with its own losses and metrics, but run_eval.py"),
        (Task, np.array([0, 5], np.int32), "a label is 5; expected a class index from 0 to 4"),
        (MultiLabel, np.zeros((4, 3), np.int32), "multi_label expects integers 0 and 1 of shape"),
        (MultiLabel, np.zeros((4, 5), np.float32), "labels are float32 of shape (5,) per photo"),
        (MultiLabel, np.full((4, 5), -1, np.int32), "contains -1; expected only 0"),
        (MultiLabel, np.array([0, 7], np.int32), "a label is 7; expected a class index"),
    ],
)
def test_labels_of_another_kind_are_refused_in_one_line(task, labels, expected):
    with pytest.raises(UserError) as error:
        task().check_labels(labels, NAMES)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_class_name_must_not_contain_the_separator_of_labels():
    with pytest.raises(UserError, match="a class is named 'b;c'; expected class names without"):
        MultiLabel().check_labels(np.zeros((4, 2), np.int32), ("a", "b;c"))


def test_own_losses_that_take_one_label_per_photo_are_refused_for_several():
    class Focal(Task):
        def losses(self, logits, batch):
            return tf.nn.sparse_softmax_cross_entropy_with_logits(batch["label"], logits)

    spec = {"label": tf.TensorSpec((None, 5), tf.int32)}
    with pytest.raises(
        UserError, match=r"Focal cannot be computed for labels of shape .* subclass"
    ):
        sum_shapes(Focal(), 5, spec)


def test_the_labels_of_some_classes_are_placed_among_all():
    class Some(Source):
        class_names = ("dog", "ant")

        def count(self, split):
            return 3

        def examples(self, split):
            for label in (np.array([1, 0], np.uint8), np.int64(1), 0):
                yield Example(None, label, "photo")

    labels = [one.label for one in RelabelledSource(Some(), NAMES).examples("test")]
    assert labels[0].tolist() == [0, 0, 0, 1, 0]
    assert labels[1:] == [0, 3]


@pytest.mark.parametrize(
    ("positive", "probabilities", "expected"),
    [
        ([1, 1, 0, 0], [0.9, 0.3, 0.2, 0.1], 0.3),  # from 0.25 to 0.3, all are equally good
        ([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.6], 0.65),  # F1 4/5 with three, 2/3 with one
        ([0, 0, 0, 0], [0.9, 0.8, 0.7, 0.6], 0.5),  # no photo has the label
        ([1, 1, 1, 1], [0.9, 0.8, 0.4, 0.3], 0.3),
        ([1, 1, 0, 0], [0.9, 0.8, 0.2, 0.1], 0.5),  # as good as any other
    ],
)
def test_a_threshold_has_the_highest_f1_and_is_close_to_one_half(positive, probabilities, expected):
    positive, probabilities = np.array(positive, bool), np.array(probabilities)
    found = fit_threshold(positive, probabilities)
    if expected == 0.3 and len(set(positive)) == 2:
        assert 0.2 < found <= 0.3
    else:
        assert found == pytest.approx(expected)


def test_no_other_threshold_has_a_higher_f1():
    labels, logits = random_labels(60)
    probabilities = 1 / (1 + np.exp(-logits[:, 0]))
    found = fit_threshold(labels[:, 0] > 0, probabilities)

    def f1(threshold):
        return metrics.f1_score(labels[:, 0], probabilities >= threshold)

    assert f1(found) == max(map(f1, np.linspace(0.001, 0.999, 999)))


@pytest.fixture(scope="module")
def said() -> LabelPredictions:
    labels, logits = random_labels(80)
    odd = ("$a_{", "_b", "line\nbreak")
    names = tuple(f"{odd[row % 3]}{row}.jpg" for row in range(80))
    return LabelPredictions(names, labels.astype(bool), logits)


def test_scores_match_scikit_learn(said):
    chosen = Thresholds(dict(zip(NAMES, (0.3, 0.5, 0.6, 0.2, 0.5), strict=True)))
    figures, classes = score(said, NAMES, chosen, resamples=20)
    known, shares = said.labels[:, :4], said.probabilities[:, :4]
    roc = {"y_true": known, "y_score": shares}
    everything = {"y_true": said.labels.ravel(), "y_score": said.probabilities.ravel()}
    value = {name: figure.value for name, figure in figures.items()}
    assert value["average_precision"] == pytest.approx(metrics.average_precision_score(**roc))
    assert value["roc_auc"] == pytest.approx(metrics.roc_auc_score(**roc))
    pooled = metrics.average_precision_score(**everything)
    assert value["micro_average_precision"] == pytest.approx(pooled)
    assert value["micro_roc_auc"] == pytest.approx(metrics.roc_auc_score(**everything))
    assert value["loss"] == pytest.approx(cross_entropy(said.labels, said.logits).mean())
    for suffix, limits in (("", 0.5), ("_at_thresholds", chosen.of(NAMES))):
        predicted = said.probabilities >= limits
        assert value[f"exact_match{suffix}"] == metrics.accuracy_score(said.labels, predicted)
        lost = metrics.hamming_loss(said.labels, predicted)
        assert value[f"hamming_loss{suffix}"] == pytest.approx(lost)
        for kind, columns in (("macro", slice(4)), ("micro", slice(5))):
            three = metrics.precision_recall_fscore_support(
                said.labels[:, columns], predicted[:, columns], average=kind, zero_division=0
            )
            prefix = "" if kind == "macro" else "micro_"
            names = [f"{prefix}{name}{suffix}" for name in ("precision", "recall", "f1")]
            assert [value[name] for name in names] == pytest.approx(three[:3])
    for k, one in enumerate(classes[:4]):
        assert one.photos == said.labels[:, k].sum()
        assert one.threshold == chosen.thresholds[one.name]
        area = metrics.average_precision_score(said.labels[:, k], said.logits[:, k])
        assert one.average_precision.value == pytest.approx(area)
        f1 = metrics.f1_score(said.labels[:, k], shares[:, k] >= one.threshold)
        assert one.f1.value == pytest.approx(f1)


def test_intervals_are_computed_from_resamples_of_photos(said):
    figures, classes = score(said, NAMES, None, resamples=30)
    rows = Resamples(80, 30)
    drawn = [
        np.mean(
            [
                metrics.average_precision_score(said.labels[r, k], said.logits[r, k])
                for k in range(4)
            ]
        )
        for r in rows
    ]
    average = figures["average_precision"]
    unbiased = np.array(drawn) - 2 * (np.mean(drawn) - average.value)
    assert average.interval == pytest.approx(percentiles(unbiased))
    pooled = [
        metrics.average_precision_score(said.labels[r].ravel(), said.logits[r].ravel())
        for r in rows
    ]
    average = figures["micro_average_precision"]
    unbiased = np.array(pooled) - 2 * (np.mean(pooled) - average.value)
    assert average.interval == pytest.approx(percentiles(unbiased), abs=1e-6)
    losses = percentiles([said.losses()[r].mean() for r in rows])
    assert figures["loss"].interval == pytest.approx(losses)
    f1 = percentiles([metrics.f1_score(said.labels[r, 0], said.logits[r, 0] >= 0) for r in rows])
    assert classes[0].f1.interval == pytest.approx(f1)
    assert [name for name, one in figures.items() if not one.interval] == ["calibration_error"]


def test_a_label_without_photos_has_no_values_and_is_named(said):
    scores = Evaluated(NAMES).score(said, None, 0)
    elk = scores.classes[4]
    assert (elk.photos, elk.average_precision, elk.roc_auc, elk.precision, elk.f1) == (
        0,
        *[None] * 4,
    )
    (line,) = [line for line in scores.class_table() if line.startswith("elk")]
    assert line.split() == ["elk", "0", "-", "-", "0.50", "-", "-", "-"]
    assert any(
        line.startswith("note: no photo has the label elk;") for line in scores.class_table()
    )
    assert max(map(len, scores.class_table())) <= 80
    assert json.loads(json.dumps(dataclasses.asdict(elk)))["average_precision"] is None
    nothing = LabelPredictions(said.names, np.zeros_like(said.labels), said.logits)
    scores = Evaluated(NAMES).score(nothing, None, 2)
    assert scores.headline_value is None
    assert "micro_recall" not in scores.figures
    assert Evaluated(NAMES).plots(nothing, scores).keys() == {"classes", "reliability"}


@pytest.mark.parametrize("classes", [2, 5, 60])
def test_each_plot_is_drawn_with_unusual_names(classes, recwarn):
    labels, logits = random_labels(4 * classes, classes)
    names = tuple(f"{('$x_{', '_hidden', '日本', 'a' * 80)[k % 4]}{k}" for k in range(classes))
    said = LabelPredictions(names * 4, labels.astype(bool), logits)
    variant = Evaluated(names)
    scores = variant.score(said, Thresholds(dict.fromkeys(names, 0.4)), 2)
    shown = variant.shown(said, scores.decisions)
    photos = np.random.default_rng(0).integers(255, size=(len(shown.rows), 16, 16, 3))
    grid = list(zip(photos.astype(np.uint8), shown.titles, strict=True))
    for png in (*map(pictures.png, variant.plots(said, scores).values()), photo_grid(grid)):
        image = Image.open(io.BytesIO(png))
        assert max(image.size) <= 2500
        assert len(np.unique(np.asarray(image.convert("L")))) > 10  # not empty
    assert not recwarn.list


def test_the_photos_with_the_largest_losses_name_their_worst_label():
    labels = np.array([[1, 0, 1], [0, 0, 0], [1, 0, 0]], bool)
    logits = np.array([[2.0, -3, -4], [-1, 3, -2], [5, -5, -5]])
    said = LabelPredictions(("a.jpg", "b.jpg", "c.jpg"), labels, logits)
    shown = Evaluated(NAMES[:3]).shown(said, None)
    assert (list(shown.rows), list(shown.classes)) == ([0, 1], [2, 1])
    assert shown.titles == [
        "a.jpg\ntrue: ant, cat\npredicted: ant\nmissed: cat 0.018",
        "b.jpg\ntrue: no label\npredicted: bee\nwrong: bee 0.953",
    ]


def test_label_lists_are_shortened_to_one_line():
    assert shortened(["cat", "dog"], 8) == "cat, dog"
    assert shortened(["cat", "dog", "elk"], 11) == "cat, +2"
    assert shortened(["a very long name", "b"], 12) == "... name, +1"


def test_predictions_are_written_with_joined_labels(said):
    text = Evaluated(NAMES).csv(said, Thresholds(dict.fromkeys(NAMES, 0.9)))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0])[:4] == ["file", "label", "predicted", "probability ant"]
    assert [row["file"] for row in rows] == list(said.names)
    for title, chosen in (("label", said.labels), ("predicted", said.probabilities >= 0.9)):
        found = [[name in row[title].split(";") for name in NAMES] for row in rows]
        assert (np.array(found) == chosen).all()
        assert any(row[title] == "" for row in rows)
    assert float(rows[3]["logit bee"]) == pytest.approx(said.logits[3, 1])


def test_differences_are_paired(said):
    better = LabelPredictions(said.names, said.labels, said.logits + said.labels)
    found = Evaluated(NAMES).differences(better, said, Resamples(80, 10))
    value, drawn = found["mAP"]
    first, second = (score(one, NAMES, None, 0)[0] for one in (better, said))
    both = [one["average_precision"].value for one in (first, second)]
    assert value == pytest.approx(both[0] - both[1])
    assert min(drawn) > 0 > max(found["loss"][1])


def test_a_subclass_in_a_file_of_the_user_is_evaluated_in_the_same_way():
    class Own(MultiLabel):
        def losses(self, logits, batch):
            return 2 * super().losses(logits, batch)

    assert variant_of(Own) is Evaluated
    assert Own.supports == frozenset()


def test_thresholds_are_read_only_for_the_weights_that_they_were_chosen_for(tmp_path):
    config = SimpleNamespace(image_size=32, mirror_averaging=True)
    checkpoint = SimpleNamespace(
        checkpoint=str(tmp_path / "step-4"),
        class_names=("a", "b"),
        config=config,
        fingerprint="one",
    )
    assert read_thresholds(checkpoint) is None
    chosen = Thresholds({"a": 0.25, "b": 0.5})
    write_thresholds(checkpoint, chosen)
    assert thresholds_file(checkpoint).name == "step-4.thresholds-32px-mirrored.json"
    assert read_thresholds(checkpoint) == chosen
    config.mirror_averaging = False
    assert read_thresholds(checkpoint) is None
    config.mirror_averaging = True
    checkpoint.fingerprint = "another"
    assert read_thresholds(checkpoint) is None
    for damaged in ("{", "[]", '{"weights": null, "thresholds": {"a": 0.5}}',
                    '{"weights": null, "thresholds": {"a": 0.5, "b": NaN}}'):  # fmt: skip
        thresholds_file(checkpoint).write_text(damaged)
        with pytest.raises(UserError, match=r"delete it, and run run_eval\.py"):
            read_thresholds(checkpoint)


def test_the_labels_of_an_exported_model_are_those_above_the_thresholds():
    answers = SeveralLabels(("ant", "bee", "cat"), Thresholds({"ant": 0.5, "bee": 0.2, "cat": 0.9}))
    probabilities = np.array([[0.6, 0.3, 0.95], [0.4, 0.1, 0.8], [0.5, 0.1, 0.8]], np.float32)
    texts = [text.decode() for text in answers.label_text(tf.constant(probabilities)).numpy()]
    assert texts == ["ant;bee;cat", "", "ant"]
    assert [";".join(answers.chosen(row)) for row in probabilities] == texts
    assert answers.label_text(tf.zeros((0, 3))).shape == (0,)
