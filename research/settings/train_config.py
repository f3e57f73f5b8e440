"""The settings of a training run: frozen, validated when built, declared here and nowhere else.

The command line is generated from these fields (`flags/`), so a default, a help text or a list of
choices stands here and nowhere else. This module must stay free of TensorFlow: `--help` and flag
errors answer at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from research.models.backbone_table import find_backbone
from research.optimization.optimizers import OPTIMIZERS
from research.optimization.schedules import SCHEDULES
from research.settings import fields as settings
from research.settings.durations import count_steps, parse_steps
from research.system.errors import UserError
from research.system.python_file import digest_of_file, is_python_reference

TASKS = ("classification",)
FILE_DIGESTS = "sha256_of_python_files"
WEIGHTS_BY_NAME = ("imagenet", "none")


# What is not the user's to set with --hyperrule, and what else than a default a recipe may say.
CHOSEN_BY_HYPERRULE: dict[str, object] = {
    "epochs": None,
    "head_epochs": 0,
    "steps_per_epoch": None,
    "head_schedule": None,
    "backbone_schedule": None,
    "warmup": None,
    "mixup": None,
}


@dataclasses.dataclass(frozen=True)
class TrainConfig(settings.Validated):
    """Everything that decides a training run. Raises `UserError` when a value is not allowed."""

    dataset: str = settings.text(
        "cats_vs_dogs",
        "any TFDS image classification data set by name; built in, without download: 'sketches', "
        "cats and dogs drawn by program, and 'digits', ten classes of handwriting",
    )
    image_folder: str | None = settings.path(
        "a folder with one subfolder of images a class, instead of --dataset"
    )
    data_dir: str | None = settings.path(
        "where TFDS keeps prepared data sets; TFDS's own default if not given",
        changes_result=False,
    )
    source: str | None = settings.python_file(
        "a Python class of your own that yields photos and labels, as FILE.py:CLASS, instead of "
        "--dataset; see docs/extending.md"
    )
    task: str = settings.choice(
        "classification",
        TASKS,
        "what is learned: head, loss, metrics and gradients; one of your own as FILE.py:CLASS",
        or_python_file=True,
    )
    image_size: int = settings.count(
        160, "height and width in pixels that photos are resized to", minimum=8, maximum=4096
    )
    batch_size: int = settings.count(
        32, "photos a batch, over all devices together", minimum=1, maximum=2**16
    )
    accumulate_steps: int = settings.count(
        1,
        "make each update from so many batches, computed one after another: that of one batch so "
        "many times as large, in the memory of one",
        minimum=1,
        maximum=2**16,
    )
    shuffle_size: int = settings.count(
        1000, "photos that the next one is drawn from; 1 keeps the order", minimum=1
    )
    horizontal_flip: bool = settings.switch(
        True,
        "mirror training photos left to right, one in two by chance, anew each epoch; not for "
        "writing, digits and what else is another thing in a mirror",
    )
    random_crop_area: float = settings.rate(
        1.0,
        "train on a random part of each photo of at least this share of its area; this and what "
        "follows, up to cutmix, in the epochs after --head_epochs",
        maximum=1.0,
    )
    colour_jitter: float = settings.strength(
        0.0,
        "vary brightness, contrast and saturation of training photos by up to this share each",
        maximum=1.0,
    )
    rand_augment: float = settings.strength(
        0.0,
        "change training photos by two random operations (rotate, shear, posterize, ...) of this "
        "magnitude; 10 is the whole range, as 30 is in torchvision",
        maximum=10.0,
    )
    mixup: float = settings.strength(
        0.0,
        "blend each training photo and its label with another, by a share drawn from the Beta "
        "distribution with this parameter; 0.2 is usual",
        maximum=100.0,
    )
    cutmix: float = settings.strength(
        0.0,
        "replace a box of each training photo, and that share of its label, by another's; drawn as "
        "for --mixup, 1.0 is usual; with both, one of them for each photo by chance",
        maximum=100.0,
    )
    augmentation: tuple[str, ...] = settings.several(
        (),
        "an augmentation of your own, as FILE.py:CLASS; may be given several times",
        or_python_file=True,
    )
    backbone: str = settings.text("ResNet101V2", "the pretrained network, by its Keras name")
    weights: str = settings.text(
        "imagenet",
        "'imagenet', 'none', or a file: Keras weights, or a saved Keras model that contains the "
        "backbone",
    )
    unfreeze_from: str = settings.text(
        "100",
        "first backbone layer that is trained: its index, its name or a stage; 'none' trains the "
        "head alone",
    )
    gradual_unfreezing: int | None = settings.count(
        None,
        "unfreeze the last stage first, and one stage more every so many epochs; default: all "
        "layers from --unfreeze_from at once",
        minimum=1,
    )
    epochs: int = settings.count(
        10, "epochs of fine-tuning the head and the unfrozen layers", minimum=0
    )
    head_epochs: int = settings.count(
        3, "epochs that train the head alone, before --epochs", minimum=0
    )
    steps_per_epoch: int | None = settings.count(
        None,
        "end each epoch after so many steps; the next one goes on with the photos after them",
        minimum=1,
    )
    early_stopping: int | None = settings.count(
        None,
        "end the run after so many epochs without a lower validation loss, counted from where all "
        "that is to be trained has begun; run_eval.py --checkpoint=best takes the least",
        minimum=1,
    )
    hyperrule: bool = settings.switch(
        False,
        "let the number of photos choose epochs, schedule and mixup (BiT-HyperRule); see "
        "recipes/hyperrule.flags",
    )
    head_optimizer: str = settings.choice(
        "adam", tuple(OPTIMIZERS), "optimizer of the new head", or_python_file=True
    )
    momentum: float = settings.strength(0.9, "momentum of the optimizer sgd", maximum=0.999999)
    head_learning_rate: float = settings.rate(3e-3, "learning rate of the new head")
    tuned_head_learning_rate: float = settings.rate(
        1e-4,
        "that of the head after --head_epochs, where the backbone is trained too; with "
        "--head_epochs=0 it is --head_learning_rate from the first step on",
    )
    head_schedule: str = settings.choice(
        "cosine",
        tuple(SCHEDULES),
        "how the head's learning rate changes over time; once over --head_epochs, and once over "
        "the epochs after them",
        or_python_file=True,
    )
    backbone_optimizer: str = settings.choice(
        "adam", tuple(OPTIMIZERS), "optimizer of the unfrozen layers", or_python_file=True
    )
    backbone_learning_rate: float = settings.rate(
        3e-5, "learning rate of the unfrozen backbone layers"
    )
    backbone_schedule: str = settings.choice(
        "cosine",
        tuple(SCHEDULES),
        "how the backbone's learning rate changes over time",
        or_python_file=True,
    )
    stage_decay: float = settings.rate(
        1.0,
        "multiply the learning rate by this for each stage further down from the last",
        maximum=1.0,
    )
    warmup: str = settings.text(
        "1epoch",
        "how long each group's learning rate rises from near zero to its value when it begins to "
        "train, with its unit: 100steps, 0.5epochs; 0steps for not at all; one_cycle has its own",
    )
    clip_norm: float | None = settings.rate(
        None, "scale an update's gradient down to this norm over all layers where it is greater"
    )
    weight_decay: float | None = settings.strength(
        None,
        "take this times the learning rate off each weight in each step, biases and norms spared; "
        "default: 0.004 for adamw, none for the others",
    )
    l2_penalty: float = settings.strength(
        0.0, "add this times the squared weights of every trained kernel to the loss"
    )
    label_smoothing: float = settings.strength(
        0.0, "train towards labels that give this share to all classes alike", maximum=0.99
    )
    class_weights: str = settings.choice(
        "none",
        ("none", "balanced"),
        "'balanced' weighs a photo's training loss by the inverse of how frequent its class is",
    )
    weight_averaging: float = settings.strength(
        0.99,
        "evaluate and save an exponential moving average of the trained weights, that keeps this "
        "share of itself in each step, such as 0.99; 0 for the weights themselves",
        maximum=0.999999,
    )
    mirror_averaging: bool = settings.switch(
        True, "evaluate the mean of the logits of each photo and of its mirror image"
    )
    evaluation_scale: float = settings.rate(
        1.2,
        "run_eval.py evaluates at this times --image_size, rounded to a multiple of 32 pixels, as "
        "networks see more in a larger photo than they were trained on (FixRes); 1 for what always "
        "fills the picture alike, such as scans and digits",
        maximum=8.0,
    )
    bn_mode: str = settings.choice(
        "frozen",
        ("frozen", "train", "sync"),
        "BatchNorm of the unfrozen layers: 'frozen' as pretrained, 'train' by each device's part "
        "of the batch, 'sync' by the batch over all devices",
    )
    precision: str = settings.choice(
        "auto",
        ("auto", "float32", "bfloat16", "float16"),
        "number format of the backbone's computation, with a dynamic loss scale for 'float16'; "
        "'auto' takes what the device is fast in",
    )
    xla: str = settings.choice(
        "auto",
        ("auto", "on", "off"),
        "compile each device's forward and backward pass with XLA; 'auto' does so on GPUs",
        changes_result=False,
    )
    distribution: str = settings.choice(
        "auto",
        ("auto", "none", "mirrored", "multi_worker"),
        "'mirrored' trains on all devices of this machine, 'multi_worker' on those of all machines "
        "that the environment variable TF_CONFIG names; 'auto' takes what there is",
        changes_result=False,
    )
    worker_timeout: int = settings.count(
        600,
        "seconds to wait for the other workers before giving up",
        minimum=1,
        changes_result=False,
        maximum=86400,
    )
    virtual_devices: int = settings.count(
        1,
        "split the CPU in so many logical devices, to try --distribution=mirrored",
        minimum=1,
        changes_result=False,
        maximum=64,
    )
    trunk_cache: str = settings.choice(
        "auto",
        ("auto", "memory", "disk", "off"),
        "keep what the frozen layers compute for each photo, instead of computing it every epoch; "
        "'auto' does so where it pays, in memory or a temporary file, in at most half of what is "
        "free; 'disk' keeps it for later runs too",
    )
    cache_dir: str | None = settings.path(
        "where --trunk_cache=disk keeps files; default: ~/.cache/finetune-loop",
        changes_result=False,
    )
    checkpoint_every: int | None = settings.count(
        None,
        "also write a checkpoint every so many steps, not only after each epoch",
        minimum=1,
        changes_result=False,
    )
    keep_checkpoints: int = settings.count(
        2,
        "keep so many of the last checkpoints, beside the best one; with 1 there is none to go "
        "back to where the last is damaged",
        minimum=1,
        changes_result=False,
    )
    histogram_every: int | None = settings.count(
        None,
        "write histograms of all trained weights and of their gradients for TensorBoard every so "
        "many steps",
        minimum=1,
        changes_result=False,
    )
    profile_steps: str | None = settings.text(
        None,
        "A:B writes a trace of the steps from A to B for TensorBoard's profiler",
        changes_result=False,
    )
    tracker: str | None = settings.python_file(
        "send the run's records to a tracker of your own, as FILE.py:CLASS",
        changes_result=False,
    )
    ckpt_dir: str | None = settings.path(
        "folder of the run: checkpoints, config.json, metrics.jsonl, TensorBoard events and "
        "pictures; run again with the same one to resume; default: a new folder under runs/",
        changes_result=False,
    )
    find_learning_rate: bool = settings.switch(
        False,
        "train nothing: draw the loss over learning rates, and suggest one for each group",
        changes_result=False,
    )
    seed: int = settings.count(
        0, "seed of initial weights, of the order of photos and of how they are changed", minimum=0
    )
    deterministic: bool = settings.switch(
        False, "use only deterministic operations, so that two runs end bit-identical on a GPU"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights not in WEIGHTS_BY_NAME:
            object.__setattr__(self, "weights", os.path.abspath(os.path.expanduser(self.weights)))
        smallest = find_backbone(self.backbone).minimum_size
        if self.image_size < smallest:
            raise UserError(
                f"image_size is {self.image_size}; {self.backbone} takes at least {smallest}"
            )
        if not smallest <= self.evaluation_size <= 4096:
            raise UserError(
                f"evaluation_scale is {self.evaluation_scale}, by which photos would be evaluated "
                f"at {self.evaluation_size} pixels; expected {smallest} to 4096"
            )
        if self.epochs + self.head_epochs == 0:
            raise UserError("epochs is 0 and head_epochs is 0; expected at least one epoch")
        if self.source and (self.image_folder or self.dataset != TrainConfig.dataset):
            other = "image_folder" if self.image_folder else "dataset"
            raise UserError(
                f"source is {self.source!r} and {other} is {getattr(self, other)!r}; expected one "
                "of them"
            )
        self._check_schedules()
        parse_steps(self.profile_steps)

    def _check_schedules(self) -> None:
        count_steps(self.warmup, 1)
        if self.gradual_unfreezing and self.bn_mode != "frozen":
            raise UserError(
                f"gradual_unfreezing is {self.gradual_unfreezing} and bn_mode is {self.bn_mode!r}, "
                "with which stages that are still frozen would change their statistics; give "
                "--bn_mode=frozen"
            )
        if self.hyperrule:
            self._check_hyperrule()

    def _check_hyperrule(self) -> None:
        given = [
            f"--{field.name}"
            for field in dataclasses.fields(self)
            if field.name in CHOSEN_BY_HYPERRULE
            and getattr(self, field.name) not in (field.default, CHOSEN_BY_HYPERRULE[field.name])
        ]
        if given:
            raise UserError(
                f"hyperrule chooses by the number of photos what {' and '.join(given)} would set; "
                f"leave out {'it' if len(given) == 1 else 'them'}, or hyperrule"
            )
        if self.trunk_cache in ("memory", "disk"):
            raise UserError(
                f"trunk_cache is {self.trunk_cache!r}, but hyperrule may choose mixup, which shows "
                "each photo otherwise every time; give --trunk_cache=auto"
            )

    @property
    def evaluation_size(self) -> int:
        """Height and width in pixels at which the trained model is used."""
        if self.evaluation_scale == 1:
            return self.image_size
        return 32 * max(1, round(self.image_size * self.evaluation_scale / 32))

    def to_json(self) -> str:
        """Returns the settings as a JSON object, one setting a line."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Builds the config that `to_json` wrote; raises `UserError` where that is not possible."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"config.json is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise UserError("config.json holds no JSON object of settings")
        values.pop(FILE_DIGESTS, None)
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"config.json has settings this version does not know: {unknown}")
        return cls(**values)

    def differences(self, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Returns the settings that would make `other` another run, each with both values."""
        return {
            field.name: (getattr(self, field.name), getattr(other, field.name))
            for field in dataclasses.fields(self)
            if settings.setting_of(field).changes_result
            and getattr(self, field.name) != getattr(other, field.name)
        }


def python_files(config: TrainConfig) -> dict[str, Any]:
    """Returns the SHA-256 of each Python file that a config names, by setting."""
    digests: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if settings.setting_of(field).changes_result and settings.setting_of(field).or_python_file:
            references = value if isinstance(value, tuple) else (value,)
            found = [digest_of_file(one) for one in references if one and is_python_reference(one)]
            if found:
                digests[field.name] = found if isinstance(value, tuple) else found[0]
    return digests
