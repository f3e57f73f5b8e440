"""Each file in examples/ does what it says, and all that a run does works with it."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf

from research.data.augmentation import Augmentation, AugmentationPipeline
from research.data.source import Example, Source
from research.data.split_arrays import SplitArrays, load_split
from research.loop.learner import Learner
from research.loop.run_state import make_checkpoint
from research.runs.tracker import Tracker
from research.system.errors import UserError
from research.system.python_file import load_from_file
from research.tasks.losses import cross_entropy
from research.tasks.task import Task
from tests.launcher import ROOT
from tests.learners import (
    CONFIG,
    LABELS,
    feed,
    make_learner,
    metrics_of,
    model_of,
    scale,
    some_photos,
    weights,
)

CLASSES = tuple("abcde")
FEATURES = 96  # of SmallResNet
HEAD_ALONE = dataclasses.replace(CONFIG, unfreeze_from="none", head_learning_rate=0.05)
BATCH = {**LABELS, "teacher": tf.TensorSpec((None, len(CLASSES)), tf.float32)}

# By file: the class, and whether it trains the backbone too in these tests.
TASKS = {
    "focal_loss": "FocalLoss",
    "dropout_head": "DropoutHead",
    "recall": "Recall",
    "roc_auc": "RocAuc",
    "sam": "Sam",
    "distillation": "Distillation",
    "arcface": "ArcFace",
}


def example(file: str, name: str, base: type | None = None) -> Any:
    return load_from_file("example", f"{ROOT / 'examples' / file}.py:{name}", base)


def task_of(file: str) -> Task:
    return example(file, TASKS[file], Task)()


def examples_of(count: int, file: str) -> SplitArrays:
    """Random examples of five classes, with a teacher's log-probabilities.

    Their inputs are the features that a run caches while it trains the head alone; photos for SAM,
    which trains the backbone too.
    """
    generator = np.random.default_rng(1)
    examples = some_photos(count, 2 if file == "roc_auc" else len(CLASSES))
    if file != "sam":
        features = generator.normal(size=(count, FEATURES)).astype(np.float32)
        examples = dataclasses.replace(examples, inputs=(features,))
    logits = generator.normal(size=(count, len(CLASSES))).astype(np.float32)
    return dataclasses.replace(examples, arrays={"teacher": logits})


def learner_of(file: str, replicas: int = 1, **settings: Any) -> Learner:
    config = dataclasses.replace(CONFIG if file == "sam" else HEAD_ALONE, **settings)
    learner = make_learner(config, replicas, task=task_of(file), classes=CLASSES, batch=BATCH)
    if file == "sam":
        return learner
    network = dataclasses.replace(learner.network, input_kind="features")
    return Learner(
        learner.strategy, learner.task, network, learner.groups, learner.state, learner.options
    )


def batches(learner: Learner, examples: SplitArrays, size: int = 8) -> Any:
    is_photos = learner.network.input_kind == "photos"
    return feed(learner, examples, size, scale if is_photos else None)


def trained(learner: Learner, examples: SplitArrays, size: int = 8) -> list[np.ndarray]:
    for batch in batches(learner, examples, size):
        learner.train_step(batch)
    return weights(learner)


def logits_of(learner: Learner, examples: SplitArrays) -> np.ndarray:
    model, (inputs,) = model_of(learner), examples.inputs
    if learner.network.input_kind == "features":
        return model.head(inputs, training=False).numpy()
    return model(scale(tf.cast(inputs, tf.float32))).numpy()


@pytest.mark.parametrize("file", sorted(path.stem for path in (ROOT / "examples").glob("*.py")))
def test_an_example_is_a_file_of_at_most_40_lines(file):
    lines = (ROOT / "examples" / f"{file}.py").read_text().splitlines()
    assert len(lines) <= 40
    assert file in (ROOT / "docs" / "extending.md").read_text()


@pytest.mark.parametrize("file", TASKS)
def test_an_example_works_with_all_that_a_run_does(file, tmp_path):
    """Two devices and two accumulated batches give what one gives; a resumed run ends the same."""
    examples = examples_of(16, file)
    learner = learner_of(file)
    one = trained(learner, examples)
    checkpoint = make_checkpoint(model_of(learner), learner.groups, learner.state)
    path = checkpoint.save(str(tmp_path / "step"))
    expected, figures = trained(learner, examples), metrics_of(learner).values

    resumed = learner_of(file)
    make_checkpoint(model_of(resumed), resumed.groups, resumed.state).restore(
        path
    ).assert_consumed()
    for value, again in zip(expected, trained(resumed, examples), strict=True):
        np.testing.assert_array_equal(value, again)
    assert metrics_of(resumed).values == figures

    metrics = learner.evaluate(batches(learner, examples))
    logits, labels = logits_of(learner, examples), tf.constant(examples.labels)
    batch = {"label": labels, "teacher": tf.constant(examples.arrays["teacher"])}
    assert metrics.photos == 16
    losses = learner.task.losses(tf.constant(logits), batch)
    assert metrics.loss == pytest.approx(float(tf.reduce_mean(losses)), rel=1e-4)
    plain = float(tf.reduce_mean(cross_entropy(tf.constant(logits), labels)))
    assert metrics["cross_entropy"] == pytest.approx(plain, rel=1e-4)
    assert metrics["accuracy"] == pytest.approx(np.mean(logits.argmax(axis=1) == examples.labels))

    two = trained(learner_of(file, replicas=2), examples)
    if file == "dropout_head":  # each device draws masks of its own
        assert all(np.isfinite(value).all() for value in two)
        return
    for single, mirrored in zip(one, two, strict=True):
        np.testing.assert_allclose(mirrored, single, rtol=2e-4, atol=1e-5)
    if file == "sam":  # each part of a batch climbs to a point of its own
        return
    halves = trained(learner_of(file, accumulate_steps=2), examples, 4)
    for single, accumulated in zip(one, halves, strict=True):
        np.testing.assert_allclose(accumulated, single, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("file", TASKS)
def test_a_step_in_float16_learns(file):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        learner = learner_of(file)
        before = weights(learner)
        after = trained(learner, examples_of(8, file))
        assert learner.state.loss_scale.read().skipped_steps == 0
    finally:
        keras.config.set_dtype_policy("float32")
    assert any(not np.array_equal(one, two) for one, two in zip(before, after, strict=True))
    assert all(np.isfinite(value).all() for value in after)
    assert math.isfinite(metrics_of(learner).loss)


def test_focal_loss_follows_its_formula():
    logits = tf.constant([[1.0, 0.0, -2.0], [0.0, 3.0, 0.0]])
    probability = np.exp([1.0, 0.0]) / np.exp([[1.0, 0.0, -2.0], [0.0, 3.0, 0.0]]).sum(1)
    expected = -((1 - probability) ** 2) * np.log(probability)
    found = task_of("focal_loss").losses(logits, {"label": tf.constant([0, 2])})
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_dropout_drops_in_head_epochs_and_not_in_evaluation():
    learner, examples = learner_of("dropout_head"), examples_of(8, "dropout_head")
    assert not learner.network.trains_backbone
    (batch,) = batches(learner, examples)
    network = learner.network
    first, second = (network.logits(batch, training=True).numpy() for _ in range(2))
    assert not np.allclose(first, second)
    first, second = (network.logits(batch, training=False).numpy() for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_recall_and_top_5_are_those_of_all_photos():
    learner, examples = learner_of("recall"), examples_of(20, "recall")
    metrics = learner.evaluate(batches(learner, examples))
    logits = logits_of(learner, examples)
    of_class = examples.labels == 1
    assert metrics["recall"] == pytest.approx((logits.argmax(1)[of_class] == 1).mean())
    assert metrics["top_5"] == 1.0  # of five classes
    assert not {"hits", "of_class"} & set(metrics.values)


def test_the_area_under_the_curve_is_that_of_scikit_learn():
    from sklearn.metrics import roc_auc_score

    learner, examples = learner_of("roc_auc"), examples_of(40, "roc_auc")
    metrics = learner.evaluate(batches(learner, examples))
    logits = logits_of(learner, examples)
    probability = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))[:, 1]
    assert metrics["roc_auc"] == pytest.approx(
        roc_auc_score(examples.labels, probability), abs=0.01
    )


def test_sam_takes_the_gradient_at_the_point_above():
    learner, examples = learner_of("sam", unfreeze_from="stage3"), examples_of(8, "sam")
    model = model_of(learner)
    trainable = model.trainable_variables
    image = scale(tf.cast(examples.inputs[0], tf.float32))

    def gradients() -> list[np.ndarray]:
        with tf.GradientTape() as tape:
            logits = model(image, training=False)
            loss = tf.reduce_mean(cross_entropy(logits, tf.constant(examples.labels)))
        found = tape.gradient(loss, [variable.value for variable in trainable])
        return [gradient.numpy() for gradient in found]

    before = [variable.numpy() for variable in trainable]
    slopes = gradients()
    norm = math.sqrt(sum(float((slope**2).sum()) for slope in slopes))
    for variable, value, slope in zip(trainable, before, slopes, strict=True):
        variable.assign(value + 0.05 * slope / norm)
    above = gradients()
    for variable, value in zip(trainable, before, strict=True):
        variable.assign(value)
    (batch,) = batches(learner, examples)
    learner.train_step(batch)
    rates = [0.5 if any(v is one for one in model.head.variables) else 0.01 for v in trainable]
    plain = 0.0
    for variable, value, slope, steep, rate in zip(
        trainable, before, slopes, above, rates, strict=True
    ):
        np.testing.assert_allclose(variable.numpy(), value - rate * steep, rtol=1e-4, atol=2e-6)
        plain = max(plain, float(np.abs(variable.numpy() - (value - rate * slope)).max()))
    assert plain > 1e-4  # it is not the update of one pass


def test_distillation_s_loss_follows_its_formula():
    logits = np.array([[1.0, 0.0, -1.0]], np.float32)
    teacher = np.log(np.array([[0.2, 0.7, 0.1]], np.float32))
    batch = {"label": tf.constant([1]), "teacher": tf.constant(teacher)}

    def softmax(values):
        return np.exp(values) / np.exp(values).sum()

    hard = -np.log(softmax(logits)[0, 1])
    soft = -(softmax(teacher / 2) * np.log(softmax(logits / 2))).sum() * 4
    found = task_of("distillation").losses(tf.constant(logits), batch)
    np.testing.assert_allclose(found, [0.3 * hard + 0.7 * soft], rtol=1e-5)


def test_arcface_widens_the_angle_to_the_photo_s_own_class():
    cosines = np.array([[0.5, 0.1, -0.3]])
    margin = cosines.copy()
    margin[0, 0] = np.cos(np.arccos(0.5) + 0.3)
    expected = -np.log(np.exp(16 * margin[0, 0]) / np.exp(16 * margin).sum())
    found = task_of("arcface").losses(
        tf.constant(16 * cosines, tf.float32), {"label": tf.constant([0])}
    )
    np.testing.assert_allclose(found, [expected], rtol=1e-4)
    learner = learner_of("arcface")
    assert np.abs(logits_of(learner, examples_of(8, "arcface"))).max() <= 16 + 1e-4


def test_random_erasing_covers_a_box_in_half_of_the_photos():
    erasing = example("random_erasing", "RandomErasing", Augmentation)()
    numbers = AugmentationPipeline([erasing]).draw(200, 0, 0)
    shown = erasing.apply(tf.zeros((200, 20, 20, 3)), tf.constant(numbers)).numpy()
    erased = shown[..., 0] == 127.5
    np.testing.assert_array_equal(shown, np.where(erased[..., None], 127.5, 0).repeat(3, axis=3))
    some = erased.any(axis=(1, 2))
    assert 60 < some.sum() < 140
    assert set(np.flatnonzero(some)) <= set(np.flatnonzero(numbers[:, 0] < 0.5))
    for box in erased[some]:
        rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
        assert len(rows) <= 10
        assert len(columns) <= 10
        assert (
            box.sum() == len(rows) * len(columns) == np.ptp(rows + 0) * len(columns) + len(columns)
        )


def test_lars_follows_its_formula():
    optimizer = example("lars", "Lars", keras.optimizers.Optimizer)(learning_rate=0.1)
    variable = keras.Variable([3.0, 4.0])
    optimizer.build([variable])
    value, momentum = np.array([3.0, 4.0]), np.zeros(2)
    for gradient in (np.array([1.0, 0.0]), np.array([0.0, 2.0])):
        optimizer.apply([tf.constant(gradient, tf.float32)], [variable])
        trust = 0.001 * np.linalg.norm(value) / np.linalg.norm(gradient)
        momentum = 0.9 * momentum + 0.1 * trust * gradient
        value = value - momentum
        np.testing.assert_allclose(variable.numpy(), value, rtol=1e-6)


def test_a_source_of_arrays_gives_its_pixels_and_labels():
    source = example("array_source", "Shapes")()
    split = load_split(source, "validation", 64)
    assert len(split) == source.count("validation") == 50
    assert split.labels.tolist() == [0, 1] * 25
    first = next(iter(source.examples("validation")))
    np.testing.assert_array_equal(split.inputs[0][0], first.image)
    assert len(set(split.digests)) == 50
    small = load_split(source, "validation", 32).inputs[0]
    assert small.shape == (50, 32, 32, 3)


def test_a_teacher_s_answers_arrive_with_each_photo(tmp_path, monkeypatch):
    module = example("distillation", "Taught").__module__

    class Teacher(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, None, None, 3), tf.uint8, "pixels")])
        def pixels(self, pixels):
            red = tf.reduce_mean(tf.cast(pixels[..., 0], tf.float32), (1, 2)) / 255
            return {"probabilities": tf.stack([red, 1 - red], axis=1)}

    teacher = Teacher()
    tf.saved_model.save(teacher, str(tmp_path / "t"), signatures={"pixels": teacher.pixels})
    shapes = example("array_source", "Shapes")()
    monkeypatch.setattr(sys.modules[module], "TEACHER", str(tmp_path / "t"))
    monkeypatch.setattr(sys.modules[module], "open_source", lambda *_: shapes)
    taught = example("distillation", "Taught")()
    split = load_split(taught, "test", 64)
    red = split.inputs[0][..., 0].mean(axis=(1, 2)) / 255
    expected = np.log(np.stack([red, 1 - red], axis=1))
    np.testing.assert_allclose(split.arrays["teacher"], expected, rtol=1e-3, atol=1e-3)


def test_paths_in_the_docs_exist():
    text = (ROOT / "docs" / "extending.md").read_text()
    paths = set(re.findall(r"research/\w+/\w+\.py", text))
    assert len(paths) >= 3
    assert all((ROOT / path).is_file() for path in paths)


def test_an_array_of_a_source_cannot_replace_what_a_batch_holds():
    class Clashing(Source):
        class_names = ("a", "b")

        def count(self, split):
            return 1

        def examples(self, split):
            yield Example(np.zeros((8, 8, 3), np.uint8), 0, "one", arrays={"label": 1})

    with pytest.raises(UserError, match="an array named 'label'; expected a name other than"):
        load_split(Clashing(), "train", 8)


def test_labels_of_a_source_have_one_shape():
    class Uneven(Source):
        class_names = ("a", "b")
        labels = ([0.0, 1.0], [1.0])

        def count(self, split):
            return 2

        def examples(self, split):
            for label in self.labels:
                yield Example(np.zeros((8, 8, 3), np.uint8), label, "one")

    with pytest.raises(UserError, match="numbers of the same shape for each photo"):
        load_split(Uneven(), "train", 8)
    Uneven.labels = ([0.0, 1.0], [1.0, 0.0])
    labels = load_split(Uneven(), "train", 8).labels
    assert labels.dtype == np.float32
    assert labels.tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_the_tracker_sends_settings_and_figures_to_mlflow(monkeypatch):
    mlflow = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    tracker = example("mlflow_tracker", "MlflowTracker", Tracker)()
    tracker.begin({"seed": 3}, "runs/one")
    tracker.interval(10, {"loss": 0.5})
    tracker.epoch({"epoch": 1, "step": 12, "validation_loss": 0.25})
    tracker.end({})
    mlflow.start_run.assert_called_once_with(run_name="runs/one")
    mlflow.log_params.assert_called_once_with({"seed": 3})
    assert mlflow.log_metrics.call_args_list == [
        mock.call({"interval/loss": 0.5}, 10),
        mock.call({"epoch": 1.0, "step": 12.0, "validation_loss": 0.25}, 12),
    ]
    mlflow.end_run.assert_called_once_with()
