from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from research.settings import train_config
from research.system.errors import UserError
from research.tasks import checks
from research.tasks.losses import balanced_weights
from research.tasks.task import Task


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Of each class, (batch, classes), from logits (batch, 1 or classes)."""
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


def cross_entropy(targets: np.ndarray, logits: np.ndarray) -> np.ndarray:
    return -np.sum(targets * np.log(probabilities(logits)), axis=1)


@pytest.mark.parametrize("classes", [2, 5])
def test_the_loss_is_the_cross_entropy_with_softened_and_mixed_targets(classes):
    generator = np.random.default_rng(0)
    outputs = 1 if classes == 2 else classes
    logits = generator.normal(size=(6, outputs)).astype(np.float32)
    labels = generator.integers(classes, size=6).astype(np.int32)
    partners = generator.integers(classes, size=6).astype(np.int32)
    share = generator.random(6).astype(np.float32)
    one_hot = np.eye(classes)
    batch = {"label": tf.constant(labels)}

    def softened(labels):
        return 0.8 * one_hot[labels] + 0.2 / classes

    np.testing.assert_allclose(
        Task().losses(logits, batch), cross_entropy(one_hot[labels], logits), rtol=1e-5
    )
    np.testing.assert_allclose(
        Task(label_smoothing=0.2).losses(logits, batch),
        cross_entropy(softened(labels), logits),
        rtol=1e-5,
    )
    mixed = {**batch, "partner_label": tf.constant(partners), "partner_share": tf.constant(share)}
    targets = (1 - share[:, None]) * softened(labels) + share[:, None] * softened(partners)
    np.testing.assert_allclose(
        Task(label_smoothing=0.2).losses(logits, mixed), cross_entropy(targets, logits), rtol=1e-5
    )


def test_smoothing_over_500_classes_takes_as_many_operations_as_over_5():
    def operations(classes: int) -> int:
        loss = tf.function(Task(label_smoothing=0.1).losses, autograph=False)
        labels = {"label": tf.TensorSpec((8,), tf.int32)}
        graph = loss.get_concrete_function(tf.TensorSpec((8, classes)), labels).graph
        return len(graph.get_operations())

    assert operations(500) == operations(5)


def test_class_weights_are_factors_of_the_losses():
    logits, labels = tf.constant([[0.3], [-1.0], [2.0]]), tf.constant([0, 1, 1])
    plain = Task().losses(logits, {"label": labels}).numpy()
    weighed = Task(class_weights=(3.0, 0.5)).losses(logits, {"label": labels}).numpy()
    np.testing.assert_allclose(weighed, plain * [3.0, 0.5, 0.5], rtol=1e-6)


def test_balanced_weights_are_one_on_average_and_equal_over_classes():
    weights = balanced_weights((10, 30, 0))
    assert weights == (2.0, pytest.approx(2 / 3), 0.0)
    assert 10 * weights[0] + 30 * weights[1] == pytest.approx(40)


def test_figures_of_classes_are_refused_for_other_numbers():
    class Age(Task):
        def losses(self, logits, batch):
            return tf.square(logits[:, 0] - batch["label"])

    class AgeAlone(Age):
        def metrics(self, logits, batch):
            return {"error": tf.abs(logits[:, 0] - batch["label"])}

    batch = {"label": tf.TensorSpec((None,), tf.float32)}
    with pytest.raises(UserError, match=r"Age\.metrics returns the accuracy .* labels are float32"):
        checks.sum_shapes(Age(), 1, batch)
    assert checks.sum_shapes(AgeAlone(), 1, batch).keys() == {"loss", "error", "weight"}


def test_the_flag_knows_the_tasks_of_the_table():
    assert tuple(checks.TASKS) == train_config.TASKS
