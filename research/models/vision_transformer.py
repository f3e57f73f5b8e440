"""Vision transformers, as flat functional models of Keras layers: ViT, DeiT and DINOv2.

A photo is cut into patches. Each patch becomes a token, a class token is put in front, and blocks
of attention and of two dense layers change the tokens (Dosovitskiy et al., "An Image is Worth 16x16
Words", 2020, arXiv:2010.11929). DeiT is the same network (Touvron et al. 2020, arXiv:2012.12877).
DeiT III (Touvron et al. 2022, arXiv:2204.07118) and DINOv2 (Oquab et al. 2023, arXiv:2304.07193)
scale the output of each branch; DINOv2 can have registers, tokens that stand for nothing (Darcet et
al. 2023, arXiv:2309.16588).

Only layers and operations of Keras are used, so that a `.keras` file needs no code of this project.
Layer names begin with the stage: `block0_norm1`, `block0_qkv`, and so on, as in timm.
"""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

HEAD_WIDTH = 64  # channels of an attention head, in all published networks of this table
EPSILON = 1e-6
EMBEDDING = "embedding"
PATCHES, PREFIX, POSITIONS = "patches", "prefix_tokens", "position_embedding"


def build_vision_transformer(
    input_shape: tuple[int, int, int],
    weights: str | None,
    name: str,
    width: int,
    depth: int,
    patch: int,
    trained_size: int,
    registers: int = 0,
    layer_scale: float | None = None,
    with_mean: bool = False,
) -> keras.Model:
    """Builds a vision transformer without its classifier.

    Args:
      input_shape: (height, width, 3); height and width are equal, and a multiple of `patch`.
      weights: None, because there are no weights that Keras could download. The table of backbones
        calls every builder with this argument.
      name: the name of the entry, which is the name of the model in lower case.
      width: channels of a token, a multiple of 64.
      depth: number of blocks.
      patch: height and width of a patch in pixels.
      trained_size: image height and width in pixels for which the network was pretrained. There is
        one position embedding for each patch of such an image; for another size they are resized.
      registers: number of additional tokens without a position.
      layer_scale: initial scale of each branch; None for branches without a scale.
      with_mean: whether the features are the class token and the mean of the patch tokens, or only
        the class token.

    Returns:
      A functional model that maps float images (batch, height, width, 3) to features (batch, 1, 1,
      width), or (batch, 1, 1, 2 * width) if `with_mean`.
    """
    images = layers.Input(input_shape, name="images")
    tokens = _embedding(input_shape, width, patch, trained_size, 1 + registers)(images)
    for block in range(depth):
        prefix = f"block{block}"
        branch = _norm(f"{prefix}_norm1")(tokens)
        branch = _attention(branch, width, prefix)
        tokens = _add(tokens, branch, layer_scale, f"{prefix}_scale1", f"{prefix}_add1")
        branch = _norm(f"{prefix}_norm2")(tokens)
        branch = layers.Dense(4 * width, name=f"{prefix}_fc1")(branch)
        branch = layers.Dense(width, name=f"{prefix}_fc2")(gelu(branch))
        tokens = _add(tokens, branch, layer_scale, f"{prefix}_scale2", f"{prefix}_add2")
    tokens = _norm("norm")(tokens)
    features = tokens[:, 0]
    if with_mean:
        # A sum of a thousand tokens is not precise in float16.
        mean = layers.GlobalAveragePooling1D(dtype="float32", name="mean")(
            tokens[:, 1 + registers :]
        )
        features = layers.Concatenate(name="class_and_mean")([features, mean])
    features = layers.Reshape((1, 1, features.shape[-1]), name="features")(features)
    return keras.Model(images, features, name=name.lower())


def gelu(inputs: keras.KerasTensor) -> keras.KerasTensor:
    """Adds the activation GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    # tf.nn.gelu is computed with erfc, which ONNX does not have.
    return 0.5 * inputs * (1.0 + ops.erf(inputs * 0.5**0.5))


def last_normalization(model: keras.Model) -> keras.Layer | None:
    """Returns the first layer of the last block, or None if a backbone is no vision transformer."""
    # A user's own backbone may have a plain layer of this name.
    if not any(layer.name == EMBEDDING and hasattr(layer, "layers") for layer in model.layers):
        return None
    return [layer for layer in model.layers if layer.name.endswith("_norm1")][-1]


def to_map(model: keras.Model, tokens: tf.Tensor) -> tf.Tensor:
    """Returns the patch tokens at their places, float32 (batch, height', width', width).

    Args:
      model: a vision transformer.
      tokens: (batch, tokens, width), in the order of the model.
    """
    grid = model.input_shape[1] // model.get_layer(EMBEDDING).get_layer(PATCHES).strides[0]
    return tf.reshape(
        tf.cast(tokens[:, -grid * grid :], tf.float32), (-1, grid, grid, tokens.shape[-1])
    )


def interpolation_matrix(size: int, trained: int) -> np.ndarray:
    """Returns the matrix that resizes `trained` values to `size` values, bicubic with antialiasing.

    It computes the same as `resize` of Pillow and as `interpolate(mode="bicubic", antialias=True)`
    of PyTorch. Between equal sizes, it is the identity.

    Returns:
      float32 (size, trained); each row has the sum 1.
    """
    scale = trained / size
    centres = scale * (np.arange(size) + 0.5)
    distances = np.arange(trained) + 0.5 - centres[:, np.newaxis]
    x = np.abs(distances) / max(scale, 1.0)  # a smaller grid averages over a wider window
    # Keys (1981), "Cubic convolution interpolation for digital image processing", with a = -0.5.
    near = (1.5 * x - 2.5) * x**2 + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    values = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return (values / values.sum(axis=1, keepdims=True)).astype(np.float32)


def _embedding(
    input_shape: tuple[int, int, int], width: int, patch: int, trained_size: int, prefix: int
) -> keras.Model:
    """Returns a model from images to tokens (batch, prefix + patches, width).

    The learned tokens and position embeddings are kernels of dense layers, whose inputs are
    constants: Keras has no layer that only holds a table. These inputs have no batch, so this is
    one layer of the backbone, inside which the backbone is not cut. The class token contains its
    position embedding.
    """
    grid, trained = input_shape[0] // patch, trained_size // patch
    images = layers.Input(input_shape, name="pixels")
    patches = layers.Conv2D(width, patch, patch, name=PATCHES)(images)
    patches = layers.Reshape((grid * grid, width))(patches)
    # A constant of a functional model has to depend on its input.
    zero = ops.zeros_like(images[:1, :1, :1, 0])
    resize = zero + interpolation_matrix(grid, trained)
    # Row (y, x) of the image's grid, column (y', x') of the trained grid.
    resize = ops.expand_dims(resize, (2, 4)) * ops.expand_dims(resize, (1, 3))
    resize = ops.reshape(resize, (1, grid * grid, trained * trained))
    table = {"use_bias": False, "kernel_initializer": keras.initializers.TruncatedNormal(0.0, 0.02)}
    positions = layers.Dense(width, name=POSITIONS, **table)(resize)
    first = layers.Dense(width, name=PREFIX, **table)(zero + np.eye(prefix, dtype=np.float32))
    added = layers.Concatenate(axis=1)([first, positions])
    tokens = layers.Add()([layers.ZeroPadding1D((prefix, 0))(patches), added])
    return keras.Model(images, tokens, name=EMBEDDING)


def _norm(name: str) -> keras.layers.Layer:
    return layers.LayerNormalization(epsilon=EPSILON, name=name)


def _attention(tokens: keras.KerasTensor, width: int, prefix: str) -> keras.KerasTensor:
    """Adds multi-head self-attention. Every tensor has the batch as its first axis."""
    count, heads = tokens.shape[1], width // HEAD_WIDTH
    tokens = layers.Dense(3 * width, name=f"{prefix}_qkv")(tokens)
    tokens = ops.transpose(ops.reshape(tokens, (-1, count, 3 * heads, HEAD_WIDTH)), (0, 2, 1, 3))
    query, key, value = ops.split(tokens, 3, axis=1)
    scores = ops.matmul(query * HEAD_WIDTH**-0.5, ops.transpose(key, (0, 1, 3, 2)))
    # The sum of the exponentials over all tokens is not precise in float16.
    shares = layers.Softmax(dtype="float32", name=f"{prefix}_attention")(scores)
    outputs = ops.matmul(ops.cast(shares, value.dtype), value)
    outputs = ops.reshape(ops.transpose(outputs, (0, 2, 1, 3)), (-1, count, width))
    return layers.Dense(width, name=f"{prefix}_proj")(outputs)


def _add(
    tokens: keras.KerasTensor,
    branch: keras.KerasTensor,
    scale: float | None,
    scale_name: str,
    name: str,
) -> keras.KerasTensor:
    if scale is not None:
        # A depthwise convolution over one token multiplies each channel by a learned number.
        initial = keras.initializers.Constant(scale)
        branch = layers.DepthwiseConv1D(
            1, use_bias=False, depthwise_initializer=initial, name=scale_name
        )(branch)
    return layers.Add(name=name)([tokens, branch])
