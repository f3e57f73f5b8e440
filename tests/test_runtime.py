from __future__ import annotations

import pytest
import tensorflow as tf
from tensorflow.python.eager import context  # not public
from tensorflow.python.framework.config import disable_op_determinism  # not public

from research.loop.builder import build_model
from research.loop.preparation import exchange_within_step
from research.models.backbone_table import find_backbone
from research.runs import console
from research.settings.train_config import TrainConfig
from research.system import devices
from research.system.devices import (
    fast_precision,
    resolve_precision,
    resolve_xla,
    set_precision,
)
from research.system.errors import UserError
from research.tasks.task import Task

NONE: frozenset[str] = frozenset()


@pytest.mark.parametrize(
    ("capabilities", "cpu_flags", "expected"),
    [
        ([(9, 0)], NONE, "bfloat16"),
        ([(8, 0), (9, 0)], NONE, "bfloat16"),
        ([(7, 5)], NONE, "float16"),
        ([(9, 0), (7, 0)], NONE, "float16"),  # the slowest GPU decides
        ([(6, 1)], frozenset({"amx_bf16"}), "float32"),
        ([], NONE, "float32"),
        ([], frozenset({"avx512_bf16"}), "float32"),
        ([], frozenset({"amx_bf16"}), "bfloat16"),
    ],
)
def test_auto_precision_is_fast_on_the_slowest_device(capabilities, cpu_flags, expected):
    assert fast_precision(capabilities, cpu_flags) == expected


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_requested_precision_is_used(precision):
    assert resolve_precision(precision) == precision


@pytest.mark.parametrize(
    ("backbone", "precision", "bn_mode", "expected"),
    [
        ("MobileNetV4ConvSmall", "auto", "train", "float32"),  # with slow gradients
        ("MobileNetV4ConvSmall", "auto", "frozen", "bfloat16"),
        ("MobileNetV4ConvSmall", "bfloat16", "train", "bfloat16"),
        ("SmallResNet", "auto", "train", "bfloat16"),
    ],
)
def test_auto_precision_on_a_cpu_depends_on_the_backbone(backbone, precision, bn_mode, expected):
    config = TrainConfig(
        dataset="digits",
        backbone=backbone,
        weights="none",
        image_size=32,
        precision=precision,
        bn_mode=bn_mode,
    )
    set_precision("bfloat16")  # as `start` does on a CPU with matrix units
    try:
        model, _ = build_model(config, ("a", "b"))
        layers = model.backbone.layers
        assert {layer.compute_dtype for layer in layers if layer.weights} == {expected}
    finally:
        set_precision("float32")


@pytest.mark.parametrize(
    ("requested", "flag", "backbone", "factor"),
    [
        ("float32", "amx_bf16", "MobileNetV2", "1.0 to 1.6"),
        ("float32", "amx_bf16", "VGG16", "1.5 to 4.6"),
        ("auto", "avx512_bf16", "VGG16", "1.4 to 1.8"),
        ("auto", "avx512_bf16", "MobileNetV2", None),
        ("auto", "amx_bf16", "MobileNetV2", None),  # has chosen float32 because it is faster
        ("auto", "avx2", "VGG16", None),
    ],
)
def test_a_run_in_float32_says_that_bfloat16_is_faster(
    monkeypatch, requested, flag, backbone, factor
):
    monkeypatch.setattr(console.devices, "cpu_flags", lambda: frozenset({flag}))
    model = find_backbone(backbone).build((32, 32, 3), None)
    lines = console.precision_lines(requested, model)
    assert lines == [
        f"note: steps are {number} times as fast here with --precision=bfloat16"
        for number in [factor]
        if number
    ]
    assert all(len(line) < 80 for line in lines)


def test_sums_of_several_tensors_have_a_fixed_order(monkeypatch):
    def operations() -> set[str]:
        @tf.function(autograph=False)
        def compute(value: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            large = tf.fill((60_000_000,), value)  # more memory than TensorFlow's limit for a CPU
            parts = [function(value * tf.ones(3)) for function in (tf.exp, tf.sin, tf.cos)]
            return tf.add_n(parts), tf.reduce_max(large)

        context.context().enable_graph_collection()
        compute(tf.constant(0.5))
        run = context.context().export_run_metadata()
        context.context().disable_graph_collection()
        graphs = [graph for one in run.function_graphs for graph in one.partition_graphs]
        return {node.op for graph in graphs for node in graph.node}

    with monkeypatch.context() as patch:
        patch.setattr(context.context(), "_config", None)
        tf.config.optimizer.set_experimental_options({})
        assert "TemporaryVariable" in operations()  # the order of its sum depends on the threads
    devices.prepare(seed=0, deterministic=False, virtual_devices=1)
    assert "TemporaryVariable" not in operations()
    assert "AddN" in operations()


def test_auto_xla_is_for_long_runs_on_gpus(monkeypatch):
    assert not resolve_xla("auto", None, 1_000_000)  # no GPU here
    assert resolve_xla("on", None, 1)
    monkeypatch.setattr(devices, "has_gpu", lambda: True)
    assert resolve_xla("auto", None, 3_000)
    assert not resolve_xla("auto", None, 2_999)
    assert not resolve_xla("off", None, 1_000_000)


def test_xla_cannot_compile_an_exchange_between_devices(monkeypatch):
    class Talks(Task):
        communicates = True

    assert exchange_within_step(TrainConfig(), Task()) is None
    for config, task, reason in (
        (TrainConfig(bn_mode="sync"), Task(), "bn_mode is 'sync'"),
        (TrainConfig(), Talks(), "the task Talks exchanges values"),
    ):
        exchange = exchange_within_step(config, task)
        with pytest.raises(UserError, match=reason):
            resolve_xla("on", exchange, 1)
        monkeypatch.setattr(devices, "has_gpu", lambda: True)
        assert not resolve_xla("auto", exchange, 1_000_000)


def test_a_process_that_was_deterministic_stays_so():
    """A later run of a session must not use operations that are now refused."""
    assert not devices.is_deterministic()
    tf.config.experimental.enable_op_determinism()
    try:
        assert devices.is_deterministic()
    finally:
        disable_op_determinism()
    assert not devices.is_deterministic()
