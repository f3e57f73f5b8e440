"""Devices, number formats and seeds: set once, before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import keras
import tensorflow as tf

from research.batches import Share
from research.config import TrainConfig
from research.errors import UserError
from research.hosts.cluster import Cluster
from research.hosts.team import Team, join_cluster


def set_up(seed: int, deterministic: bool, virtual_devices: int) -> None:
    """Seeds every generator, and splits the CPU if asked; before any device is used.

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
                "process; set it in a new one"
            ) from error
    keras.utils.set_random_seed(seed)
    if deterministic:
        tf.config.experimental.enable_op_determinism()


def make_strategy(distribution: str) -> tf.distribute.Strategy:
    """Returns the strategy under which everything is built and run on this machine.

    Args:
      distribution: `none`, `mirrored` (all GPUs, or all logical CPU devices where there is no
        GPU), or `auto`: mirrored where there are several.
    """
    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    devices = [device.name for device in tf.config.list_logical_devices(kind)]
    if distribution == "mirrored" or (distribution == "auto" and len(devices) > 1):
        return tf.distribute.MirroredStrategy(devices)
    return tf.distribute.get_strategy()


def resolve_precision(precision: str) -> str:
    """Returns `float32`, `bfloat16` or `float16`; `auto` takes what the slowest device is fast in.

    On NVIDIA GPUs that is bfloat16 from compute capability 8.0 on, float16 from 7.0 on, float32
    before. On CPUs it is float32, or bfloat16 where they have matrix units for it (AMX). With the
    vector instructions of AVX-512 bfloat16 is left to be asked for: it made a step of ResNet101V2
    1.4 to 1.8 times faster, one of MobileNetV2 no faster.
    """
    if precision != "auto":
        return precision
    capabilities = [
        tf.config.experimental.get_device_details(gpu).get("compute_capability", (0, 0))
        for gpu in tf.config.list_physical_devices("GPU")
    ]
    return fast_precision(capabilities, _cpu_flags())


def fast_precision(capabilities: Sequence[tuple[int, int]], cpu_flags: frozenset[str]) -> str:
    """Returns the format for GPUs of these compute capabilities; for the CPU if there is none."""
    if not capabilities:
        return "bfloat16" if "amx_bf16" in cpu_flags else "float32"
    slowest = min(capabilities)
    return "bfloat16" if slowest >= (8, 0) else "float16" if slowest >= (7, 0) else "float32"


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # not on Linux
        return frozenset()
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), ()))


def set_precision(precision: str) -> None:
    """Sets Keras's policy: layers compute in `precision`, their variables stay float32."""
    keras.config.set_dtype_policy("float32" if precision == "float32" else f"mixed_{precision}")


def resolve_xla(config: TrainConfig, replicas: int) -> bool:
    """Tells whether to compile the training step with XLA; `auto` does so on GPUs.

    On CPUs it made depthwise convolutions nine times slower.

    Raises:
      UserError: XLA is asked for where the step exchanges figures between devices within.
    """
    exchanges = config.bn_mode == "sync" and replicas > 1
    if config.xla == "on" and exchanges:
        raise UserError(
            f"xla is 'on' and bn_mode is 'sync' on {replicas} devices, but XLA compiles what one "
            "device computes by itself; give --xla=off, or --bn_mode=train"
        )
    on_gpus = bool(tf.config.list_physical_devices("GPU"))
    return config.xla == "on" or (config.xla == "auto" and on_gpus and not exchanges)


def share_out(
    batches: Callable[[Share], tf.data.Dataset], strategy: tf.distribute.Strategy, parts: int = 1
) -> tf.data.Dataset | tf.distribute.DistributedDataset:
    """Gives each device its share of every batch; each worker reads only the shares of its own.

    Args:
      batches: from a share to its batches, one element a device and step.
      strategy: whose devices.
      parts: batches a step, see `Share`.
    """
    # All elements have one shape, and all workers equally many: no worker has to ask the others
    # in every step whether they have one more.
    strategy.extended.experimental_enable_get_next_as_optional = False

    def of_input(context: tf.distribute.InputContext) -> tf.data.Dataset:
        count = context.num_replicas_in_sync // context.num_input_pipelines
        first = context.input_pipeline_id * count
        return batches(Share(context.num_replicas_in_sync, first, count, parts))

    return strategy.distribute_datasets_from_function(of_input)


def start(config: TrainConfig, cluster: Cluster | None = None) -> Team:
    """Sets up the process as a run's config says, and joins the other workers if there are any.

    Raises:
      UserError: the devices cannot be had, or the workers do not come together.
    """
    if cluster is not None and config.virtual_devices > 1:
        raise UserError(
            f"virtual_devices is {config.virtual_devices}, but a worker of several uses its GPUs "
            "or its whole CPU; leave out --virtual_devices, or unset TF_CONFIG"
        )
    set_up(config.seed, config.deterministic, config.virtual_devices)
    set_precision(resolve_precision(config.precision))
    if cluster is not None:
        return Team(join_cluster(cluster, config.worker_timeout), cluster)
    return Team(make_strategy(config.distribution))
