"""What epochs train from instead of photos, and that the losses do not change by it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from research.data.augmentation import (
    Augmentation,
    AugmentationPipeline,
    HorizontalFlip,
    Mixing,
    RandAugment,
    RandomCrop,
)
from research.data.folder.folder_source import FolderSource
from research.data.loader import DataLoader, scale_to_unit
from research.data.order import share_out
from research.data.source import Source
from research.loop.builder import feature_epochs, make_groups
from research.loop.learner import Learner
from research.loop.plan import make_plan
from research.loop.run_state import RunState
from research.loop.steps import Network
from research.loop.trunk import frozen_layers as trunk
from research.loop.trunk.description import describe_outputs
from research.loop.trunk.frozen_layers import FrozenLayers, _first_rows_match, bytes_per_photo
from research.models import residual
from research.models.backbone import stage_starts
from research.models.backbone_table import find_backbone
from research.models.split import split_backbone
from research.models.wrapper import Wrapper, freeze_below
from research.settings.train_config import TrainConfig
from research.system.errors import UserError
from tests.helpers import randomize_head
from tests.learners import CONFIG as SETTINGS
from tests.learners import SHAPES, TASK, mirrored

SIZE = 32
CONFIG = dataclasses.replace(
    SETTINGS,
    image_size=SIZE,
    epochs=1,
    steps_per_epoch=3,
    head_learning_rate=0.1,
    trunk_cache="memory",
)


FLIP = AugmentationPipeline([HorizontalFlip()])


def frozen_layers(config, network, photos, plan, features_until, devices=1) -> FrozenLayers:
    return FrozenLayers(
        network, photos, plan, features_until, config.trunk_cache, config.cache_dir, devices
    )


def small_resnet():
    return residual.build_small_resnet((SIZE, SIZE, 3), None)


@pytest.fixture(scope="module")
def decoded(photo_folder):
    """The drawn photos, decoded once for all tests of this module."""
    loader = DataLoader(SIZE, 8, source=FolderSource(str(photo_folder)), seed=1)
    for split in ("train", "validation"):
        loader.examples(split)
    return loader


def loader_of(
    decoded: DataLoader,
    augmentation: AugmentationPipeline | None = None,
    mirror_averaging: bool = False,
) -> DataLoader:
    loader = DataLoader(
        SIZE,
        8,
        source=decoded.source,
        seed=1,
        preprocessing=scale_to_unit,
        augmentation=augmentation or AugmentationPipeline(),
        mirror_averaging=mirror_averaging,
    )
    loader.loaded = dict(decoded.loaded)
    return loader


@pytest.fixture
def on_disk(tmp_path):
    return dataclasses.replace(CONFIG, trunk_cache="disk", cache_dir=str(tmp_path / "cache"))


def entries(config: TrainConfig) -> set[str]:
    return {path.name for path in Path(str(config.cache_dir)).iterdir() if path.is_dir()}


def make_network(build=small_resnet, cut: int | None = None, bn_mode: str = "frozen") -> Network:
    keras.utils.set_random_seed(0)
    base = build()
    cut = len(base.layers) if cut is None else cut
    model = randomize_head(Wrapper(base, 2))
    freeze_below(base, cut, bn_mode)
    return Network(model, split_backbone(base, cut))


def kinds(inputs) -> tuple[str, str]:
    return inputs.head.network.input_kind, inputs.whole.network.input_kind


def prepare(network, photos, config=CONFIG, devices=1):
    """Runs the frozen layers; returns the plan, the groups, the state and the epochs' inputs."""
    state = RunState(SHAPES)
    plan = make_plan(config, photos.num_train_examples)
    groups = make_groups(config, network.model, state.step, plan)
    features_until = feature_epochs(photos, plan, groups)
    frozen = frozen_layers(config, network, photos, plan, features_until, devices)
    return plan, groups, state, frozen.run(frozen.choose(0, None))


def train(network, photos, config=CONFIG, strategy=None):
    """Trains a run's epochs; returns the mean training and the validation loss of each."""
    strategy = strategy or tf.distribute.get_strategy()
    devices = strategy.num_replicas_in_sync
    plan, groups, state, inputs = prepare(network, photos, config, devices)
    losses = []
    for epoch in range(plan.epochs):
        feed = inputs.for_epoch(epoch)
        begun = groups if epoch >= plan.head_epochs else groups[:1]
        learner = Learner(strategy, TASK, feed.network, begun, state)
        batches = iter(
            share_out(
                lambda share, feed=feed, epoch=epoch: feed.loader.epoch_batches(epoch, 0, share),
                strategy,
            )
        )
        learner.train_steps(batches, plan.steps_per_epoch)
        sums = state.tally.read()
        validation = share_out(
            lambda share, feed=feed: feed.loader.split_batches("validation", share), strategy
        )
        loss = float(sums["loss"] / sums["weight"])
        losses.append((loss, learner.evaluate(validation).loss))
        state.tally.reset()
    return losses, inputs


def both(build, cut, photos, config=CONFIG, bn_mode="frozen"):
    with_cache, inputs = train(make_network(build, cut, bn_mode), photos, config)
    off = dataclasses.replace(config, trunk_cache="off")
    without, _ = train(make_network(build, cut, bn_mode), photos, off)
    return with_cache, without, inputs


def assert_same_features(inputs, network, photos):
    """Compares features from the cache with those from photos, photo by photo, before training."""
    from_cache = dataclasses.replace(network, input_kind=inputs.whole.network.input_kind)
    cached = next(iter(inputs.whole.loader.split_batches("validation")))
    whole = next(iter(photos.split_batches("validation")))
    expected = network.features(whole, training=False).numpy()
    spread = expected.std(axis=0).max()
    assert spread > 0
    found = from_cache.features(cached, training=False).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * spread)


@pytest.mark.parametrize("cut", ["stage3", 15], ids=["stage", "within a block"])
def test_losses_with_the_cached_trunk_are_those_without(decoded, cut):
    photos = loader_of(decoded)
    if cut == "stage3":
        cut = stage_starts(small_resnet(), find_backbone("SmallResNet"))[cut]
    with_cache, without, inputs = both(small_resnet, cut, photos)
    assert inputs.whole.network.input_kind == "activations"
    assert_same_features(inputs, make_network(small_resnet, cut), photos)
    np.testing.assert_allclose(with_cache, without, rtol=1e-4)


# An epoch from features, then one from activations.
TWO_KINDS = dataclasses.replace(CONFIG, head_epochs=1)


@pytest.fixture(scope="module")
def losses_without_views(decoded):
    losses, _ = train(make_network(small_resnet, 20), loader_of(decoded), TWO_KINDS)
    return np.array(losses)


@pytest.fixture(scope="module")
def flipped(decoded):
    """The losses and inputs of a run with flips, whose two views are cached."""
    return train(make_network(small_resnet, 20), loader_of(decoded, FLIP), TWO_KINDS)


def test_each_view_is_cached_so_that_augmentation_stays_exact(
    decoded, flipped, losses_without_views
):
    with_cache, inputs = flipped
    off = dataclasses.replace(TWO_KINDS, trunk_cache="off")
    without, _ = train(make_network(small_resnet, 20), loader_of(decoded, FLIP), off)
    assert kinds(inputs) == ("features", "activations")
    for feed in (inputs.head, inputs.whole):
        assert feed.loader.examples("train").views == 2
        assert feed.loader.examples("validation").views == 1
    np.testing.assert_allclose(with_cache, without, rtol=1e-4)
    assert not np.allclose(without, losses_without_views, rtol=1e-3)


def test_mirror_images_are_cached_for_validation_too(decoded, losses_without_views):
    photos = loader_of(decoded, mirror_averaging=True)
    with_cache, without, inputs = both(small_resnet, 20, photos, TWO_KINDS)
    assert kinds(inputs) == ("features", "activations")
    for feed in (inputs.head, inputs.whole):
        assert feed.loader.examples("train").views == 1
        assert feed.loader.examples("validation").views == 2
    np.testing.assert_allclose(with_cache, without, rtol=1e-4)
    trained, validated = np.array(without).T
    np.testing.assert_allclose(trained, losses_without_views[:, 0], rtol=1e-4)
    assert np.abs(validated / losses_without_views[:, 1] - 1).min() > 1e-4


@pytest.mark.parametrize(
    "endless",
    [RandomCrop(0.5), Mixing(mixup=0.4, cutmix=1.0), RandAugment(5.0)],
    ids=lambda endless: endless.name,
)
def test_what_is_drawn_without_end_waits_for_fine_tuning(decoded, flipped, endless):
    """Head epochs train from features of the few views, as without it."""
    plain, _ = flipped
    photos = loader_of(decoded, AugmentationPipeline([*FLIP.steps, endless]))
    losses, inputs = train(make_network(small_resnet, 20), photos, TWO_KINDS)
    assert (inputs.head.network.input_kind, inputs.whole.network.input_kind) == (
        "features",
        "photos",
    )
    assert inputs.head.loader.examples("train").views == 2
    assert losses[0] == pytest.approx(plain[0], rel=1e-4)
    assert losses[1][0] != pytest.approx(plain[1][0], rel=1e-4)


def test_the_head_trains_from_pooled_features(decoded):
    config = dataclasses.replace(CONFIG, head_epochs=2, epochs=1)
    with_cache, without, inputs = both(small_resnet, 20, loader_of(decoded), config, "train")
    assert inputs.head.network.input_kind == "features"
    (features,) = inputs.head.loader.examples("train").inputs
    assert features.shape == (decoded.num_train_examples, 96)
    assert features.dtype == np.float32
    np.testing.assert_allclose(with_cache, without, rtol=1e-4)


def test_batches_at_the_same_time_give_the_same_bits(decoded, monkeypatch):
    monkeypatch.setattr(trunk, "BATCH_SIZE", 12)  # five batches, and a shorter one
    found = {}
    for count in (1, 2):
        monkeypatch.setattr("research.system.devices.concurrent_batches", lambda count=count: count)
        *_, inputs = prepare(make_network(), loader_of(decoded))
        found[count] = inputs.head.loader.examples("train").inputs[0]
    assert len(found[1]) == 64
    np.testing.assert_array_equal(found[1], found[2])


def test_features_need_no_activations_where_nothing_else_is_trained(decoded):
    with_cache, without, inputs = both(small_resnet, None, loader_of(decoded))
    assert (inputs.head.network.input_kind, inputs.whole.network.input_kind) == (
        "features",
        "photos",
    )
    np.testing.assert_allclose(with_cache, without, rtol=1e-4)


def test_a_loop_on_two_devices_gives_what_one_gives(decoded, on_disk):
    one, _ = train(make_network(), loader_of(decoded), on_disk)
    kept = entries(on_disk)
    with mirrored(2).scope():
        network = make_network()
        two, inputs = train(network, loader_of(decoded), on_disk, strategy=mirrored(2))
    assert inputs.head.network.input_kind == "features"
    assert entries(on_disk) == kept
    np.testing.assert_allclose(one, two, rtol=1e-4)


def test_a_resumed_run_does_what_it_did(decoded, tmp_path):
    config = dataclasses.replace(CONFIG, trunk_cache="auto", cache_dir=str(tmp_path))
    photos, network = loader_of(decoded), make_network(small_resnet, 20)

    def place(config, cached=None):
        plan = make_plan(config, photos.num_train_examples)
        (choice,) = frozen_layers(config, network, photos, plan, 0).choose(0, cached)
        return choice.decision.place

    assert place(config) is None  # one epoch does not pay
    assert place(config, {"activations": True}) == "memory"
    config = dataclasses.replace(config, epochs=30)
    assert place(config) == "memory"
    assert place(config, {"activations": False}) is None


def test_a_photo_takes_what_crosses_the_cut():
    parts = make_network(small_resnet, 20).parts
    (tensor,) = parts.trunk.outputs
    _, height, width, channels = tensor.shape
    assert bytes_per_photo(parts) == 4 * height * width * channels


def test_phases_are_planned_from_where_the_run_stands(decoded):
    config = dataclasses.replace(CONFIG, head_epochs=2, epochs=3, steps_per_epoch=0)
    network, photos = make_network(small_resnet, 20), loader_of(decoded)
    plan = make_plan(config, photos.num_train_examples)
    frozen = frozen_layers(config, network, photos, plan, 2)
    tuned, head = frozen.phases(0)
    assert (tuned.input_kind, tuned.epochs, tuned.visits) == ("activations", 3, 3)
    assert (head.input_kind, head.epochs, head.visits) == ("features", 2, 2)
    assert head.bytes_per_photo == 4 * 96
    assert head.spared_cost == pytest.approx(tuned.spared_cost + tuned.other_cost)
    assert len(frozen.phases(plan.head_steps - 1)) == 2
    assert frozen.phases(plan.head_steps) == [tuned]
    assert frozen.phases(plan.steps) == []


def test_a_second_run_finds_what_the_first_one_kept(decoded, on_disk, capsys):
    photos = loader_of(decoded, FLIP)
    in_memory, _ = train(make_network(small_resnet, 20), photos)
    first, _ = train(make_network(small_resnet, 20), photos, on_disk)
    assert "activations on disk, " in capsys.readouterr().out
    kept = entries(on_disk)
    assert len(kept) == 2  # train and validation
    for setting in ("disk", "auto"):
        config = dataclasses.replace(on_disk, trunk_cache=setting)
        second, _ = train(make_network(small_resnet, 20), photos, config)
        assert "activations on disk, found there" in capsys.readouterr().out
        assert first == second == in_memory
    assert entries(on_disk) == kept


def test_an_empty_validation_split_is_left_out(decoded, on_disk, capsys):
    class NoValidation(Source):
        def count(self, split: str) -> int:
            return 0 if split == "validation" else decoded.source.count(split)

        def examples(self, split: str):
            return iter(()) if split == "validation" else decoded.source.examples(split)

    config = dataclasses.replace(on_disk, head_epochs=1)
    for expected in ("on disk, ", "on disk, found there"):
        photos = loader_of(decoded, FLIP, mirror_averaging=True)
        photos.source, photos.loaded = NoValidation(), {"train": decoded.examples("train")}
        *_, inputs = prepare(make_network(small_resnet, 20), photos, config)
        assert kinds(inputs) == ("features", "activations")
        assert capsys.readouterr().out.count(expected) == 2
        assert len(entries(config)) == 2  # features and activations of the training photos
        assert inputs.whole.loader.examples("train").views == 2


def with_other_weights():
    base = small_resnet()
    kernel = base.layers[1].kernel
    value = kernel.numpy()
    value.flat[0] += 1e-3
    kernel.assign(value)
    return base


def test_what_was_made_from_something_else_is_never_used(decoded, on_disk):
    photos = loader_of(decoded)
    prepare(make_network(small_resnet, 20), photos, on_disk)
    kept = entries(on_disk)

    def made_anew(network, loader=photos) -> int:
        nonlocal kept
        prepare(network, loader, on_disk)
        before, kept = kept, entries(on_disk)
        assert kept > before or kept == before
        return len(kept - before)

    assert made_anew(make_network(small_resnet, 20)) == 0
    assert made_anew(make_network(small_resnet, 20, bn_mode="sync")) == 0
    # Another first trainable layer with the same cut below it is the same trunk.
    assert made_anew(make_network(small_resnet, 21)) == 0
    assert made_anew(make_network(with_other_weights, 20)) == 2
    assert made_anew(make_network(small_resnet, 12)) == 2
    assert made_anew(make_network(small_resnet, None)) == 2  # features
    other_photos = loader_of(decoded)
    examples = other_photos.examples("train")
    digests = (*examples.digests[:-1], "0" * 16)  # of a photo with other content
    other_photos.loaded["train"] = dataclasses.replace(examples, digests=digests)
    assert made_anew(make_network(small_resnet, 20), other_photos) == 1
    otherwise_prepared = loader_of(decoded)
    otherwise_prepared.preprocessing = lambda image: image / 255.0
    assert made_anew(make_network(small_resnet, 20), otherwise_prepared) == 2
    assert made_anew(make_network(small_resnet, 20), loader_of(decoded, FLIP)) == 1
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        assert made_anew(make_network(small_resnet, 20)) == 2
    finally:
        keras.config.set_dtype_policy("float32")


def test_a_layer_whose_code_changed_is_noticed(decoded, on_disk, monkeypatch):
    photos = loader_of(decoded)
    before, _ = train(make_network(small_resnet, 20), photos, on_disk)
    kind = keras.layers.Activation
    call = kind.call
    monkeypatch.setattr(kind, "call", lambda self, inputs: 3 * call(self, inputs))
    memory = dataclasses.replace(on_disk, trunk_cache="memory")
    expected, _ = train(make_network(small_resnet, 20), photos, memory)
    assert expected != before
    found, _ = train(make_network(small_resnet, 20), photos, on_disk)
    assert found == expected


class Turned(Augmentation):
    """Two views, of which one is turned by `quarters`."""

    numbers, views, quarters = 1, 2, 1

    def view_of(self, numbers):
        return (numbers[..., 0] >= 0.5).astype(np.int64)

    def numbers_of(self, view):
        return np.float32([view / 2])

    def change_pixels(self, photos, numbers):
        turned = np.rot90(photos, self.quarters, axes=(1, 2))
        return np.where(self.view_of(numbers)[:, None, None, None] == 1, turned, photos)


class Darkened(Augmentation):
    views, factor = 1, 1.0

    def apply(self, photos, numbers):
        return self.factor * photos


def test_the_code_of_an_augmentation_and_the_pooling_are_described(decoded, monkeypatch):
    def described(network, kind="features"):
        photos = loader_of(decoded, Turned())
        return describe_outputs(network, photos, kind, {"train": 2})["train"]

    network = make_network(small_resnet, None)
    before = described(network)
    assert described(network) == before
    monkeypatch.setattr(Turned, "quarters", 2)
    other = described(network)
    assert {name for name in other if other[name] != before[name]} == {"prepared_sha256"}
    # So are augmentations that change all photos in the same way.
    with_one_view = []
    for factor in (1.0, 0.5):
        monkeypatch.setattr(Darkened, "factor", factor)
        (found,) = describe_outputs(
            network, loader_of(decoded, Darkened()), "features", {"train": 1}
        ).values()
        with_one_view.append(found["prepared_sha256"])
    assert with_one_view[0] != with_one_view[1]
    activations = described(network, "activations")
    monkeypatch.setattr(network.model, "pooling", keras.layers.Flatten())
    flat = described(network)
    assert {name for name in flat if flat[name] != other[name]} == {"layers_sha256"}
    assert described(network, "activations") == activations


def test_cached_rows_of_another_shape_do_not_match(decoded):
    computed = tf.zeros((4, 6))
    for shape, expected in (((9, 6), True), ((9, 5), False), ((3, 6), False)):
        found = [np.zeros(shape, np.float32)]
        assert (
            _first_rows_match(lambda _: [computed], loader_of(decoded), "train", found) == expected
        )


class Nameless(keras.layers.Layer):
    """A layer of which Keras cannot write down what it is made from."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, inputs):
        return self.function(inputs)


def with_a_nameless_layer():
    inputs = keras.Input((SIZE, SIZE, 3))
    hidden = Nameless(lambda values: 2 * values)(keras.layers.Conv2D(4, 3, strides=4)(inputs))
    outputs = keras.layers.Conv2D(8, 3, strides=2)(hidden)
    return keras.Model(inputs, outputs)


def test_what_cannot_be_described_is_not_kept_on_disk(decoded, on_disk):
    with pytest.raises(UserError, match=r"without get_config.*; give --trunk_cache=memory or off"):
        train(make_network(with_a_nameless_layer, 3), loader_of(decoded), on_disk)
    assert not Path(on_disk.cache_dir).exists()
