"""The table of backbones.

To add a backbone, add an entry to `BACKBONES`; see `SmallResNet` for an example. This module must
not import TensorFlow or Keras before a backbone is built: the flags read the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from research.models.backbone import Backbone, Stage, check_fields, nearest_names
from research.system.errors import UserError
from research.system.python_file import is_python_reference, load_object_from_file

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    from research.models.backbone import Build, Preprocessing


def keras_application(name: str) -> Build:
    """Returns a function that builds `keras.applications.<name>` without top."""

    def build(input_shape: tuple[int, int, int], weights: str | None) -> keras.Model:
        import keras

        network = getattr(keras.applications, name)
        return network(include_top=False, weights=weights, input_shape=input_shape)

    return build


def keras_preprocessing(module: str) -> Preprocessing:
    """Returns a function that applies `keras.applications.<module>.preprocess_input` to tensors."""

    def preprocess(images: tf.Tensor) -> tf.Tensor:
        import keras

        # preprocess_input changes a NumPy array in place.
        images = keras.ops.convert_to_tensor(images, "float32")
        function = getattr(keras.applications, module).preprocess_input
        return function(images, data_format="channels_last")

    return preprocess


def _efficientnet(name: str) -> Build:
    """Returns a function that builds EfficientNetB0 to B7 with the input scaling of ImageNet.

    Only for ImageNet weights, Keras sets the mean and the variance of the `Normalization` layer and
    adds a `Rescaling` layer, which completes the division by the standard deviation. Weights from a
    file or a checkpoint need the same scaling, so this function always adds it. Keras stores the
    standard deviations as variances: github.com/tensorflow/tensorflow/issues/49930.
    """

    def build(input_shape: tuple[int, int, int], weights: str | None) -> keras.Model:
        import keras

        model = keras_application(name)(input_shape, weights)
        if weights is not None:
            return model

        def call(layer, *inputs, **options):  # type: ignore[no-untyped-def]
            outputs = layer(*inputs, **options)
            if not isinstance(layer, keras.layers.Normalization):
                return outputs
            deviation = (0.229, 0.224, 0.225)
            layer.adapt_mean.assign((0.485, 0.456, 0.406))
            layer.adapt_variance.assign(deviation)
            layer.finalize_state()  # computes the constants that the layer uses
            return keras.layers.Rescaling([1 / value**0.5 for value in deviation])(outputs)

        return keras.models.clone_model(model, call_function=call)

    return build


def _small_resnet(input_shape: tuple[int, int, int], weights: str | None) -> keras.Model:
    from research.models.residual import build_small_resnet

    return build_small_resnet(input_shape, weights)


def _family(
    names: str,
    module: str,
    stages: tuple[Stage, ...],
    minimum_size: int = 32,
    build: Callable[[str], Build] = keras_application,
) -> tuple[Backbone, ...]:
    """Returns an entry for each of the names, which are separated by spaces."""
    return tuple(
        Backbone(
            name,
            build(name),
            keras_preprocessing(module),
            stages,
            minimum_size,
            has_imagenet_weights=True,
        )
        for name in names.split()
    )


def _vision_transformer(
    name: str,
    module: str,
    size: str,
    patch: int,
    trained_size: int,
    registers: int = 0,
    layer_scale: float | None = None,
    with_mean: bool = False,
) -> Backbone:
    """Returns the entry of a transformer; see `build_vision_transformer` for the arguments."""
    width, depth = _TRANSFORMER_SIZES[size]

    def build(input_shape: tuple[int, int, int], weights: str | None) -> keras.Model:
        from research.models.vision_transformer import build_vision_transformer

        return build_vision_transformer(
            input_shape,
            weights,
            name,
            width,
            depth,
            patch,
            trained_size,
            registers,
            layer_scale,
            with_mean,
        )

    stages = _stages("stem", **{f"block{n}": f"block{n}_" for n in range(depth)})
    return Backbone(name, build, keras_preprocessing(module), stages, 2 * patch, patch)


def _stages(first: str, **first_layers: int | str) -> tuple[Stage, ...]:
    """Returns the stage at layer 0, and a stage for each keyword."""
    return Stage(first), *(Stage(name, layer) for name, layer in first_layers.items())


def _blocks(last: int) -> tuple[Stage, ...]:
    return _stages("block1", **{f"block{n}": f"block{n}_" for n in range(2, last + 1)})


def _efficientnet_stages(last: int) -> tuple[Stage, ...]:
    blocks = {f"block{n}": f"block{n}a_" for n in range(1, last + 1)}
    return _stages("stem", **blocks, top="top_")


def _mobilenet(
    name: str, module: str, block: str, numbers: tuple[int, ...], top: str
) -> tuple[Backbone, ...]:
    """Returns the entry of a MobileNet, with a stage for each output width in the paper's table."""
    first_layers = ("expanded_conv_", *(block.format(n) for n in numbers))
    stages = {f"stage{n}": first for n, first in enumerate(first_layers, start=1)}
    return _family(name, module, _stages("stem", **stages, top=top))


def _convnext(size: str) -> tuple[Backbone, ...]:
    prefix = f"convnext_{size.lower()}"
    later = {f"stage{n}": f"{prefix}_downsampling_block_{n - 1}" for n in (1, 2, 3)}
    stages = _stages("stem", stage0=f"{prefix}_stage_0_", **later)
    return _family(f"ConvNeXt{size}", "convnext", stages)


_CONV_STAGES = _stages("stem", conv2="conv2_", conv3="conv3_", conv4="conv4_", conv5="conv5_")
# Keras generates the names of InceptionV3's convolutions, so its stages are given by index.
_INCEPTION_STARTS = (18, 41, 64, 87, 101, 133, 165, 197, 229, 249, 280)

# Width and depth.
_TRANSFORMER_SIZES = {
    "Tiny": (192, 12),
    "Small": (384, 12),
    "Medium": (512, 12),
    "Base": (768, 12),
    "Large": (1024, 24),
}
# Names end in the pretrained image size, unless it is 224 (ViT, DeiT) or 518 pixels (DINOv2). ViT
# scales photos to [-1, 1]; DeiT and DINOv2 with the mean and the deviation of ImageNet.
_TRANSFORMERS = (
    *(
        _vision_transformer(f"ViT{size}{ending}", "resnet_v2", size, 16, pixels)
        for ending, pixels in (("", 224), ("384", 384))
        for size in ("Tiny", "Small", "Base", "Large")
    ),
    *(
        _vision_transformer(f"DeiT{size}{ending}", "densenet", size, 16, pixels)
        for size, ending, pixels in (
            ("Tiny", "", 224),
            ("Small", "", 224),
            ("Base", "", 224),
            ("Base", "384", 384),
        )
    ),
    *(
        _vision_transformer(f"DeiT3{size}{ending}", "densenet", size, 16, pixels, 0, 1e-6)
        for size, ending, pixels in (
            ("Small", "", 224),
            ("Medium", "", 224),
            ("Base", "", 224),
            ("Large", "", 224),
            ("Small", "384", 384),
            ("Base", "384", 384),
            ("Large", "384", 384),
        )
    ),
    *(
        _vision_transformer(
            f"DINOv2{size}{ending}", "densenet", size, 14, 518, registers, 1e-5, with_mean=True
        )
        for ending, registers in (("", 0), ("Registers", 4))
        for size in ("Small", "Base", "Large")
    ),
)

_ENTRIES = (
    *_family("VGG16 VGG19", "vgg16", _blocks(5)),
    *_family(
        "InceptionV3",
        "inception_v3",
        _stages("stem", **{f"mixed{n}": index for n, index in enumerate(_INCEPTION_STARTS)}),
        minimum_size=75,
    ),
    *_family("ResNet50 ResNet101 ResNet152", "resnet", _CONV_STAGES),
    *_family("ResNet50V2 ResNet101V2 ResNet152V2", "resnet_v2", _CONV_STAGES),
    *_family("Xception", "xception", _blocks(14), minimum_size=71),
    *_mobilenet("MobileNetV2", "mobilenet_v2", "block_{}_", (1, 3, 6, 10, 13, 16), "Conv_1"),
    *_mobilenet("MobileNetV3Small", "mobilenet_v3", "expanded_conv_{}_", (1, 3, 6, 8), "conv_1"),
    *_mobilenet(
        "MobileNetV3Large", "mobilenet_v3", "expanded_conv_{}_", (1, 3, 6, 10, 12), "conv_1"
    ),
    *_family("DenseNet121 DenseNet169 DenseNet201", "densenet", _CONV_STAGES),
    *_family(
        " ".join(f"EfficientNetB{n}" for n in range(8)),
        "efficientnet",
        _efficientnet_stages(7),
        build=_efficientnet,
    ),
    *_family(
        "EfficientNetV2B0 EfficientNetV2B1 EfficientNetV2B2 EfficientNetV2B3 EfficientNetV2S",
        "efficientnet_v2",
        _efficientnet_stages(6),
    ),
    *_family("EfficientNetV2M EfficientNetV2L", "efficientnet_v2", _efficientnet_stages(7)),
    *(entry for size in ("Tiny", "Small", "Base", "Large", "XLarge") for entry in _convnext(size)),
    *_TRANSFORMERS,
    Backbone(
        name="SmallResNet",
        build=_small_resnet,
        preprocessing=keras_preprocessing("resnet_v2"),
        stages=_stages("stem", stage1="stage1_", stage2="stage2_", stage3="stage3_"),
    ),
)

BACKBONES: Mapping[str, Backbone] = {entry.name: entry for entry in _ENTRIES}


def find_backbone(name: str) -> Backbone:
    """Returns the entry of a name, or the backbone in a user's file, given as FILE.py:NAME.

    Raises:
      UserError: there is no such entry (the nearest names are in the message), or the file cannot
        be imported or defines no such object of the class `Backbone`.
    """
    if is_python_reference(name):
        found = load_object_from_file("backbone", name, Backbone)
        check_fields(found, name)
        return found
    if name in BACKBONES:
        return BACKBONES[name]
    nearest = nearest_names(name, BACKBONES)
    expected = f"a known backbone, nearest: {nearest}" if nearest else ", ".join(BACKBONES)
    raise UserError(f"backbone is {name!r}; expected {expected}, or FILE.py:NAME")
