"""Exports a classifier with its preprocessing, for use without this project.

For pixels at the model's input size, the probabilities of each format differ from those of a run
in float32 by less than 1e-4 (measured: 3e-6; 3e-7 with random weights, for each kind of
preprocessing), and from those of a small run in bfloat16 by at most 0.006. For encoded photos and
for pixels of another size, the SavedModel decodes and resizes with TensorFlow, training with
`decode_image`. The difference is below 0.05 for a single photo and 0.002 in the mean
(measured: 0.007 and 0.0001 on 200 photos, 0.02 and 0.001 on small drawings).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from research.data.batches import Preprocessing
from research.evaluation.classifier import Classifier
from research.models.vision_transformer import gelu
from research.runs.console import short_path
from research.runs.durable_files import cannot_be_written, reason_of, write_atomically
from research.serving.answers import Answers, answers_of
from research.serving.graph_decoding import decode_upright, to_square
from research.settings.program_configs import MIRROR_AVERAGING, ExportConfig
from research.system.errors import UserError


def export(config: ExportConfig) -> Path:
    """Exports the model of a checkpoint, and prints its inputs and outputs.

    Returns:
      The path of the exported file or folder. The class names are in a text file inside the folder
      or beside the file, one per line in the order of their labels; the thresholds of a multi-label
      task are in a JSON file next to it.

    Raises:
      UserError: the run or the checkpoint does not exist; the path exists or cannot be written; the
        exporter of the format is not installed.
    """
    path = output_path(config)
    classifier = Classifier(
        str(config.ckpt_dir),
        config.checkpoint,
        config.image_size,
        MIRROR_AVERAGING[config.mirror_averaging],
        precision="float32",
        task=config.task,
        backbone=config.backbone,
    )
    answers, names = answers_of(classifier), classifier.class_names
    model = serving_model(classifier, answers)
    labels, thresholds = side_files(config.format, path)
    texts = {labels: "".join(f"{name}\n" for name in names)}
    if answers.thresholds_json:
        texts[thresholds] = answers.thresholds_json
    with contextlib.ExitStack() as undone:
        try:
            for parent in [one for one in path.parents if not one.exists()][::-1]:
                parent.mkdir(exist_ok=True)
                undone.callback(_remove, parent.rmdir)
            with tempfile.TemporaryDirectory(prefix="export-", dir=path.parent) as folder:
                partial = Path(folder) / path.name
                # Exporters print the signatures, and emit deprecation warnings.
                with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    _, write = FORMATS[config.format]
                    write(model, answers, classifier.config.resize, partial)
                for file, text in texts.items():
                    place = Path(folder) / file.relative_to(path.parent)
                    place.parent.mkdir(exist_ok=True)
                    write_atomically(place, text)
                for file in [one for one in texts if one.parent == path.parent]:
                    os.replace(Path(folder) / file.name, file)
                    undone.callback(_remove, file.unlink)
                os.replace(partial, path)
        except (OSError, tf.errors.OpError) as error:
            raise cannot_be_written(path, reason_of(error)) from error
        undone.pop_all()
    size = classifier.config.image_size
    print(f"model:   {short_path(path)}")
    if config.format == "saved_model":
        print("inputs:  signature serving_default: image_bytes, encoded photos (batch,)")
        print("         signature pixels: pixels, uint8 (batch, height, width, 3)")
        print(f"output:  label (batch,) and probabilities (batch, {len(names)})")
    else:
        print(f"input:   float32 (batch, {size}, {size}, 3), RGB in [0, 255]; photos must be")
        print(f"         resized as in training, with --resize={classifier.config.resize}")
        print(f"output:  probabilities (batch, {len(names)})")
    shown = f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
    print(f"classes: {short_path(labels)}: {shown}", flush=True)
    if answers.thresholds_json:
        print(f"thresholds: {short_path(thresholds)}", flush=True)
    return path


def _remove(action: Callable[[], object]) -> None:
    """Removes a file or folder, unless another program has used it."""
    with contextlib.suppress(OSError):
        action()


def output_path(config: ExportConfig) -> Path:
    """Returns the path to write to.

    Raises:
      UserError: the path or a file that belongs beside it exists, its extension does not fit the
        format, or the exporter of the format is not installed.
    """
    if config.format == "onnx" and importlib.util.find_spec("tf2onnx") is None:
        raise UserError(
            "format is 'onnx', but the package tf2onnx is not installed; install this project with "
            "pip install -e '.[export]'"
        )
    default_name, _ = FORMATS[config.format]
    path = Path(config.out or Path(str(config.ckpt_dir)) / "export" / default_name)
    ending = Path(default_name).suffix
    if path.suffix != ending and ending:
        raise UserError(f"out is {str(path)!r}; expected a name that ends in {ending}")
    if os.path.lexists(path):
        raise UserError(f"out is {str(path)!r}, which exists; expected a new file or folder")
    for file in side_files(config.format, path):
        if os.path.lexists(file):
            raise UserError(
                f"out is {str(path)!r}, beside which {file.name!r} exists; delete it, or give "
                "another --out"
            )
    return path


def side_files(format_name: str, path: Path) -> tuple[Path, Path]:
    """Returns the files of the class names and of the thresholds of an exported model."""
    names = "labels.txt", "thresholds.json"
    if format_name == "saved_model":
        labels, thresholds = (path / "assets.extra" / name for name in names)  # for extra files
    else:
        labels, thresholds = (path.with_name(f"{path.name}.{name}") for name in names)
    return labels, thresholds


def serving_model(classifier: Classifier, answers: Answers) -> keras.Model:
    """Returns a functional model from pixels to probabilities.

    The input is float32 RGB (batch, size, size, 3) in [0, 255], the output float32 (batch,
    classes). Apart from the head of a user's own task, the model only consists of Keras layers.
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
    model = keras.Model(pixels, answers.probability_layer(mean), name="classifier")
    model(np.zeros((1, size, size, 3), np.float32))  # Keras only exports a model that was called
    return model


def preprocessing_layer(preprocessing: Preprocessing) -> keras.layers.Layer:
    """Returns a 1 x 1 convolution that equals the preprocessing of a backbone.

    Raises:
      UserError: the preprocessing is not an affine function of the three channels of a pixel.
    """
    # Black gives the bias. The three primary colours give the kernel.
    colours = np.concatenate([np.zeros((1, 3)), 255 * np.eye(3)]).astype(np.float32)
    shown = np.asarray(preprocessing(tf.reshape(colours, (1, 2, 2, 3)))).reshape(4, 3)
    offset, kernel = shown[0], (shown[1:] - shown[0]) / 255
    sample = np.random.default_rng(0).uniform(0, 255, (1, 8, 8, 3)).astype(np.float32)
    wanted = np.asarray(preprocessing(tf.constant(sample)))
    if not np.allclose(sample @ kernel + offset, wanted, rtol=1e-4, atol=1e-4 * np.ptp(wanted)):
        raise UserError(
            "the backbone cannot be exported: its preprocessing is not an affine function of the "
            "three channels of a pixel; choose another --backbone, or move this computation to "
            "layers of your own backbone"
        )
    layer = keras.layers.Conv2D(3, 1, name="preprocessing", trainable=False)
    layer.build((None, None, None, 3))
    layer.set_weights([kernel[np.newaxis, np.newaxis], offset])
    return layer


def write_saved_model(model: keras.Model, answers: Answers, resize: str, path: Path) -> None:
    """Writes a SavedModel with signatures for encoded photos and for pixels of any size."""
    size = model.input_shape[1]

    def of_pixels(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        photos = tf.cast(pixels, tf.float32)
        if photos.shape[1:3] != (size, size):
            photos = to_square(photos, size, resize)
        # oneDNN refuses a batch of no photo.
        count = tf.shape(photos)[0]
        filling = tf.cast(tf.equal(count, 0), tf.int32)
        photos = tf.pad(photos, [[0, filling], [0, 0], [0, 0], [0, 0]])
        probabilities = model(photos, training=False)[:count]
        return {"label": answers.label_text(probabilities), "probabilities": probabilities}

    def of_bytes(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        photos = tf.map_fn(
            lambda encoded: decode_upright(encoded, size, resize),
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


def write_tflite(model: keras.Model, path: Path) -> None:
    """Writes a flat buffer that only contains built-in operations, which every runtime has."""
    # Keras's own export to TFLite needs Keras 3.13, and keeps operations that some runtimes lack.
    # The converter turns variables into constants only if it starts from a SavedModel.
    spec = tf.TensorSpec((None, *model.input_shape[1:]), tf.float32, "pixels")
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint(
        "serving_default", lambda pixels: {"probabilities": model(pixels, training=False)}, [spec]
    )
    with tempfile.TemporaryDirectory() as folder:
        archive.write_out(folder, verbose=False)
        path.write_bytes(tf.lite.TFLiteConverter.from_saved_model(folder).convert())


def write_onnx(model: keras.Model, path: Path) -> None:
    """Writes an ONNX model whose input, output and batch dimension have names.

    Raises:
      UserError: the model has an operation that ONNX does not have.
    """
    import onnx

    convertible = for_onnx(model)
    convertible(np.zeros((1, *model.input_shape[1:]), np.float32))
    convertible.export(path, "onnx", verbose=False)
    written = onnx.load(path)
    graph = written.graph
    unknown = {node.op_type for node in graph.node if not onnx.defs.has(node.op_type, node.domain)}
    if unknown:
        raise UserError(
            f"format is 'onnx', but the model has {', '.join(sorted(unknown))}, which ONNX does "
            "not have; choose --format=saved_model, keras or tflite"
        )
    (given,), (answer,) = graph.input, graph.output
    names = {given.name: "pixels", answer.name: "probabilities"}
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (given, answer):
        value.name = names[value.name]
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del graph.value_info[:]  # optional shapes, with the earlier names
    onnx.checker.check_model(written)
    onnx.save(written, path)


def for_onnx(model: keras.Model) -> keras.Model:
    """Returns a model with the same outputs that the exporter can convert.

    ONNX has neither erfc, with which TensorFlow computes GELU, nor the XLA computation of a
    convolution with one group per channel; both are in ConvNeXt of Keras. The constants of a
    `Normalization` layer would become inputs.
    """
    kinds = (_is_grouped, _is_gelu, _is_normalization)
    if not any(kind(layer) for layer in model._flatten_layers() for kind in kinds):
        return model

    def replace(layer: keras.Layer) -> keras.Layer:
        if not _is_grouped(layer):
            return layer
        depthwise = keras.layers.DepthwiseConv2D(
            layer.kernel_size,
            layer.strides,
            layer.padding,
            dilation_rate=layer.dilation_rate,
            use_bias=layer.use_bias,
            name=layer.name,
        )
        depthwise.build((None, None, None, layer.filters))
        kernel, *bias = layer.get_weights()
        depthwise.set_weights([kernel.transpose(0, 1, 3, 2), *bias])
        return depthwise

    def call(layer: keras.Layer, *arguments: Any, **options: Any) -> Any:
        if _is_gelu(layer):
            return gelu(arguments[0])
        if _is_normalization(layer):
            deviation = np.maximum(np.sqrt(layer.variance), keras.config.epsilon())
            return (arguments[0] - np.asarray(layer.mean)) / deviation
        return layer(*arguments, **options)

    return keras.models.clone_model(
        model, clone_function=replace, call_function=call, recursive=True
    )


def _is_grouped(layer: keras.Layer) -> bool:
    is_convolution = type(layer) is keras.layers.Conv2D
    return is_convolution and 1 < layer.groups == layer.filters and layer.kernel.shape[2] == 1


def _is_normalization(layer: keras.Layer) -> bool:
    return type(layer) is keras.layers.Normalization and not layer.invert


def _is_gelu(layer: keras.Layer) -> bool:
    is_activation = isinstance(layer, keras.layers.Activation)
    return is_activation and layer.activation is keras.activations.gelu


# The default name of the exported file or folder, and the function that writes it.
FORMATS: dict[str, tuple[str, Callable[[keras.Model, Answers, str, Path], None]]] = {
    "saved_model": ("saved_model", write_saved_model),
    "keras": ("model.keras", lambda model, _answers, _resize, path: model.save(path)),
    "tflite": ("model.tflite", lambda model, _answers, _resize, path: write_tflite(model, path)),
    "onnx": ("model.onnx", lambda model, _answers, _resize, path: write_onnx(model, path)),
}
