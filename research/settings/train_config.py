"""The settings of a training run, checked when they are built.

The command line is generated from these fields, so each default, help text and list of choices is
written only here. This module must not import TensorFlow, so that `--help` and flag errors appear
at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from typing import Any

from research.data.resizing import RESIZES
from research.models import hub
from research.models.backbone import Backbone
from research.models.backbone_table import find_backbone
from research.optimization.optimizers import OPTIMIZERS
from research.optimization.schedules import SCHEDULES
from research.settings import fields as settings
from research.settings.durations import count_steps, parse_shares, parse_steps
from research.settings.fields import AUTO
from research.settings.photo_config import PhotoConfig
from research.system.errors import UserError
from research.system.python_file import digest_of_file, is_python_reference

TASKS = ("classification", "multi_label")
FILE_DIGESTS = "sha256_of_python_files"
AUTOMATIC = "chosen_automatically"
LARGEST_SIZE = 4096  # height and width of photos in pixels
WEIGHTS_BY_NAME = ("imagenet", "none")
CHOSEN_BY_HYPERRULE = (
    "epochs",
    "head_epochs",
    "steps_per_epoch",
    "head_schedule",
    "backbone_schedule",
    "warmup",
    "mixup",
)


# It chooses these values itself.
ALSO_CHOSEN_BY_HYPERRULE = (("head_epochs", 0), ("steps_per_epoch", 0))


@dataclasses.dataclass(frozen=True)
class TrainConfig(PhotoConfig):
    """All settings of a training run. Raises `UserError` if a value is not allowed."""

    dataset: str = settings.declare(
        "cats_vs_dogs",
        "name of a TFDS image classification data set. Two data sets are built in and need no "
        "download: 'sketches' (drawings of cats and dogs) and 'digits' (handwriting, ten classes)",
    )
    data_dir: str | None = settings.path(
        "folder of prepared TFDS data sets; default: the folder that TFDS uses",
        changes_result=False,
    )
    source: str | None = settings.python_file(
        "your own Python class that yields photos and labels, as FILE.py:CLASS; replaces "
        "--dataset; see docs/extending.md"
    )
    split: str = settings.declare(
        "80/10/10",
        "percentages of the photos for training, validation and test, for data without splits of "
        "its own. With 0 for validation, there is no best checkpoint",
    )
    task: str = settings.choice(
        "classification",
        TASKS,
        "what to learn: the head, loss, metrics and gradients. 'classification' is one label per "
        "photo, 'multi_label' any number of labels per photo; for your own task, FILE.py:CLASS",
        or_python_file=True,
    )
    image_size: int = settings.count(
        160,
        "photos are resized to this height and width in pixels",
        minimum=8,
        maximum=LARGEST_SIZE,
    )
    resize: str = settings.choice(
        "squash",
        RESIZES,
        "how a photo becomes a square: 'squash' stretches it, 'crop' takes its central square, "
        "'pad' adds grey bars to its shorter sides. Evaluation, prediction and exported models do "
        "the same",
    )
    batch_size: int = settings.count(
        32, "global batch size: photos per batch, over all devices", minimum=1, maximum=2**16
    )
    accumulate_steps: int = settings.count(
        1,
        "number of batches per update, computed one after another. N batches give the same update "
        "as one batch N times as large, but need only the memory of one batch",
        minimum=1,
        maximum=2**16,
    )
    shuffle_size: int = settings.count(
        1000,
        "size of the shuffle buffer in photos; the next photo is drawn from it at random; 1 keeps "
        "the order",
        minimum=1,
    )
    horizontal_flip: bool = settings.declare(
        AUTO,
        "flip each training photo horizontally with probability 0.5, drawn again in each epoch. "
        "'auto' does so unless a classifier on frozen features recognises mirror images worse, as "
        "for text and digits",
        fallback=True,
    )
    random_crop_area: float = settings.rate(
        AUTO,
        "train on a random crop of each photo that keeps at least this share of its area; 1 for no "
        "crop. Like --rand_augment, --colour_jitter, --mixup and --cutmix, it starts after "
        "--head_epochs. 'auto' chooses 0.5 if a classifier on frozen features does not recognise "
        "crops worse, for at least 400 photos of which it predicts 50 to 93 % correctly",
        maximum=1.0,
        fallback=1.0,
    )
    colour_jitter: float = settings.strength(
        0.0,
        "multiply brightness, contrast and saturation of each training photo by random factors in "
        "[1 - x, 1 + x], where x is this value",
        maximum=1.0,
    )
    rand_augment: float = settings.strength(
        0.0,
        "apply two random operations (rotate, shear, posterize, ...) of this magnitude to each "
        "training photo; 10 is the full range, which is 30 in torchvision",
        maximum=10.0,
    )
    mixup: float = settings.strength(
        0.0,
        "blend each training photo and its label with another photo and its label; the share is "
        "drawn from a Beta distribution with this parameter; 0.2 is usual",
        maximum=100.0,
    )
    cutmix: float = settings.strength(
        0.0,
        "replace a box of each training photo, and the same share of its label, by those of "
        "another photo; the share is drawn as for --mixup; 1.0 is usual. If --mixup is also given, "
        "one of the two is chosen at random for each photo",
        maximum=100.0,
    )
    augmentation: tuple[str, ...] = settings.declare(
        (), "your own augmentation, as FILE.py:CLASS", choices=(), or_python_file=True
    )
    backbone: str = settings.declare(
        "ResNet101V2",
        "name of the backbone, see docs/backbones.md; for your own backbone, FILE.py:NAME",
        or_python_file=True,
    )
    weights: str = settings.declare(
        "imagenet",
        "initial weights of the backbone: 'imagenet', 'none' (random), or a file with Keras "
        "weights, a saved Keras model that contains the backbone, or weights of timm or Hugging "
        "Face (safetensors); hf://OWNER/NAME or hf://OWNER/NAME@REVISION downloads such a file",
    )
    unfreeze_from: str = settings.declare(
        AUTO,
        "first backbone layer to train: its index, its name, or a stage; 'none' trains only the "
        "head. 'auto' chooses layer 100, or the stage at half of the operations if frozen features "
        "classify less than 93 % of the photos correctly or the backbone has at most 100 layers, "
        "and 'none' for fewer than 160 photos if the head starts from a regression",
        fallback="100",
    )
    gradual_unfreezing: int | None = settings.count(
        None,
        "unfreeze the last stage first, then one more stage every N epochs; default: unfreeze all "
        "layers from --unfreeze_from at once",
        minimum=1,
    )
    epochs: int = settings.count(10, "epochs that train the head and the unfrozen layers")
    head_start: str = settings.choice(
        AUTO,
        (AUTO, "initial", "regression"),
        "where the training of the head starts: 'initial' are the initial weights of the task, "
        "zeros for classification; 'regression' is a logistic regression on the frozen features of "
        "at most 256 photos. 'auto' chooses the regression if there are at most 256 photos",
        fallback="initial",
    )
    head_epochs: int = settings.count(
        AUTO,
        "epochs that train only the head, before --epochs. 'auto' chooses 3, or more if that would "
        "be fewer than 80 steps, and 0 after a regression on all photos",
        fallback=3,
    )
    steps_per_epoch: int = settings.count(
        AUTO,
        "end each epoch after this many steps; the next epoch continues with the next photos. 0 "
        "shows all photos once. 'auto' does so too; if that is fewer than 20 steps, it chooses 20, "
        "unless frozen features suffice, there are fewer than 400 photos, or the head starts from "
        "a regression",
        fallback=0,
    )
    early_stopping: int | None = settings.count(
        None,
        "stop after this many epochs without a lower validation loss, counted from the first epoch "
        "that trains all unfrozen layers; run_eval.py --checkpoint=best evaluates the epoch with "
        "the lowest validation loss",
        minimum=1,
    )
    hyperrule: bool = settings.declare(
        False,
        "choose epochs, schedules, warm-up and mixup from the number of training photos "
        "(BiT-HyperRule); see recipes/hyperrule.flags",
    )
    head_optimizer: str = settings.choice(
        "adam", tuple(OPTIMIZERS), "optimizer of the head", or_python_file=True
    )
    momentum: float = settings.strength(0.9, "momentum of the optimizer sgd", maximum=0.999999)
    head_learning_rate: float = settings.rate(3e-3, "learning rate of the head")
    tuned_head_learning_rate: float = settings.rate(
        1e-4,
        "learning rate of the head after --head_epochs, when the backbone is trained too. With "
        "--head_epochs=0, it is used only after --head_start=regression; otherwise the first step "
        "uses --head_learning_rate",
    )
    head_schedule: str = settings.choice(
        "cosine",
        tuple(SCHEDULES),
        "schedule of the head's learning rate. It runs once over --head_epochs, and again over the "
        "epochs after them",
        or_python_file=True,
    )
    backbone_optimizer: str = settings.choice(
        "adam", tuple(OPTIMIZERS), "optimizer of the unfrozen backbone layers", or_python_file=True
    )
    backbone_learning_rate: float = settings.rate(
        AUTO,
        "learning rate of the unfrozen backbone layers. 'auto' chooses 3e-5 if "
        "frozen features suffice, and otherwise 1.5e-4 to 6e-4: the more photos a classifier on "
        "them misclassifies, the higher. It is lower with few photos",
        fallback=3e-5,
    )
    backbone_schedule: str = settings.choice(
        "cosine", tuple(SCHEDULES), "schedule of the backbone's learning rate", or_python_file=True
    )
    stage_decay: float = settings.rate(
        1.0,
        "layer-wise learning rate decay: each stage has the learning rate of the next stage times "
        "this factor; the last stage has --backbone_learning_rate",
        maximum=1.0,
    )
    warmup: str = settings.declare(
        "1epoch",
        "duration of the linear warm-up of each group's learning rate when the group begins to "
        "train, with a unit: 100steps or 0.5epochs; 0steps for no warm-up. The schedule one_cycle "
        "has its own warm-up",
    )
    clip_norm: float | None = settings.rate(
        None, "clip the global norm of the gradients in each update to this value"
    )
    weight_decay: float | None = settings.strength(
        None,
        "decoupled weight decay: each step subtracts this value times the learning rate times the "
        "weight from each weight, except in biases and normalization layers; default: 0.004 for "
        "adamw, 0 for the other optimizers",
    )
    l2_penalty: float = settings.strength(
        0.0, "add this value times the sum of squares of all trained kernels to the loss"
    )
    label_smoothing: float = settings.strength(
        0.0, "share of each label that is distributed evenly over all classes", maximum=0.99
    )
    class_weights: str = settings.choice(
        "none",
        ("none", "balanced"),
        "'balanced' multiplies the training loss of each photo by a weight that is inversely "
        "proportional to the frequency of its class; with --task=multi_label, the loss of each "
        "label that a photo has, by the ratio of photos without and with this label",
    )
    weight_averaging: float = settings.strength(
        0.99,
        "decay of the exponential moving average of the trained weights, which evaluation, "
        "prediction and export use instead of the weights; 0 for no averaging",
        maximum=0.999999,
    )
    mirror_averaging: bool = settings.declare(
        AUTO,
        "evaluate the mean of the logits of each photo and its mirror image. 'auto' follows the "
        "rule of --horizontal_flip",
        fallback=True,
    )
    evaluation_scale: float = settings.rate(
        AUTO,
        "run_eval.py resizes photos to --image_size times this factor, rounded to a multiple of 32 "
        "pixels, or of 14 pixels for DINOv2. Networks are often more accurate at a larger "
        "size than in training (FixRes). 'auto' chooses 1.2 after the last epoch, unless the "
        "validation loss is clearly higher at that size, as for images whose content always has "
        "the same scale; 1 without validation photos",
        maximum=8.0,
        fallback=1.0,
    )
    bn_mode: str = settings.choice(
        "frozen",
        ("frozen", "train", "sync"),
        "statistics of BatchNorm in the unfrozen layers: 'frozen' keeps the pretrained ones, "
        "'train' uses each device's part of the batch, 'sync' uses the batch over all devices",
    )
    precision: str = settings.choice(
        "auto",
        ("auto", "float32", "bfloat16", "float16"),
        "number format of the computation in the backbone; 'float16' uses a dynamic loss scale; "
        "'auto' chooses a format that is fast on the device",
    )
    recompute: str = settings.choice(
        "none",
        ("none", "blocks"),
        "'blocks' computes the activations of the unfrozen layers again in the backward pass, "
        "block by block, instead of keeping them: less memory, and about a third more time",
        changes_result=False,
    )
    xla: str = settings.choice(
        "auto",
        ("auto", "on", "off"),
        "compile the training step with XLA; 'auto' does so on GPUs in runs of at least 3,000 "
        "steps, because compiling takes about a minute",
        changes_result=False,
    )
    distribution: str = settings.choice(
        "auto",
        ("auto", "none", "mirrored", "multi_worker"),
        "'mirrored' trains on all devices of this machine; 'multi_worker' trains on the devices of "
        "all machines that the environment variable TF_CONFIG or Slurm names; 'auto' uses what is "
        "available",
        changes_result=False,
    )
    exchange: str = settings.choice(
        "float32",
        ("float32", "bfloat16"),
        "number format in which two or three devices send their gradients. 'bfloat16' sends half "
        "(two devices) or three quarters (three) of the bytes; sums are computed in float32",
    )
    worker_timeout: int = settings.count(
        600,
        "seconds to wait for the other workers before the run fails",
        minimum=1,
        changes_result=False,
        maximum=86400,
    )
    virtual_devices: int = settings.count(
        1,
        "split the CPU into this many logical devices, to try --distribution=mirrored",
        minimum=1,
        changes_result=False,
        maximum=64,
    )
    trunk_cache: str = settings.choice(
        "auto",
        ("auto", "memory", "disk", "off"),
        "cache the outputs of the frozen layers for each photo instead of computing them in each "
        "epoch. 'auto' uses a cache if that saves time, in memory or in a temporary file, with at "
        "most half of the free space; 'disk' keeps the cache for later runs",
    )
    photo_cache: str = settings.choice(
        "auto",
        ("auto", "memory", "disk", "none"),
        "where decoded photos are kept. 'disk' keeps them for later runs; 'none' decodes each "
        "photo when a batch needs it; 'auto' uses memory for few photos and 'disk' for many, "
        "with at most half of the free space, and else 'none'",
        changes_result=False,
    )
    cache_dir: str | None = settings.path(
        "folder of the files of --trunk_cache=disk and --photo_cache; default: "
        "~/.cache/finetune-loop",
        changes_result=False,
    )
    checkpoint_every: int | None = settings.count(
        None,
        "write a checkpoint every N steps, in addition to the one after each epoch",
        minimum=1,
        changes_result=False,
    )
    keep_checkpoints: int = settings.count(
        2,
        "number of latest checkpoints to keep, in addition to the best one. With 1, no earlier "
        "checkpoint is left if the latest is damaged",
        minimum=1,
        changes_result=False,
    )
    histogram_every: int | None = settings.count(
        None,
        "write histograms of all trained weights and their gradients for TensorBoard every N steps",
        minimum=1,
        changes_result=False,
    )
    profile_steps: str | None = settings.declare(
        None,
        "write a trace of steps A to B for TensorBoard's profiler, as A:B, such as 20:30",
        changes_result=False,
    )
    tracker: str | None = settings.python_file(
        "send the run's records to your own tracker, as FILE.py:CLASS", changes_result=False
    )
    ckpt_dir: str | None = settings.path(
        "folder of the run, for checkpoints, config.json, metrics.jsonl, TensorBoard events and "
        "pictures. Run again with the same folder to resume; default: a new folder in runs/",
        changes_result=False,
    )
    find_learning_rate: bool = settings.declare(
        False,
        "plot the loss against the learning rate and suggest a learning rate for each parameter "
        "group, instead of training",
        changes_result=False,
    )
    seed: int = settings.count(
        0, "random seed of the initial weights, the order of the photos, and the augmentation"
    )
    deterministic: bool = settings.declare(
        False, "use only deterministic operations, so that two runs on a GPU are bit-identical"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights.startswith(hub.SCHEME):
            hub.parse_repository(self.weights)
        elif "://" in self.weights:
            raise UserError(
                f"weights is {self.weights!r}, which is a URL; download the file, and give its path"
            )
        elif self.weights not in WEIGHTS_BY_NAME:
            object.__setattr__(self, "weights", os.path.abspath(os.path.expanduser(self.weights)))
        if not is_python_reference(self.backbone):  # the file is imported later
            self.check_sizes(find_backbone(self.backbone))
        if self.epochs == self.head_epochs == 0:
            raise UserError("epochs is 0 and head_epochs is 0; expected at least one epoch")
        parse_shares(self.split)
        defaults = {"image_folder": None, "labels": None, "dataset": "cats_vs_dogs"}
        defaults["split"] = TrainConfig.split
        for other, default in defaults.items():
            if self.source and getattr(self, other) != default:
                raise UserError(
                    f"source is {self.source!r} and {other} is {getattr(self, other)!r}; expected "
                    "only one of them"
                )
        count_steps(self.warmup, 1)
        parse_steps(self.profile_steps)
        if self.gradual_unfreezing and self.bn_mode != "frozen":
            raise UserError(
                f"gradual_unfreezing is {self.gradual_unfreezing} and bn_mode is {self.bn_mode!r}, "
                "which would change the statistics of stages that are still frozen; give "
                "--bn_mode=frozen"
            )
        if self.recompute == "blocks" and self.bn_mode != "frozen":
            raise UserError(
                f"recompute is 'blocks' and bn_mode is {self.bn_mode!r}, which would compute the "
                "statistics of BatchNorm twice; give --bn_mode=frozen"
            )
        given = [
            f"--{field.name}"
            for field in dataclasses.fields(self)
            if field.name in CHOSEN_BY_HYPERRULE
            and getattr(self, field.name) != field.default
            and (field.name, getattr(self, field.name)) not in ALSO_CHOSEN_BY_HYPERRULE
        ]
        if self.hyperrule and given:
            raise UserError(
                f"hyperrule chooses {' and '.join(given)} by the number of photos; leave out "
                f"{'this flag' if len(given) == 1 else 'these flags'}, or --hyperrule"
            )
        if self.hyperrule and self.trunk_cache in ("memory", "disk"):
            raise UserError(
                f"trunk_cache is {self.trunk_cache!r}, but hyperrule may choose mixup, which shows "
                "each photo differently in each epoch; give --trunk_cache=auto"
            )

    @property
    def data_name(self) -> str:
        """The source, folder, label file or TFDS data set of the photos."""
        return self.source or self.image_folder or self.labels or self.dataset

    def steps_per_pass(self, photos: int) -> int:
        """Returns the number of steps in which all training photos are shown once."""
        return math.ceil(photos / (self.batch_size * self.accumulate_steps))

    @property
    def evaluation_size(self) -> int:
        """Height and width in pixels of the photos in evaluation and prediction.

        A backbone in a user's file is imported: the user must have named it.
        """
        return self._evaluation_size(find_backbone(self.backbone))

    def _evaluation_size(self, backbone: Backbone) -> int:
        scale, size = self.evaluation_scale, self.image_size
        return size if scale in (1, AUTO) else backbone.nearest_size(size * scale)

    def check_sizes(self, backbone: Backbone) -> None:
        """Raises `UserError` if photos for training or evaluation do not fit the backbone.

        A config calls this for a backbone of the table. A backbone in a user's file is not imported
        when a config is built.
        """
        backbone.check_size(self.image_size)
        size, smallest = self._evaluation_size(backbone), backbone.minimum_size
        if not smallest <= size <= LARGEST_SIZE:
            raise UserError(
                f"evaluation_scale is {self.evaluation_scale}, which gives an evaluation size of "
                f"{size} pixels; expected {smallest} to {LARGEST_SIZE} pixels"
            )

    def to_json(self) -> str:
        """Returns the settings as a JSON object, one setting per line."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Builds a config from the text that `to_json` returned.

        Raises:
          UserError: the text is not such a JSON object, or a setting is unknown or not allowed.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"config.json is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise UserError("config.json does not contain a JSON object of settings")
        values.pop(FILE_DIGESTS, None)
        values.pop(AUTOMATIC, None)
        # Runs of earlier versions averaged no weights.
        values.setdefault("weight_averaging", 0.0)
        if values.get("steps_per_epoch", 0) is None:
            values["steps_per_epoch"] = 0
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"config.json has settings that this version does not know: {unknown}")
        return cls(**values)

    def differences(self, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Returns the settings that change the result and differ from `other`, with both values."""
        return {
            field.name: (getattr(self, field.name), getattr(other, field.name))
            for field in dataclasses.fields(self)
            if settings.setting_of(field).changes_result
            and getattr(self, field.name) != getattr(other, field.name)
        }


def python_files(config: TrainConfig) -> dict[str, Any]:
    """Returns the SHA-256 of each Python file that influences the result, by setting.

    The value is a list for a setting that may be given several times.
    """
    digests: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        setting, value = settings.setting_of(field), getattr(config, field.name)
        if setting.changes_result and setting.or_python_file:
            references = value if isinstance(value, tuple) else (value,)
            found = [digest_of_file(one) for one in references if one and is_python_reference(one)]
            if found:
                digests[field.name] = found if isinstance(value, tuple) else found[0]
    return digests


def names_in_files(config: TrainConfig, setting: str) -> list[str]:
    """Returns the names of classes, functions or objects in a setting of the form FILE.py:NAME."""
    value = getattr(config, setting)
    return [one.rpartition(":")[2] for one in (value if isinstance(value, tuple) else (value,))]
