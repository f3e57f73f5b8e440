"""Sets up devices, dtypes and random seeds, before any device is used."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import keras
import tensorflow as tf
from tensorflow.python.eager import context

from research.system.cluster import Cluster
from research.system.errors import UserError
from research.system.team import Team, join_cluster

if TYPE_CHECKING:
    from research.settings.train_config import TrainConfig


STEPS_WORTH_COMPILING = 3_000  # with XLA on a GPU
KERAS_SETTINGS = {"floatx": "float32", "epsilon": 1e-7, "image_data_format": "channels_last"}


def set_up_keras() -> None:
    """Overrules the settings that Keras reads from `~/.keras/keras.json`, and says so.

    Raises:
      UserError: Keras was imported with another backend before this project.
    """
    if keras.config.backend() != "tensorflow":
        raise UserError(
            f"Keras was imported with the backend {keras.config.backend()!r} before this project, "
            "which needs tensorflow; set KERAS_BACKEND=tensorflow before Keras is imported"
        )
    for name, value in KERAS_SETTINGS.items():
        found = getattr(keras.config, name)()
        if found != value:
            print(
                f"note: Keras is configured with {name} {found!r}, but this project needs "
                f"{value!r}, which is used",
                file=sys.stderr,
                flush=True,
            )
            getattr(keras.config, f"set_{name}")(value)


def prepare(seed: int, deterministic: bool, virtual_devices: int) -> None:
    """Sets all random seeds, and splits the CPU into logical devices if requested.

    Raises:
      UserError: TensorFlow has already started with another number of CPU devices.
    """
    cpu = tf.config.list_physical_devices("CPU")[0]
    if virtual_devices > 1:
        devices = [tf.config.LogicalDeviceConfiguration()] * virtual_devices
        try:
            tf.config.set_logical_device_configuration(cpu, devices)
        except RuntimeError as error:
            raise UserError(
                f"virtual_devices is {virtual_devices}, but TensorFlow has already started in this "
                "process; set it in a new process"
            ) from error
    keras.utils.set_random_seed(seed)
    keep_order_of_sums()
    if deterministic:
        tf.config.experimental.enable_op_determinism()


def keep_order_of_sums() -> None:
    """Switches off TensorFlow's memory optimizer, which changes sums of three or more tensors.

    If it expects that a graph needs more than 205 MB on a CPU, it adds such tensors in the order in
    which they are computed. The order depends on the threads, and the result on the order. Even
    `enable_op_determinism` does not prevent this, and TensorFlow (2.21) has no public setting for
    it. On a GPU, the optimizer begins only if the GPU's memory is nearly full.
    """
    process = context.context()
    process._config = process._config or tf.compat.v1.ConfigProto()
    options = process._config.graph_options.rewrite_options
    options.memory_optimization = options.NO_MEM_OPT
    tf.config.optimizer.set_experimental_options({})  # this thread uses it from now on


def is_deterministic() -> bool:
    """Returns whether this process only allows deterministic operations, also from an earlier run.

    TensorFlow has no public function for this, and none that allows the others again.
    """
    try:
        tf.timestamp()
    except tf.errors.FailedPreconditionError:
        return True
    return False


def make_strategy(distribution: str) -> tf.distribute.Strategy:
    """Returns the strategy that builds and trains the model on this machine.

    Args:
      distribution: `none` for one device; otherwise all GPUs, or all logical CPU devices if there
        is no GPU.
    """
    kind = "GPU" if has_gpu() else "CPU"
    devices = [device.name for device in tf.config.list_logical_devices(kind)]
    if distribution != "none" and len(devices) > 1:
        return tf.distribute.MirroredStrategy(devices)
    return tf.distribute.get_strategy()


def has_gpu() -> bool:
    """Returns whether TensorFlow computes on GPUs, and not on the CPU."""
    return bool(tf.config.list_logical_devices("GPU"))


def concurrent_batches(replicas: int = 1) -> int:
    """Returns how many batches to compute at the same time where the weights do not change.

    On a CPU, one batch leaves the processors idle for a tenth of the time. Two batches need the
    memory for the activations of both.

    Args:
      replicas: number of devices that share each batch.
    """
    return 1 if has_gpu() or replicas > 1 else 2


def pipeline_options() -> tf.data.Options:
    """Returns the options of input pipelines, whose parallelism is fixed.

    The thread of autotuning would delay the end of each iterator by up to five seconds, and the
    optimizations would take longer than they save.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    return options


def resolve_precision(precision: str) -> str:
    """Returns `float32`, `bfloat16` or `float16`; `auto` chooses what the slowest device does fast.

    On NVIDIA GPUs `auto` gives bfloat16 from compute capability 8.0, float16 from 7.0, and float32
    below. On CPUs it gives bfloat16 if they have AMX matrix units, else float32; `build_model`
    replaces bfloat16 by float32 if depthwise convolutions are trained with their BatchNorm. With
    AVX-512 instructions alone, bfloat16 must be requested, see `bfloat16_speedup`.
    """
    if precision != "auto":
        return precision
    capabilities = [
        tf.config.experimental.get_device_details(gpu).get("compute_capability", (0, 0))
        for gpu in tf.config.list_physical_devices("GPU")
    ]
    return fast_precision(capabilities, cpu_flags())


def fast_precision(capabilities: Sequence[tuple[int, int]], cpu_flags: frozenset[str]) -> str:
    """Returns the dtype for GPUs of these compute capabilities; for the CPU if there are none."""
    if not capabilities:
        return "bfloat16" if "amx_bf16" in cpu_flags else "float32"
    slowest = min(capabilities)
    return "bfloat16" if slowest >= (8, 0) else "float16" if slowest >= (7, 0) else "float32"


def bfloat16_speedup(cpu_flags: frozenset[str], has_depthwise: bool) -> str | None:
    """Returns how many times as fast steps in bfloat16 are as in float32, as measured on CPUs.

    Args:
      cpu_flags: what the CPU can do, see `cpu_flags`.
      has_depthwise: whether the network has depthwise convolutions.

    Returns:
      The smallest and the largest factor of several networks; None if there is no gain.
    """
    if "amx_bf16" in cpu_flags:
        return "1.0 to 1.6" if has_depthwise else "1.5 to 4.6"
    return "1.4 to 1.8" if "avx512_bf16" in cpu_flags and not has_depthwise else None


def cpu_flags() -> frozenset[str]:
    """Returns the names of the CPU's instruction sets as Linux gives them; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # not Linux
        return frozenset()
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), ()))


def set_precision(precision: str) -> None:
    """Sets Keras's dtype policy: layers compute in `precision`, variables stay float32."""
    keras.config.set_dtype_policy("float32" if precision == "float32" else f"mixed_{precision}")


def resolve_xla(xla: str, communicates: str | None, steps: int) -> bool:
    """Returns whether to compile the training step with XLA; `auto` does so in long runs on GPUs.

    On an H100, compiling MobileNetV2 took 36 seconds longer than building the graph without XLA,
    and each step of 32 photos was 8 ms shorter. On CPUs, XLA made depthwise convolutions nine
    times slower.

    Args:
      xla: `auto`, `on` or `off`.
      communicates: the reason why devices exchange values within the forward or backward pass;
        None if they do not.
      steps: number of training steps of the run.

    Raises:
      UserError: XLA is requested, but cannot compile the exchange.
    """
    if xla == "on" and communicates:
        raise UserError(
            f"xla is 'on', but {communicates}, and XLA cannot compile an exchange between devices; "
            "give --xla=off"
        )
    pays = has_gpu() and steps >= STEPS_WORTH_COMPILING
    return xla == "on" or (xla == "auto" and pays and not communicates)


def start(config: TrainConfig, cluster: Cluster | None = None) -> Team:
    """Sets up this process for a run, and connects to the other workers if there are any.

    Raises:
      UserError: the devices are not available, or the workers cannot connect (`WorkerLostError`).
    """
    if cluster is not None and config.virtual_devices > 1:
        raise UserError(
            f"virtual_devices is {config.virtual_devices}, but a worker of several uses its GPUs "
            "or its whole CPU; leave out --virtual_devices, or give --distribution=mirrored"
        )
    set_up_keras()
    prepare(config.seed, config.deterministic, config.virtual_devices)
    set_precision(resolve_precision(config.precision))
    if cluster is not None:
        return Team(join_cluster(cluster, config.worker_timeout), cluster)
    return Team(make_strategy(config.distribution))
