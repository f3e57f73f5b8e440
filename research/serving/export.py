"""Exports a classifier, its preprocessing inside, for use without this project.

Of the same pixels, each format gives the checkpoint's probabilities to 1e-4 (measured: 3e-6). Of
JPEG bytes, which the SavedModel decodes and resizes with TensorFlow and training with Pillow, to
0.05 for single photos and 0.002 in the mean (measured: 0.007 and 0.0001 on 200 photos, 0.02 and
0.001 on small drawings).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from research.data.batches import Preprocessing
from research.evaluation.classifier import Classifier
from research.runs.console import short_path
from research.runs.durable_files import cannot_be_written, reason_of, write_atomically
from research.serving.graph_decoding import decode_upright
from research.settings.program_configs import MIRROR_AVERAGING, ExportConfig
from research.system.errors import UserError

Writer = Callable[[keras.Model, tuple[str, ...], Path], None]

NAMES = {
    "saved_model": "saved_model",
    "keras": "model.keras",
    "tflite": "model.tflite",
    "onnx": "model.onnx",
}
# What an exporter needs that is not installed with this project.
PACKAGES = {"onnx": "tf2onnx"}


def export(config: ExportConfig) -> Path:
    """Writes the model of a run's checkpoint in a format, and says how it is called.

    Returns:
      the file or folder written; the names of the classes are in another file, see `labels_file`.

    Raises:
      UserError: there is no such run or checkpoint; the place is taken or cannot be written; the
        exporter of the format is not installed.
    """
    place = find_place(config)
    classifier = Classifier(
        str(config.ckpt_dir),
        config.checkpoint,
        config.image_size,
        MIRROR_AVERAGING[config.mirror_averaging],
        precision="float32",
        task=config.task,
    )
    model, names = serving_model(classifier), classifier.class_names
    partial = place.with_name(f"partial-{place.name}")
    labels = labels_file(place, config.format)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)
        # Exporters print what signatures they write, and warn of their own future.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            WRITERS[config.format](model, names, partial)
        os.replace(partial, place)
        labels.parent.mkdir(exist_ok=True)
        write_atomically(labels, "".join(f"{name}\n" for name in names))
    except (OSError, tf.errors.OpError) as error:
        raise cannot_be_written(place, reason_of(error)) from error
    finally:
        with contextlib.suppress(OSError):
            remove(partial)
    size = classifier.config.image_size
    print(f"model:   {short_path(place)}")
    if config.format == "saved_model":
        print("inputs:  signature serving_default: image_bytes, encoded photos (batch,)")
        print("         signature pixels: pixels, uint8 (batch, height, width, 3)")
        print(f"output:  label (batch,) and probabilities (batch, {len(names)})")
    else:
        print(f"input:   float32 (batch, {size}, {size}, 3), RGB in [0, 255]")
        print(f"output:  probabilities (batch, {len(names)})")
    shown = f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
    print(f"classes: {short_path(labels)}: {shown}", flush=True)
    return place


def find_place(config: ExportConfig) -> Path:
    """Returns where to write to.

    Raises:
      UserError: something is there, its name does not fit the format, or the exporter of the format
        is not installed.
    """
    package = PACKAGES.get(config.format)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(
            f"format is {config.format!r}, for which the package {package} is not installed; "
            "install this project with -e '.[export]'"
        )
    place = Path(config.out or Path(str(config.ckpt_dir)) / "export" / NAMES[config.format])
    ending = Path(NAMES[config.format]).suffix
    if place.suffix != ending and ending:
        raise UserError(f"out is {str(place)!r}; expected a name that ends in {ending}")
    if place.exists():
        raise UserError(f"out is {str(place)!r}, which exists; expected a new file or folder")
    return place


def labels_file(place: Path, form: str) -> Path:
    """Returns where the names of the classes are written, one a line, in their order."""
    if form == "saved_model":  # its format has a folder for what is not the model's own
        return place / "assets.extra" / "labels.txt"
    return place.with_name(f"{place.name}.labels.txt")


def remove(path: Path) -> None:
    """Removes a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def serving_model(classifier: Classifier) -> keras.Model:
    """Returns a functional model: pixels in, probabilities out.

    From float32 RGB (batch, size, size, 3) in [0, 255] to float32 (batch, classes). It is made of
    Keras's own layers, and of the layers of the task's head as they are.
    """
    wrapper, size = classifier.built.network.model, classifier.config.image_size
    preprocess = preprocessing_layer(classifier.built.backbone.preprocessing)
    pixels = keras.Input((size, size, 3), name="pixels")
    views = [pixels]
    if classifier.config.mirror_averaging:
        views.append(keras.ops.flip(pixels, axis=2))
    features = [
        wrapper.pooling(wrapper.backbone(preprocess(view), training=False)) for view in views
    ]
    logits = [wrapper.head(one, training=False) for one in features]
    mean = logits[0] if len(logits) == 1 else keras.layers.Average(name="mean_logits")(logits)
    if mean.shape[1] == 1:  # one logit is as good as two, the first of which is 0
        mean = keras.ops.pad(mean, ((0, 0), (1, 0)))
    probabilities = keras.layers.Softmax(name="probabilities")(mean)
    model = keras.Model(pixels, probabilities, name="classifier")
    model(np.zeros((1, size, size, 3), np.float32))  # Keras exports what was called before
    return model


def preprocessing_layer(preprocessing: Preprocessing) -> keras.layers.Layer:
    """Returns a layer that does what a backbone's preprocessing does to each pixel.

    Raises:
      UserError: it does something else than mixing and shifting the three channels.
    """
    # Black and the three primary colours show what is added, and what each channel becomes.
    colours = np.concatenate([np.zeros((1, 3)), 255 * np.eye(3)]).astype(np.float32)
    shown = np.asarray(preprocessing(tf.reshape(colours, (1, 2, 2, 3)))).reshape(4, 3)
    offset, kernel = shown[0], (shown[1:] - shown[0]) / 255
    sample = np.random.default_rng(0).uniform(0, 255, (1, 8, 8, 3)).astype(np.float32)
    wanted = np.asarray(preprocessing(tf.constant(sample)))
    if not np.allclose(sample @ kernel + offset, wanted, rtol=1e-4, atol=1e-4 * np.ptp(wanted)):
        raise UserError(
            "the backbone's preprocessing is no linear function of a pixel's colours, so that it "
            "cannot be exported"
        )
    layer = keras.layers.Conv2D(3, 1, name="preprocessing", trainable=False)
    layer.build((None, None, None, 3))
    layer.set_weights([kernel[np.newaxis, np.newaxis], offset])
    return layer


def write_saved_model(model: keras.Model, class_names: tuple[str, ...], path: Path) -> None:
    """Writes a SavedModel that takes encoded photos, or pixels of any size."""
    size = model.input_shape[1]

    def of_pixels(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        photos = tf.cast(pixels, tf.float32)
        if photos.shape[1:3] != (size, size):
            # As photos are resized in training, to whole numbers.
            photos = tf.round(tf.image.resize(photos, (size, size), antialias=True))
            photos = tf.clip_by_value(photos, 0.0, 255.0)
        probabilities = model(photos, training=False)
        labels = tf.gather(tf.constant(class_names), tf.argmax(probabilities, axis=1))
        return {"label": labels, "probabilities": probabilities}

    def of_bytes(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        photos = tf.map_fn(
            lambda encoded: decode_upright(encoded, size),
            image_bytes,
            fn_output_signature=tf.TensorSpec((size, size, 3), tf.float32),
        )
        return of_pixels(photos)

    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint(
        "serving_default", of_bytes, [tf.TensorSpec((None,), tf.string, "image_bytes")]
    )
    archive.add_endpoint(
        "pixels", of_pixels, [tf.TensorSpec((None, None, None, 3), tf.uint8, "pixels")]
    )
    archive.write_out(str(path), verbose=False)


def write_keras(model: keras.Model, class_names: tuple[str, ...], path: Path) -> None:
    """Writes what `keras.saving.load_model` loads."""
    model.save(path)


def write_tflite(model: keras.Model, class_names: tuple[str, ...], path: Path) -> None:
    """Writes a flat buffer of built-in operations alone, which each runtime has."""
    # By TensorFlow's own converter: Keras's way to it asks for Keras 3.13, and leaves operations in
    # that not every runtime has. From a SavedModel, as variables become constants only then.
    spec = tf.TensorSpec((None, *model.input_shape[1:]), tf.float32, "pixels")
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint(
        "serving_default", lambda pixels: {"probabilities": model(pixels, training=False)}, [spec]
    )
    with tempfile.TemporaryDirectory() as folder:
        archive.write_out(folder, verbose=False)
        path.write_bytes(tf.lite.TFLiteConverter.from_saved_model(folder).convert())


def write_onnx(model: keras.Model, class_names: tuple[str, ...], path: Path) -> None:
    """Writes what ONNX's runtimes load."""
    model.export(path, format="onnx", verbose=False)


WRITERS: dict[str, Writer] = {
    "saved_model": write_saved_model,
    "keras": write_keras,
    "tflite": write_tflite,
    "onnx": write_onnx,
}
