"""A backbone in a file of the user's own: trained, evaluated, exported, or refused in one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from research.evaluation.classifier import Classifier, notes_on_files, settings_of_run
from research.evaluation.grad_cam import grad_cam
from research.loop.agreement import check_settings
from research.loop.builder import build_network, make_groups
from research.loop.plan import make_plan
from research.models.backbone import first_trainable_layer
from research.runs.run_directory import RunDirectory
from research.serving.export import export
from research.settings.program_configs import ExportConfig
from research.settings.train_config import TrainConfig, python_files
from research.system.errors import UserError
from tests.helpers import SMALL_CONFIG, SMALL_RUN, run_script
from tests.launcher import ROOT

FLAGS = (
    *SMALL_RUN,
    "--backbone=net.py:SmallVGG",
    "--unfreeze_from=block4",
    "--head_epochs=0",
    "--epochs=1",
    "--steps_per_epoch=2",
    "--virtual_devices=2",
    "--trunk_cache=disk",
    "--cache_dir=cache",
    "--ckpt_dir=run",
)


def write_network(folder: Path) -> str:
    """Writes the example, with fewer channels. Returns the value of `--backbone`."""
    text = (ROOT / "examples" / "small_vgg.py").read_text()
    (folder / "net.py").write_text(text.replace("(16, 32, 64, 96)", "(4, 4, 8, 8)"))
    return f"{folder / 'net.py'}:SmallVGG"


@pytest.fixture(scope="module")
def own(tmp_path_factory, photo_folder):
    """A folder with a backbone, and a run that trained it."""
    folder = tmp_path_factory.mktemp("own")
    write_network(folder)
    process = run_script(folder, "run_train.py", *FLAGS, f"--image_folder={photo_folder}")
    assert process.returncode == 0, process.stderr
    (folder / "stdout.txt").write_text(process.stdout)
    return folder


@pytest.fixture(scope="module")
def backbone(own):
    return f"{own / 'net.py'}:SmallVGG"


def test_a_run_trains_a_backbone_in_a_file_and_says_so(own, backbone):
    text = (own / "stdout.txt").read_text()
    assert "devices      2 CPU" in text
    assert "backbone     net.py:SmallVGG at 32 x 32 pixels" in text
    assert "python run_eval.py --ckpt_dir=run --backbone=net.py:SmallVGG\n" in text
    config = json.loads((own / "run" / "config.json").read_text())
    assert config["backbone"] == backbone
    assert set(config["sha256_of_python_files"]) == {"backbone"}
    assert len([path for path in (own / "cache").iterdir() if path.is_dir()]) == 2  # by split


@pytest.mark.parametrize("script", ["run_eval.py", "run_predict.py", "run_export.py"])
def test_code_is_not_imported_because_a_run_names_it(own, script, backbone, photo_folder):
    photo = [str(next(photo_folder.rglob("*.jpg")))] if script == "run_predict.py" else []
    process = run_script(own, script, "--ckpt_dir=run", *photo)
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.endswith(f"is only imported if you name it; give --backbone={backbone}")


@pytest.mark.usefixtures("one_device")
def test_a_run_is_explained_at_another_size_and_exported(own, backbone):
    """Only the file that the user names is imported, wherever the run had it."""
    moved = own / "moved"
    moved.mkdir()
    shutil.move(own / "net.py", moved)
    try:
        named = f"{moved / 'net.py'}:SmallVGG"
        config = ExportConfig(
            ckpt_dir=str(own / "run"), backbone=named, format="keras", image_size=64
        )
        model = keras.saving.load_model(export(config))
        classifier = Classifier(str(own / "run"), image_size=64, backbone=named)
    finally:
        shutil.move(moved / "net.py", own)
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype(np.float32)
    images = classifier.built.backbone.preprocessing(tf.constant(pixels))
    network = classifier.built.network
    of_dog = tf.sigmoid(network.model(images))[:, 0]
    np.testing.assert_allclose(model(pixels)[:, 1], of_dog, atol=1e-4)
    assert grad_cam(network, images, tf.constant([0, 1])).shape == (2, 4, 4)


def test_a_file_that_changed_is_refused_and_told(own, photo_folder, backbone):
    directory = RunDirectory(own / "run")
    file = own / "net.py"
    content = file.read_text()
    assert notes_on_files(directory, None, backbone) == []
    file.write_text(content.replace("127.5", "128.0"))
    try:
        process = run_script(own, "run_train.py", *FLAGS, f"--image_folder={photo_folder}")
        (note,) = notes_on_files(directory, None, backbone)
    finally:
        file.write_text(content)
    assert process.returncode == 2
    assert f"backbone is {backbone!r}, whose content changed since the run" in process.stderr
    assert "differs from the file that the run was trained with" in note


def test_the_backbone_of_a_run_is_used_and_no_other(own, tmp_path, backbone):
    other = backbone.replace("SmallVGG", "LATER")
    with pytest.raises(UserError, match=f"has the backbone SmallVGG; give --backbone={backbone}"):
        settings_of_run(RunDirectory(own / "run"), None, other)
    (tmp_path / "config.json").write_text(SMALL_CONFIG.to_json())
    of_table = RunDirectory(tmp_path)
    assert settings_of_run(of_table, None, backbone).backbone == "SmallResNet"
    (note,) = notes_on_files(of_table, None, backbone)
    assert note.endswith(f"has no backbone in a file; {backbone} is not used")


def test_workers_have_the_same_backbone(own, backbone):
    config = TrainConfig(backbone=backbone)
    other = TrainConfig(backbone=backbone.replace("SmallVGG", "LATER"))
    mine, theirs = ([one.to_json(), python_files(one)] for one in (config, other))
    check_settings(mine, mine)
    with pytest.raises(UserError, match="different settings: backbone is"):
        check_settings(mine, theirs)


def test_layers_are_chosen_as_in_a_backbone_of_the_table(backbone):
    config = dataclasses.replace(
        SMALL_CONFIG, backbone=backbone, unfreeze_from="block2", stage_decay=0.5
    )
    built = build_network(config, ("cat", "dog"))
    model = built.network.model.backbone
    start = model.layers.index(model.get_layer("block3_conv1"))
    for unfreeze_from in ("block3", "block3_conv1", str(start)):
        assert first_trainable_layer(model, built.backbone, unfreeze_from) == start
    step = tf.Variable(0, dtype=tf.int64)
    groups = make_groups(config, built.network.model, step, make_plan(config, 8))
    assert [one.name for one in groups] == [
        "head",
        *(f"backbone_block{number}" for number in (4, 3, 2)),
    ]


START = """
import keras
from keras import layers
from research.models.backbone import Backbone, Stage
def scale(images):
    return images / 255
def build(input_shape, weights):
    images = keras.Input(input_shape)
    return keras.Model(images, layers.Conv2D(4, 3, name="conv")(images))
STAGES = (Stage("all"),)
"""
IMAGES = "def build(input_shape, weights):\n    images = keras.Input(input_shape)\n"
NET = "Net = Backbone('Net', build, scale, STAGES)\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        ("", "but the file defines no Net"),
        ("Net = build\n", "but Net is of type function; expected an object of the class research."),
        ("class Net(Backbone): pass\n", "but Net is a class; expected an object"),
        ("Net = Backbone('Net', build)\n", "missing 2 required positional arguments"),
        ("Net = Backbone('Net', build, scale, Stage('all'))\n", "a tuple of Stage"),
        ("Net = Backbone('Net', build, 255, STAGES)\n", "whose preprocessing is 255; expected"),
        (
            "Net = Backbone('Net', build, scale, STAGES, 48)\n",
            "image_size is 32; expected at least",
        ),
        (
            "def build(input_shape, weights):\n    return layers.Conv2D(-1, 3)\n" + NET,
            "whose build failed (ValueError: Invalid value for argument `filters`. Expected a "
            "strictly positive value. Received filters=-1., line 12)",
        ),
        (
            "def build(input_shape, weights):\n"
            "    return keras.Sequential([keras.Input(input_shape), layers.Conv2D(4, 3)])\n" + NET,
            "build of Net returns a Sequential; expected a functional model",
        ),
        (
            IMAGES + "    return keras.Model(images, layers.Flatten()(images))\n" + NET,
            "to (None, 3072); expected from float32 (None, 32, 32, 3) to (batch, height, width, ",
        ),
        (
            "def build(input_shape, weights):\n    images = keras.Input((None, None, 3))\n"
            "    return keras.Model(images, layers.Conv2D(4, 3)(images))\n" + NET,
            "returns a model from float32 (None, None, None, 3)",
        ),
        (
            "def build(shape, weights):\n    images = keras.Input(shape, dtype='uint8')\n"
            "    return keras.Model(images, layers.Conv2D(4, 3)(images))\n" + NET,
            "returns a model from uint8",
        ),
        (
            IMAGES + "    relu = layers.ReLU(name='relu')\n"
            "    features = relu(layers.Conv2D(4, 3)(relu(images)))\n"
            "    return keras.Model(images, features)\n" + NET,
            "uses the layer 'relu' at several places",
        ),
        ("STAGES = (Stage('all'), Stage('end', 'top_'))\n" + NET, "no layer matches 'top_'"),
        ("STAGES = (Stage('end', 'conv'),)\n" + NET, "start at the layers 1 (end); expected"),
        ("STAGES = ()\n" + NET, "start at the layers of no stage; expected"),
        ("def scale(images):\n    return images.numpy()\n" + NET, "whose preprocessing failed ("),
        (
            "def scale(images):\n    return images[:, :16]\n" + NET,
            "returns float32 of shape (None, 16, 32, 3) for float32 images",
        ),
        (
            "def scale(images):\n    return [images]\n" + NET,
            "preprocessing of Net returns <class 'list'> for float32 images",
        ),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused_in_one_line(content, message, tmp_path):
    if content is not None:
        (tmp_path / "mine.py").write_text(START + content)
    config = dataclasses.replace(
        SMALL_CONFIG, backbone=f"{tmp_path / 'mine.py'}:Net", unfreeze_from="0"
    )
    with pytest.raises(UserError) as refused:
        build_network(config, ("cat", "dog"))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_imagenet_weights_are_refused_unless_a_backbone_has_them(tmp_path):
    (tmp_path / "mine.py").write_text(START + NET)
    config = dataclasses.replace(
        SMALL_CONFIG, backbone=f"{tmp_path / 'mine.py'}:Net", weights="imagenet"
    )
    with pytest.raises(UserError, match="weights is 'imagenet'; Net has no ImageNet weights"):
        build_network(config, ("cat", "dog"))


def test_a_failing_build_is_one_line_and_nothing_is_written(tmp_path, photo_folder):
    (tmp_path / "net.py").write_text(START + "def build(shape, weights): return 1 / 0\n" + NET)
    flags = [*FLAGS, "--backbone=net.py:Net", f"--image_folder={photo_folder}"]
    process = run_script(tmp_path, "run_train.py", *flags)
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.endswith("whose build failed (ZeroDivisionError: division by zero, line 11)")
    assert not (tmp_path / "run").exists()
