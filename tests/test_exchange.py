"""Gradients that devices send as bfloat16: rounded once, and summed in float32."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import tensorflow as tf

from research.loop.exchange import resolve_exchange, sum_gradients
from research.tasks.task import Gradients
from tests.helpers import SMALL_RUN, run_script
from tests.learners import (
    ODD,
    feed,
    make_learner,
    metrics_of,
    mirrored,
    model_of,
    some_photos,
)


def rounded(values: np.ndarray) -> np.ndarray:
    return tf.cast(tf.cast(values, tf.bfloat16), tf.float32).numpy()


@pytest.mark.parametrize("replicas", [2, 3])
def test_each_gradient_is_rounded_once_and_the_sums_are_float32(replicas):
    """Equal to the sum written by hand, bit for bit; infinity and NaN arrive as they are."""
    generator = np.random.default_rng(0)
    shapes = ((3, 3, 2, 5), (5,), ())
    sent = [generator.normal(size=(replicas, *shape)).astype(np.float32) for shape in shapes]
    sent[0][:, 0, 0, 0] = [[256.0] * 5] + [[1.0] * 5] * (replicas - 1)  # 256 as a bfloat16 sum
    sent[1][0, :2] = np.inf, np.nan
    loss = (1.0 + np.arange(replicas) / 1000).astype(np.float32)  # not rounded
    strategy = mirrored(replicas)

    @tf.function(autograph=False)
    def total() -> Gradients:
        def on_replica() -> Gradients:
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            values = [tf.gather(values, replica) for values in sent]
            return sum_gradients(Gradients(values, {"loss": tf.gather(loss, replica)}), "bfloat16")

        return tf.nest.map_structure(strategy.experimental_local_results, strategy.run(on_replica))

    values, sums = total()
    for found, own in zip(values, sent, strict=True):
        expected = rounded(own).sum(axis=0, dtype=np.float32)
        for copy in found:
            assert copy.dtype == tf.float32
            np.testing.assert_array_equal(copy.numpy(), expected)
    assert values[0][0][0, 0, 0, 0] == 256 + replicas - 1
    np.testing.assert_allclose(sums["loss"][0].numpy(), loss.sum(), rtol=1e-7)


def test_an_update_differs_by_the_rounding_and_the_figures_do_not():
    learners = [
        make_learner(dataclasses.replace(ODD, exchange=exchange), 2)
        for exchange in ("float32", "bfloat16")
    ]
    before = [variable.numpy() for variable in model_of(learners[0]).trainable_variables]
    (batch,) = feed(learners[0], some_photos(8), 8)
    for learner in learners:
        learner.train_step(batch)
    one, two = (metrics_of(learner) for learner in learners)
    assert one.values == two.values
    differs = False
    for start, *after in zip(
        before, *(model_of(one).trainable_variables for one in learners), strict=True
    ):
        plain, other = (variable.numpy() - start for variable in after)
        assert np.linalg.norm(plain - other) <= 2**-7 * np.linalg.norm(plain)
        differs |= not np.array_equal(plain, other)
    assert differs


def test_only_two_or_three_devices_send_less():
    assert [resolve_exchange("bfloat16", replicas) == "bfloat16" for replicas in range(1, 6)] == [
        *(False, True, True, False, False)
    ]
    assert resolve_exchange("float32", 2) == "float32"


def test_a_run_keeps_its_exchange_and_says_where_it_has_no_effect(photo_folder, tmp_path):
    flags = [*SMALL_RUN, f"--image_folder={photo_folder}", "--ckpt_dir=run", "--epochs=1"]
    flags += ["--steps_per_epoch=1", "--exchange=bfloat16", "--recompute=blocks"]
    process = run_script(tmp_path, "run_train.py", *flags, "--virtual_devices=2")
    assert process.returncode == 0, process.stderr
    assert "no effect" not in process.stdout
    assert re.search(r"^recomputed   \d of \d blocks of unfrozen layers$", process.stdout, re.M)
    process = run_script(tmp_path, "run_train.py", *flags, "--exchange=float32")
    assert process.returncode == 2
    assert "exchange" in process.stderr
    assert "'bfloat16'" in process.stderr
    assert "'float32'" in process.stderr
    # Whether blocks are recomputed, and the number of devices, may change.
    flags += ["--recompute=none"]
    process = run_script(tmp_path, "run_train.py", *flags)
    assert process.returncode == 0, process.stderr
    note = "note: --exchange=bfloat16 has no effect with 1 device, only with 2 or 3"
    assert note in process.stdout
    assert "recomputed" not in process.stdout
