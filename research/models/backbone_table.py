"""The table of backbones.

To add one's own, add an entry to `BACKBONES`; `SmallResNet` there is an example. This module must
stay free of TensorFlow and Keras until a backbone is built: the flags look names up in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from research.models.build import Backbone, Stage, nearest_names
from research.system.errors import UserError

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    from research.models.build import Build, Preprocessing


def keras_application(name: str) -> Build:
    """Returns the builder of a network of keras.applications, e.g. 'ResNet101V2', without top."""

    def build(input_shape: tuple[int, int, int], weights: str | None) -> keras.Model:
        import keras

        network = getattr(keras.applications, name)
        return network(include_top=False, weights=weights, input_shape=input_shape)

    return build


def keras_preprocessing(module: str) -> Preprocessing:
    """Returns `keras.applications.<module>.preprocess_input`, e.g. of 'resnet_v2', on tensors."""

    def preprocess(images: tf.Tensor) -> tf.Tensor:
        import keras

        # A NumPy array would be overwritten: preprocess_input works in place on those.
        images = keras.ops.convert_to_tensor(images, "float32")
        function = getattr(keras.applications, module).preprocess_input
        return function(images, data_format="channels_last")

    return preprocess


def _efficientnet(name: str) -> Build:
    """Returns the builder of a first-version EfficientNet, which always scales its input alike.

    Keras adds the layer that completes the division by the standard deviation, and the means and
    deviations themselves, only together with the ImageNet weights. Without them, weights that come
    from a file or from a checkpoint would see another input than they were trained on. The values
    stored as variances are deviations: github.com/tensorflow/tensorflow/issues/49930.
    """

    def build(input_shape: tuple[int, int, int], weights: str | None) -> keras.Model:
        import keras

        model = keras_application(name)(input_shape, weights)
        if weights is not None:
            return model
        deviation = (0.229, 0.224, 0.225)
        rescaling = keras.layers.Rescaling([1 / value**0.5 for value in deviation])

        def call(layer, *inputs, **options):  # type: ignore[no-untyped-def]
            outputs = layer(*inputs, **options)
            return rescaling(outputs) if isinstance(layer, keras.layers.Normalization) else outputs

        model = keras.models.clone_model(model, call_function=call)
        for layer in model.layers:
            if isinstance(layer, keras.layers.Normalization):
                layer.adapt_mean.assign((0.485, 0.456, 0.406))
                layer.adapt_variance.assign(deviation)
                # The layer computes with constants that it derives from these variables here.
                layer.finalize_state()
        return model

    return build


def _small_resnet(input_shape: tuple[int, int, int], weights: str | None) -> keras.Model:
    from research.models.residual import build_small_resnet

    return build_small_resnet(input_shape, weights)


def _family(
    names: str, module: str, stages: tuple[Stage, ...], minimum_size: int = 32
) -> tuple[Backbone, ...]:
    preprocessing = keras_preprocessing(module)
    return tuple(
        Backbone(name, keras_application(name), preprocessing, stages, minimum_size)
        for name in names.split()
    )


def _numbered(pattern: str, first_layer: str, last: int) -> tuple[Stage, ...]:
    """Returns stages 2 to `last`, e.g. `Stage('conv2', 'conv2_')` of ('conv{}', 'conv{}_')."""
    return tuple(Stage(pattern.format(n), first_layer.format(n)) for n in range(2, last + 1))


def _groups(*first_layers: str) -> tuple[Stage, ...]:
    """Returns the stages of a MobileNet: its rows of equal width in the paper's table."""
    stages = (Stage(f"stage{n}", first) for n, first in enumerate(first_layers[:-1], start=1))
    return Stage("stem"), *stages, Stage("top", first_layers[-1])


def _efficientnet_stages(blocks: int) -> tuple[Stage, ...]:
    names = _numbered("block{}", "block{}a_", blocks)
    return Stage("stem"), Stage("block1", "block1a_"), *names, Stage("top", "top_")


def _convnext(size: str) -> Backbone:
    prefix = f"convnext_{size.lower()}"
    downsampled = (Stage(f"stage{n}", f"{prefix}_downsampling_block_{n - 1}") for n in (1, 2, 3))
    stages = (Stage("stem"), Stage("stage0", f"{prefix}_stage_0_"), *downsampled)
    name = f"ConvNeXt{size}"
    return Backbone(name, keras_application(name), keras_preprocessing("convnext"), stages)


_CONV_STAGES = (Stage("stem"), *_numbered("conv{}", "conv{}_", 5))
_VGG_STAGES = (Stage("block1"), *_numbered("block{}", "block{}_", 5))
_XCEPTION_STAGES = (Stage("block1"), *_numbered("block{}", "block{}_", 14))
_INCEPTION_STAGES = (
    Stage("stem"),
    Stage("mixed0", 18),  # The layer before it is a pooling layer that Keras named.
    *(Stage(f"mixed{n}", after=f"mixed{n - 1}") for n in range(1, 11)),
)
_MOBILENET_V2_STAGES = _groups(
    "expanded_conv_", "block_1_", "block_3_", "block_6_", "block_10_", "block_13_", "block_16_",
    "Conv_1",
)  # fmt: skip
_MOBILENET_V3_SMALL_STAGES = _groups(
    "expanded_conv_", "expanded_conv_1_", "expanded_conv_3_", "expanded_conv_6_",
    "expanded_conv_8_", "conv_1",
)  # fmt: skip
_MOBILENET_V3_LARGE_STAGES = _groups(
    "expanded_conv_", "expanded_conv_1_", "expanded_conv_3_", "expanded_conv_6_",
    "expanded_conv_10_", "expanded_conv_12_", "conv_1",
)  # fmt: skip

_ENTRIES = (
    *_family("VGG16", "vgg16", _VGG_STAGES),
    *_family("VGG19", "vgg19", _VGG_STAGES),
    *_family("InceptionV3", "inception_v3", _INCEPTION_STAGES, minimum_size=75),
    *_family("ResNet50 ResNet101 ResNet152", "resnet", _CONV_STAGES),
    *_family("ResNet50V2 ResNet101V2 ResNet152V2", "resnet_v2", _CONV_STAGES),
    *_family("Xception", "xception", _XCEPTION_STAGES, minimum_size=71),
    *_family("MobileNetV2", "mobilenet_v2", _MOBILENET_V2_STAGES),
    *_family("MobileNetV3Small", "mobilenet_v3", _MOBILENET_V3_SMALL_STAGES),
    *_family("MobileNetV3Large", "mobilenet_v3", _MOBILENET_V3_LARGE_STAGES),
    *_family("DenseNet121 DenseNet169 DenseNet201", "densenet", _CONV_STAGES),
    *(
        Backbone(
            name=f"EfficientNetB{n}",
            build=_efficientnet(f"EfficientNetB{n}"),
            preprocessing=keras_preprocessing("efficientnet"),
            stages=_efficientnet_stages(blocks=7),
        )
        for n in range(8)
    ),
    *_family(
        "EfficientNetV2B0 EfficientNetV2B1 EfficientNetV2B2 EfficientNetV2B3 EfficientNetV2S",
        "efficientnet_v2",
        _efficientnet_stages(blocks=6),
    ),
    *_family("EfficientNetV2M EfficientNetV2L", "efficientnet_v2", _efficientnet_stages(blocks=7)),
    *(_convnext(size) for size in ("Tiny", "Small", "Base", "Large", "XLarge")),
    Backbone(
        name="SmallResNet",
        build=_small_resnet,
        preprocessing=keras_preprocessing("resnet_v2"),
        stages=(Stage("stem"), *(Stage(f"stage{n}", f"stage{n}_") for n in (1, 2, 3))),
    ),
)

BACKBONES: Mapping[str, Backbone] = MappingProxyType({entry.name: entry for entry in _ENTRIES})


def find_backbone(name: str) -> Backbone:
    """Returns the table's entry of that name; raises `UserError` naming the nearest ones."""
    if name in BACKBONES:
        return BACKBONES[name]
    nearest = nearest_names(name, BACKBONES)
    hint = f"nearest: {nearest}" if nearest else ", ".join(BACKBONES)
    raise UserError(f"backbone is {name!r}; expected one of the table, {hint}")
