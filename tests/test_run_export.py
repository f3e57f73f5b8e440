"""Exported models give the probabilities of the checkpoint in a process without this project."""

from __future__ import annotations

import base64
import dataclasses
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.applications import efficientnet
from PIL import ExifTags, Image

from research.data.decode import decode_image
from research.data.files import image_files
from research.data.folder.folder_source import FolderSource
from research.data.split_arrays import load_split
from research.evaluation.classifier import Classifier
from research.evaluation.scores import Predictions
from research.loop.builder import build_network
from research.models.backbone import Backbone, Stage
from research.models.backbone_table import BACKBONES, find_backbone
from research.models.vision_transformer import build_vision_transformer
from research.serving.answers import OneLabel, answers_of
from research.serving.export import export, preprocessing_layer, serving_model
from research.serving.predict import find_files, predict_files
from research.settings.program_configs import ExportConfig
from research.system.errors import UserError
from tests.helpers import SMALL_CONFIG, make_run, randomize_head, run_script

# Calls exported models with photos, and prints their probabilities. Three arguments for each: its
# form, its path and the file of photos.
ASKING = """
import json, sys
import numpy as np
answers = {}
for form, path, photos in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
    photos = np.load(photos)
    pixels = photos["pixels"]
    if form == "saved_model":
        import tensorflow as tf
        ask = tf.saved_model.load(path).signatures
        encoded = tf.constant([bytes(one) for one in photos["encoded"]])
        answers["pixels"] = ask["pixels"](pixels=tf.constant(pixels))["probabilities"]
        answers["bytes"] = ask["serving_default"](image_bytes=encoded)["probabilities"]
    elif form == "keras":
        import keras
        answers[path] = keras.saving.load_model(path)(pixels.astype("f4"))
    elif form == "tflite":
        from ai_edge_litert.interpreter import Interpreter
        runner = Interpreter(path).get_signature_runner("serving_default")
        answers[path] = runner(pixels=pixels.astype("f4"))["probabilities"]
    else:
        import onnxruntime
        session = onnxruntime.InferenceSession(path)
        (asked,), (given,) = session.get_inputs(), session.get_outputs()
        assert (asked.name, asked.shape[0]) == ("pixels", "batch"), asked
        assert (given.name, given.shape[0]) == ("probabilities", "batch"), given
        answers[path] = session.run(["probabilities"], {"pixels": pixels.astype("f4")})[0]
assert not any(name.split(".")[0] in ("research", "flags") for name in sys.modules)
print(json.dumps({name: np.asarray(values).tolist() for name, values in answers.items()}))
"""
PACKAGES = {"tflite": "ai_edge_litert", "onnx": "onnxruntime"}
PIXELS, BYTES = 1e-4, 0.05  # tolerances of probabilities


@pytest.fixture(scope="module")
def run(one_device, photo_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exporting") / "run"
    return make_run(folder, photo_folder, mirror_averaging=True, image_size=64)


@pytest.fixture(scope="module")
def photos(run, photo_folder):
    """Encoded photos, their pixels at the run's size, and the probabilities of the checkpoint."""
    source = FolderSource(str(photo_folder))
    examples = load_split(source, "test", 64)
    said = Predictions(examples.names, examples.labels, Classifier(str(run)).logits(examples))
    encoded = [one.image for one in source.examples("test")]
    file = run.parent / "photos.npz"
    np.savez(file, pixels=examples.inputs[0], encoded=np.array(encoded))
    return SimpleNamespace(file=file, encoded=encoded, said=said.probabilities)


@pytest.fixture(scope="module")
def exported(run):
    return export(ExportConfig(ckpt_dir=str(run)))


def ask(folder: Path, *questions: str | Path) -> dict[str, np.ndarray]:
    """Asks models in a new process: form, path and file of photos of each, one after another."""
    process = subprocess.run(
        [sys.executable, "-c", ASKING, *map(str, questions)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    return {name: np.array(values) for name, values in json.loads(process.stdout).items()}


def one_block() -> Backbone:
    """A vision transformer with every kind of layer, and one block."""

    def build(input_shape: tuple[int, int, int], weights: str | None) -> keras.Model:
        options = {"registers": 4, "layer_scale": 0.1, "with_mean": True}
        return build_vision_transformer(input_shape, weights, "vit", 64, 1, 16, 64, **options)

    return dataclasses.replace(find_backbone("ViTTiny"), build=build, stages=(Stage("stem"),))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Models with each kind of preprocessing as Keras files, photos, and their probabilities.

    Scaling, division by deviations in the backbone, BGR minus means, and a vision transformer.
    """
    folder = tmp_path_factory.mktemp("kinds")
    pixels = np.random.default_rng(0).uniform(0, 255, (3, 32, 32, 3)).astype(np.float32)
    np.savez(folder / "photos.npz", pixels=pixels)
    wanted = {}
    blocks = [{**block, "repeats": 1} for block in efficientnet.DEFAULT_BLOCKS_ARGS]
    for name in ("SmallResNet", "EfficientNetB0", "VGG16", "ViTTiny"):
        backbone = "SmallResNet" if name == "VGG16" else name  # its weights would take 60 MB
        config = dataclasses.replace(SMALL_CONFIG, backbone=backbone, unfreeze_from="none")
        with (
            mock.patch.object(efficientnet, "DEFAULT_BLOCKS_ARGS", blocks),
            mock.patch.dict(BACKBONES, ViTTiny=one_block()),
        ):
            built = build_network(config, ("a", "b", "c"))
        randomize_head(built.network.model)
        preprocessing = find_backbone(name).preprocessing
        built = dataclasses.replace(
            built, backbone=dataclasses.replace(built.backbone, preprocessing=preprocessing)
        )
        names = ("a", "b", "c")
        classifier = SimpleNamespace(built=built, config=config, class_names=names)
        logits = built.network.model(built.backbone.preprocessing(tf.constant(pixels)))
        model, path = serving_model(classifier, OneLabel(names)), folder / f"{name}.keras"
        wanted[str(path)] = tf.nn.softmax(logits).numpy()
        assert model(pixels).numpy() == pytest.approx(wanted[str(path)], abs=PIXELS)
        model.save(path)
    return SimpleNamespace(file=folder / "photos.npz", wanted=wanted)


@pytest.fixture(scope="module")
def answers(exported, photos, kinds):
    """What the SavedModel and the Keras files answer in one new process, which takes seconds."""
    questions = ["saved_model", exported, photos.file]
    for path in kinds.wanted:
        questions += ["keras", path, kinds.file]
    return ask(photos.file.parent, *questions)


def test_a_saved_model_takes_bytes_and_pixels(exported, photos, answers):
    assert exported.name == "saved_model"
    assert photos.said.std() > 0.1  # the photos differ
    assert answers["pixels"] == pytest.approx(photos.said, abs=PIXELS)
    deviations = np.abs(answers["bytes"] - photos.said)
    assert deviations.max() < BYTES
    assert deviations.mean() < BYTES / 5
    assert (exported / "assets.extra" / "labels.txt").read_text() == "cat\ndog\n"


@pytest.mark.parametrize("form", ["keras", "tflite", "onnx"])
def test_each_file_format_gives_the_same_probabilities(run, photos, form):
    if form in PACKAGES:
        pytest.importorskip(PACKAGES[form])
    if form == "onnx":
        pytest.importorskip("tf2onnx")
    path = export(ExportConfig(ckpt_dir=str(run), format=form))
    if form == "keras":  # in a process of its own: test_each_kind_of_preprocessing_is_exported
        pixels = np.load(photos.file)["pixels"].astype(np.float32)
        answer = keras.saving.load_model(path)(pixels).numpy()
    else:
        (answer,) = ask(run.parent, form, path, photos.file).values()
    assert answer == pytest.approx(photos.said, abs=PIXELS)
    assert path.with_name(f"{path.name}.labels.txt").read_text() == "cat\ndog\n"
    assert not list(path.parent.glob("export-*"))


def test_an_export_that_failed_late_can_be_repeated(run, tmp_path, monkeypatch):
    bystander = tmp_path / "partial-mine.keras"
    bystander.write_text("another file of the user")
    config = ExportConfig(ckpt_dir=str(run), format="keras", out=str(tmp_path / "mine.keras"))

    def fail(file: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("research.serving.export.write_atomically", fail)
        with pytest.raises(UserError, match="No space left on device"):
            export(config)
    assert list(tmp_path.iterdir()) == [bystander]
    assert export(config).is_file()
    assert bystander.read_text() == "another file of the user"


def test_the_request_of_the_readme_matches_the_signature(exported, photos):
    """TensorFlow Serving decodes {"b64": ...} and passes the list to the signature's only input."""
    body = {"instances": [{"b64": base64.b64encode(one).decode()} for one in photos.encoded]}
    instances = json.loads(json.dumps(body))["instances"]
    signature = tf.saved_model.load(str(exported)).signatures["serving_default"]
    ((name, spec),) = signature.structured_input_signature[1].items()
    assert name.endswith("_bytes")
    assert (spec.dtype, spec.shape.rank) == (tf.string, 1)
    decoded = tf.constant([base64.b64decode(one["b64"]) for one in instances])
    answer = signature(**{name: decoded})
    # Each output has one row per photo, so TensorFlow Serving returns a list of predictions.
    assert set(answer) == {"label", "probabilities"}
    labels = [label.decode() for label in answer["label"].numpy()]
    wanted = answer["probabilities"].numpy().argmax(axis=1)
    assert labels == [("cat", "dog")[k] for k in wanted]
    assert np.abs(answer["probabilities"].numpy() - photos.said).max() < BYTES


def test_a_saved_model_takes_other_sizes_and_formats(exported, photos, tmp_path):
    signatures = tf.saved_model.load(str(exported)).signatures
    photo = tf.io.decode_jpeg(photos.encoded[0], dct_method="INTEGER_ACCURATE")
    large = signatures["pixels"](pixels=photo[tf.newaxis])["probabilities"].numpy()
    assert large == pytest.approx(photos.said[:1], abs=BYTES)
    png = tf.io.encode_png(photo)[tf.newaxis]
    assert signatures["serving_default"](image_bytes=png)["probabilities"].numpy() == (
        pytest.approx(large, abs=1e-5)
    )


def predicted(classifier, files) -> list[list[float]]:
    found = predict_files(classifier, answers_of(classifier), find_files(list(map(str, files))))
    return [list(one.probabilities.values()) for one in found]


def test_photos_become_squares_as_in_training(one_device, photo_folder, tmp_path, capsys):
    """In prediction and in a SavedModel; users of the other formats are told what to do.

    `test_served_photos` compares the pixels of all ways to resize.
    """
    resize = "crop"
    run = make_run(tmp_path / "run", photo_folder, image_size=64, resize=resize)
    drawn = [Image.fromarray(decode_image(one.read_bytes())) for one in image_files(photo_folder)]
    files = [tmp_path / f"{index:02}.{'jpg' if index % 2 else 'png'}" for index in range(12)]
    for photo, file in zip(drawn, files, strict=False):
        photo.save(file)
        assert photo.width != photo.height
    classifier = Classifier(str(run))
    said = predicted(classifier, files)
    signatures = tf.saved_model.load(str(export(ExportConfig(ckpt_dir=str(run))))).signatures
    encoded = tf.constant([file.read_bytes() for file in files])
    answers = signatures["serving_default"](image_bytes=encoded)["probabilities"]
    assert np.abs(answers - said).max() < BYTES
    for one, answer in zip(
        encoded[::2], said[::2], strict=True
    ):  # large JPEGs are not decoded whole
        found = signatures["pixels"](pixels=tf.io.decode_png(one)[tf.newaxis])["probabilities"]
        assert np.abs(found - answer).max() < BYTES
    classifier.config = dataclasses.replace(classifier.config, resize="squash")
    squashed = predicted(classifier, files)
    assert np.abs(np.subtract(squashed, said)).max() > BYTES
    export(ExportConfig(ckpt_dir=str(run), format="keras"))
    assert f"resized as in training, with --resize={resize}\n" in capsys.readouterr().out


def test_a_saved_model_takes_a_batch_of_no_photo(exported):
    signatures = tf.saved_model.load(str(exported)).signatures
    answers = (
        signatures["pixels"](pixels=tf.zeros((0, 30, 40, 3), tf.uint8)),
        signatures["pixels"](pixels=tf.zeros((0, 64, 64, 3), tf.uint8)),
        signatures["serving_default"](image_bytes=tf.zeros((0,), tf.string)),
    )
    for answer in answers:
        assert answer["probabilities"].shape == (0, 2)
        assert answer["label"].shape == (0,)


def test_a_saved_model_applies_the_exif_orientation(exported, photos):
    ask_bytes = tf.saved_model.load(str(exported)).signatures["serving_default"]
    upright = Image.open(io.BytesIO(photos.encoded[0]))
    lying, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # rotate by 90 degrees clockwise
    answers = []
    for photo, options in ((upright, {}), (lying, {"exif": exif}), (lying, {})):
        buffer = io.BytesIO()
        photo.save(buffer, "JPEG", quality=100, subsampling=0, **options)
        said = ask_bytes(image_bytes=tf.constant([buffer.getvalue()]))["probabilities"]
        answers.append(said.numpy())
    assert np.abs(answers[0] - answers[1]).max() < BYTES / 5
    assert np.abs(answers[0] - answers[2]).max() > BYTES / 5


def test_each_kind_of_preprocessing_is_exported(kinds, answers):
    assert len(kinds.wanted) == 4
    for path, wanted in kinds.wanted.items():
        assert answers[path] == pytest.approx(wanted, abs=PIXELS), path


def test_a_preprocessing_that_is_not_affine_is_refused():
    with pytest.raises(UserError, match="not an affine function"):
        preprocessing_layer(lambda images: images**2)


def test_an_existing_export_is_kept(run):
    (run.parent / "kept" / "saved_model").mkdir(parents=True)
    process = run_script(run.parent, "run_export.py", "--ckpt_dir=run", "--out=kept/saved_model")
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.endswith("saved_model', which exists; expected a new file or folder")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"format": "onnx", "out": "model.tflite"}, "expected a name that ends in .onnx"),
        ({"checkpoint": "gone", "out": "new"}, "expected best, latest, or the path"),
        ({"out": "run/labels.txt/new"}, "cannot be written"),
        ({"format": "keras", "out": f"new/deep/{'a' * 245}.keras"}, "File name too long"),
        ({"format": "keras", "out": "taken.keras"}, r"'taken.keras.thresholds.json' exists; delet"),
        ({"out": "link"}, "/link', which exists"),
    ],
)
def test_an_error_leaves_no_file(run, monkeypatch, settings, expected):
    monkeypatch.chdir(run.parent)
    Path("taken.keras.thresholds.json").touch()
    if not os.path.lexists("link"):
        os.symlink("nowhere", "link")
    before = set(run.parent.rglob("*"))
    with pytest.raises(UserError, match=expected):
        export(ExportConfig(ckpt_dir="run", **settings))
    assert set(run.parent.rglob("*")) == before


def test_a_missing_exporter_is_named(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tf2onnx is not installed; .*\[export\]"):
        export(ExportConfig(ckpt_dir=str(run), format="onnx"))
