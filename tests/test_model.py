from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from research.models.backbone import build_backbone, first_trainable_layer
from research.models.backbone_table import find_backbone
from research.models.residual import build_small_resnet
from research.models.split import SplitBackbone, cheapest_cut, crossing_tensors, split_backbone
from research.models.wrapper import (
    Wrapper,
    freeze_below,
    is_kernel,
    penalize,
    summarize_parts,
)
from research.system.errors import UserError
from research.tasks.task import Task

IMAGES = tf.constant(np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype("f4"))
WEIGHT = tf.ones(len(IMAGES))


@pytest.fixture
def backbone():
    return build_small_resnet((32, 32, 3), None)


@pytest.mark.parametrize(("classes", "logits"), [(2, 1), (3, 3), (37, 37)])
def test_number_of_logits(backbone, classes, logits):
    assert Wrapper(backbone, classes)(IMAGES).shape == (2, logits)


def test_logits_are_the_head_applied_to_pooled_features(backbone):
    model = Wrapper(backbone)
    kernel, bias = (variable.numpy() for variable in model.head.variables)
    pooled = backbone(IMAGES, training=False).numpy().mean((1, 2))
    np.testing.assert_allclose(model(IMAGES), pooled @ kernel + bias, rtol=1e-4, atol=1e-6)


def test_all_classes_are_equally_probable_before_the_training(backbone):
    photos = np.random.default_rng(0).random((2, *backbone.input_shape[1:]), np.float32)
    for classes in (2, 3):
        np.testing.assert_array_equal(Wrapper(backbone, classes)(photos), 0)


def test_head_stays_float32_under_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = Wrapper(build_small_resnet((32, 32, 3), None))
        assert model.backbone(IMAGES).dtype == "bfloat16"
        assert model(IMAGES).dtype == "float32"
        assert all(variable.dtype == "float32" for variable in model.trainable_variables)
    finally:
        keras.config.set_dtype_policy("float32")


def test_layers_below_the_index_are_frozen(backbone):
    index = next(i for i, layer in enumerate(backbone.layers) if layer.name.startswith("stage3"))
    freeze_below(backbone, index, "train")
    expected = [v for layer in backbone.layers[index:] for v in layer.trainable_variables]
    assert [v.path for v in backbone.trainable_variables] == [v.path for v in expected]
    assert not any(layer.trainable for layer in backbone.layers[:index])
    assert all(layer.trainable for layer in backbone.layers[index:])


@pytest.mark.parametrize(("mode", "changes"), [("frozen", False), ("train", True), ("sync", True)])
def test_batch_norm_updates_statistics_unless_frozen(backbone, mode, changes):
    freeze_below(backbone, 0, mode)
    norms = [x for x in backbone.layers if isinstance(x, keras.layers.BatchNormalization)]
    before = [norm.moving_mean.numpy() for norm in norms]
    backbone(IMAGES, training=True)
    after = [norm.moving_mean.numpy() for norm in norms]
    changed = [not np.array_equal(x, y) for x, y in zip(before, after, strict=True)]
    assert changed == [changes] * len(norms)
    assert all(bool(norm.trainable_variables) == changes for norm in norms)
    assert all(norm.synchronized == (mode == "sync") for norm in norms)


def test_the_summary_of_parts_counts_every_parameter(backbone):
    model = Wrapper(backbone)
    freeze_below(backbone, 20, "frozen")
    parts = {part.name: part for part in summarize_parts(model, 20)}
    assert sum(part.parameters for part in parts.values()) == model.count_params()
    assert parts["frozen"].layers + parts["backbone"].layers == len(backbone.layers)
    trained = sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
    assert parts["backbone"].parameters + parts["head"].parameters == trained


def test_a_split_at_any_layer_computes_the_same(backbone):
    whole = backbone(IMAGES, training=False).numpy()
    layers = len(backbone.layers)
    # Layers with the same cut are split in the same way.
    cuts = {cheapest_cut(backbone, index) for index in range(2, layers)}
    for index in (0, 1, *sorted(cuts), layers):
        parts = split_backbone(backbone, index)
        features = parts.features(parts.activations(IMAGES), WEIGHT, training=False)
        np.testing.assert_array_equal(features, whole, err_msg=f"cut at layer {index}")


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("EfficientNetV2B0", 100),  # adds the shortcut as the second input; the next, as the first
        ("MobileNetV3Small", 60),  # adds and multiplies between its layers
        ("ConvNeXtTiny", 40),
        ("DenseNet121", 100),  # concatenates
    ],
)
def test_split_inside_a_block_has_several_crossing_tensors(name, index):
    entry = find_backbone(name)
    model = build_backbone(entry, 32, None)
    assert len(crossing_tensors(model, index)) > 1
    parts = SplitBackbone(
        keras.Model(model.input, crossing_tensors(model, index)),
        keras.Model(crossing_tensors(model, index), model.output),
        trunk_cost=1.0,
        rest_cost=1.0,
        crossing=("some",),
    )
    whole = model(IMAGES, training=False).numpy()
    features = parts.features(parts.activations(IMAGES), WEIGHT, training=False)
    np.testing.assert_array_equal(features, whole)
    shared = {id(variable) for variable in model.variables}
    assert {id(variable) for variable in parts.rest.variables} <= shared


@pytest.mark.parametrize(
    ("name", "index", "cut"),
    [("MobileNetV2", 100, "block_11_expand"), ("VGG16", 15, "block5_conv1")],
)
def test_the_cut_moves_down_to_the_smallest_activations(name, index, cut):
    model = build_backbone(find_backbone(name), 32, None)
    place = cheapest_cut(model, index)
    assert model.layers[place].name == cut
    assert index - 10 < place <= index
    assert len(crossing_tensors(model, place)) == 1


class DropPath(keras.layers.Layer):
    def call(self, inputs, training=False):
        return 0.5 * inputs if training else inputs


@pytest.mark.parametrize(
    "random", [keras.layers.Dropout(0.5), keras.layers.GaussianNoise(1.0), DropPath()]
)
@pytest.mark.parametrize("nested", [False, True])
def test_the_cut_does_not_move_below_a_layer_that_is_random_in_training(random, nested):
    image = keras.Input((8, 8, 3))
    hidden = keras.layers.Conv2D(4, 1)(image)
    wide = keras.layers.Conv2D(64, 1)(hidden)  # more expensive to keep than what it is made from
    if nested:
        inner = keras.Input((8, 8, 64))
        random = keras.Model(inner, random(inner))
    outputs = keras.layers.Conv2D(8, 1, name="first")(random(wide))
    model = keras.Model(image, outputs)
    index = model.layers.index(model.get_layer("first"))
    assert cheapest_cut(model, index) == index
    assert cheapest_cut(model, index - 1) < index - 1


def test_only_kernels_without_a_regularizer_of_their_own_are_penalized():
    class WithOwn(Task):
        def make_head(self, feature_shape, class_names, seed):
            pooling, _ = super().make_head(feature_shape, class_names, seed)
            head = keras.layers.Dense(1, kernel_regularizer=keras.regularizers.L1(0.1))
            return pooling, head

    model = Wrapper(build_small_resnet((32, 32, 3), None), task=WithOwn())
    penalize(model, 0.01)
    assert isinstance(model.head.kernel.regularizer, keras.regularizers.L1)
    assert model.head.bias.regularizer is None
    penalized = [one for one in model.backbone.trainable_variables if one.regularizer is not None]
    assert {one.name for one in penalized} == {"kernel"}


def test_one_number_per_channel_is_no_kernel():
    shapes = {(7,): False, (1, 1, 7): False, (1, 1, 1, 7): False, (7, 1): True, (1, 1, 3, 7): True}
    for shape, expected in shapes.items():
        assert is_kernel(keras.Variable(np.zeros(shape))) is expected


class AddsLoss(keras.layers.Dense):
    def __init__(self, units, rate=1.0, name=None):
        super().__init__(units, name=name)
        self.rate = rate

    def call(self, inputs):
        outputs = super().call(inputs)
        self._penalize(outputs)
        return outputs

    def _penalize(self, outputs):
        if self.rate:
            self.add_loss(self.rate * keras.ops.mean(outputs))


class Inherits(AddsLoss):
    pass


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: AddsLoss(1, name="mine"), "calls add_loss"),
        (lambda: Inherits(1, name="mine"), "calls add_loss"),
        (
            lambda: keras.layers.Dense(1, activity_regularizer="l2", name="mine"),
            "has an activity_regularizer",
        ),
    ],
)
def test_a_penalty_of_outputs_is_refused(layer, reason):
    class WithPenalty(Task):
        def make_head(self, feature_shape, class_names, seed):
            pooling, _ = super().make_head(feature_shape, class_names, seed)
            return pooling, keras.Sequential([layer()])

    with pytest.raises(UserError, match=f"the layer 'mine' {reason}, which is not used"):
        Wrapper(build_small_resnet((32, 32, 3), None), task=WithPenalty())


def test_a_penalty_that_is_switched_off_is_allowed():
    class WithoutPenalty(Task):
        def make_head(self, feature_shape, class_names, seed):
            return super().make_head(feature_shape, class_names, seed)[0], AddsLoss(1, rate=0.0)

    model = Wrapper(build_small_resnet((32, 32, 3), None), task=WithoutPenalty())
    assert model.losses == []


def test_a_layer_that_needs_several_examples_is_allowed():
    class Neighbours(keras.layers.Dense):
        def call(self, inputs, training=False):
            outputs = super().call(inputs)
            return (
                outputs + tf.math.top_k(tf.transpose(outputs), 2)[0][:, 0] if training else outputs
            )

    class WithNeighbours(Task):
        def make_head(self, feature_shape, class_names, seed):
            return super().make_head(feature_shape, class_names, seed)[0], Neighbours(1)

    assert Wrapper(build_small_resnet((32, 32, 3), None), task=WithNeighbours()).logits == 1


def test_a_penalty_in_a_backbone_is_refused():
    image = keras.Input((32, 32, 3))
    backbone = keras.Model(image, AddsLoss(4, name="mine")(image))
    with pytest.raises(UserError, match="the layer 'mine' calls add_loss, which is not used"):
        Wrapper(backbone)


def test_a_tensorflow_variable_in_the_head_is_refused():
    class Scaled(keras.layers.Dense):
        def __init__(self, units, name):
            super().__init__(units, name=name)
            self.temperature = tf.Variable(5.0)

    class WithScale(Task):
        def make_head(self, feature_shape, class_names, seed):
            return super().make_head(feature_shape, class_names, seed)[0], Scaled(1, name="mine")

    with pytest.raises(
        UserError, match="the layer 'mine' has variables in 'temperature' that are n"
    ):
        Wrapper(build_small_resnet((32, 32, 3), None), task=WithScale())


def test_a_variable_of_a_task_outside_of_the_head_is_refused():
    class WithVariable(Task):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.temperature = keras.Variable(1.0)

    class WithVariableOfTheHead(Task):
        def make_head(self, feature_shape, class_names, seed):
            pooling, head = super().make_head(feature_shape, class_names, seed)
            head.build((None, feature_shape[-1]))
            self.kernel = head.kernel
            return pooling, head

    backbone = build_small_resnet((32, 32, 3), None)
    with pytest.raises(UserError, match="has variables in 'temperature' that are neither trained"):
        Wrapper(backbone, task=WithVariable())
    task = WithVariableOfTheHead()
    assert Wrapper(backbone, task=task).head.kernel is task.kernel


def test_a_layer_of_a_task_is_allowed_if_it_is_frozen():
    class Distilled(Task):
        def __init__(self, trainable):
            super().__init__()
            teacher = keras.layers.Dense(1, trainable=trainable)
            teacher.build((None, 4))
            self.teachers = {"first": [teacher], 2: "a key that cannot be sorted with the first"}

    backbone = build_small_resnet((32, 32, 3), None)
    assert Wrapper(backbone, task=Distilled(trainable=False)).logits == 1
    with pytest.raises(UserError, match="the task Distilled has variables in 'teachers' that are"):
        Wrapper(backbone, task=Distilled(trainable=True))


def test_a_single_class_is_refused(backbone):
    with pytest.raises(UserError, match="the only class name is 'cat'; expected at least two"):
        Wrapper(backbone, class_names=("cat",))


def test_a_head_with_several_outputs_is_refused(backbone):
    class TwoHeads(Task):
        def make_head(self, feature_shape, class_names, seed):
            pooling, _ = super().make_head(feature_shape, class_names, seed)
            features = keras.Input(feature_shape[-1:])
            outputs = [keras.layers.Dense(1, dtype="float32")(features) for _ in range(2)]
            return pooling, keras.Model(features, outputs)

    with pytest.raises(UserError, match="returns a head with several outputs; expected one tensor"):
        Wrapper(backbone, task=TwoHeads())


def test_splitting_twice_gives_correct_parts(backbone):
    split_backbone(backbone, 10)
    whole = backbone(IMAGES, training=False).numpy()
    parts = split_backbone(
        backbone, first_trainable_layer(backbone, find_backbone("SmallResNet"), "stage2")
    )
    np.testing.assert_array_equal(parts.features(parts.activations(IMAGES), WEIGHT, False), whole)
