"""The table of backbones.

To add a backbone, add an entry to `BACKBONES`; see `SmallResNet` for an example. This module must
not import TensorFlow or Keras before a backbone is built: the flags read the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from research.models.backbone import POOLING, Backbone, Stage, check_fields, nearest_names
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


def _convnext_v2(size: str, depths: tuple[int, ...], width: int) -> Backbone:
    """Returns the entry of a ConvNeXt V2; each stage has twice the channels of the one before."""
    name = f"ConvNeXtV2{size}"
    widths = tuple(width * 2**stage for stage in range(4))

    def build(input_shape: tuple[int, int, int], weights: str | None) -> keras.Model:
        from research.models.convnext_v2 import build_convnext_v2

        return build_convnext_v2(input_shape, weights, name, depths, widths)

    later = {f"stage{n}": f"stage{n}_downsample_norm" for n in (1, 2, 3)}
    stages = _stages("stem", stage0="stage0_block0_conv_dw", **later)
    return Backbone(name, build, keras_preprocessing("densenet"), stages)


def _mobilenet_v4(size: str, stem: int, *blocks: str) -> Backbone:
    """Returns the entry of a MobileNetV4; see `build_mobilenet_v4` for the arguments."""
    name = f"MobileNetV4Conv{size}"

    def build(input_shape: tuple[int, int, int], weights: str | None) -> keras.Model:
        from research.models.mobilenet_v4 import build_mobilenet_v4

        return build_mobilenet_v4(input_shape, weights, name, stem, *blocks)

    first_layers = {f"stage{n}": f"stage{n}_" for n in range(len(blocks))}
    stages = _stages("stem", **first_layers, top=POOLING)
    return Backbone(name, build, keras_preprocessing("densenet"), stages)


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
# The same holds for InceptionResNetV2. In NASNet, each stage begins after an output of a cell.
_INCEPTION_RESNET_STARTS = {
    "mixed_5b": 18,
    "block35": 41,
    "mixed_6a": 261,
    "block17": 275,
    "mixed_7a": 595,
    "block8": 618,
}

# The channels of the stem, and the blocks of each stage. A block has a kind, the sizes of its
# kernels, a factor that expands the channels, and the channels of its output. c3:32 is a
# convolution. e3x4:48 is a convolution that expands, and a projection. u35x4:80 is a universal
# inverted bottleneck; a depthwise convolution of size 0 is left out.
_MOBILENETS_V4 = (
    _mobilenet_v4(
        "Small",
        32,
        "c3:32 c1:32",
        "c3:96 c1:64",
        "u55x3:96" + 4 * " u03x2:96" + " u30x4:96",
        "u33x6:128 u55x4:128 u05x4:128 u05x3:128 u03x4:128 u03x4:128",
        "c1:960",
    ),
    _mobilenet_v4(
        "Medium",
        32,
        "e3x4:48",
        "u35x4:80 u33x2:80",
        "u35x6:160 u33x4:160 u33x4:160 u35x4:160 u33x4:160 u30x4:160 u00x2:160 u30x4:160",
        "u55x6:256 u55x4:256 u35x4:256 u35x4:256 u00x4:256 u30x4:256 u35x2:256 u55x4:256"
        " u00x4:256 u00x4:256 u50x2:256",
        "c1:960",
    ),
    _mobilenet_v4(
        "Large",
        24,
        "e3x4:48",
        "u35x4:96 u33x4:96",
        "u35x4:192" + 3 * " u33x4:192" + " u35x4:192" + 5 * " u53x4:192" + " u30x4:192",
        4 * "u55x4:512 "
        + "u50x4:512 u53x4:512 u50x4:512 u50x4:512 u53x4:512 u55x4:512"
        + 3 * " u50x4:512",
        "c1:960",
    ),
)

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
    *_family(
        "InceptionResNetV2",
        "inception_resnet_v2",
        _stages("stem", **_INCEPTION_RESNET_STARTS, top="conv_7b"),
        minimum_size=75,
    ),
    *_family("NASNetMobile", "nasnet", _stages("stem", stage1=111, stage2=294, stage3=531)),
    *_family("NASNetLarge", "nasnet", _stages("stem", stage1=111, stage2=384, stage3=711)),
    *_family(
        "MobileNet",
        "mobilenet",
        _stages(
            "stem",
            stage1="conv_dw_1",
            stage2="conv_pad_2",
            stage3="conv_pad_4",
            stage4="conv_pad_6",
            stage5="conv_pad_12",
        ),
    ),
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
    _convnext_v2("Atto", (2, 2, 6, 2), 40),
    _convnext_v2("Femto", (2, 2, 6, 2), 48),
    _convnext_v2("Pico", (2, 2, 6, 2), 64),
    _convnext_v2("Nano", (2, 2, 8, 2), 80),
    _convnext_v2("Tiny", (3, 3, 9, 3), 96),
    _convnext_v2("Base", (3, 3, 27, 3), 128),
    _convnext_v2("Large", (3, 3, 27, 3), 192),
    *_MOBILENETS_V4,
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
