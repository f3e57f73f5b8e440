"""Devices, number formats and seeds: set once, before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import keras
import tensorflow as tf

from research.system.cluster import Cluster
from research.system.errors import UserError
from research.system.team import Team, join_cluster

if TYPE_CHECKING:
    from research.settings.train_config import TrainConfig


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


def resolve_xla(xla: str, communicates: str | None) -> bool:
    """Tells whether to compile the training step with XLA; `auto` does so on GPUs.

    On CPUs it made depthwise convolutions nine times slower.

    Args:
      xla: `auto`, `on` or `off`.
      communicates: what exchanges values between devices within the forward or backward pass, in a
        few words; None if nothing does.

    Raises:
      UserError: XLA is asked for, but cannot compile the exchange.
    """
    if xla == "on" and communicates:
        raise UserError(
            f"xla is 'on', but {communicates}, and XLA compiles only what one device computes by "
            "itself; give --xla=off"
        )
    on_gpus = bool(tf.config.list_physical_devices("GPU"))
    return xla == "on" or (xla == "auto" and on_gpus and not communicates)


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
