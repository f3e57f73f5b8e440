"""Devices, number formats and seeds: set once, before anything is built."""

from __future__ import annotations

import keras
import tensorflow as tf

from research.batches import pad_batch, pipeline_options
from research.config import TrainConfig
from research.errors import UserError


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
    """Returns the strategy under which everything is built and run.

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
    """Returns `float32` or `bfloat16`; `auto` takes what is fast and needs no loss scaling.

    bfloat16 from GPUs of compute capability 8.0 on, float32 elsewhere: on CPUs bfloat16 was not
    faster, even with AVX-512 bfloat16 instructions.
    """
    if precision != "auto":
        return precision
    capabilities = [
        tf.config.experimental.get_device_details(gpu).get("compute_capability", (0, 0))
        for gpu in tf.config.list_physical_devices("GPU")
    ]
    return "bfloat16" if capabilities and min(capabilities) >= (8, 0) else "float32"


def set_precision(precision: str) -> None:
    """Sets Keras's policy: layers compute in `precision`, their variables stay float32."""
    keras.config.set_dtype_policy("mixed_bfloat16" if precision == "bfloat16" else "float32")


def feed(
    batches: tf.data.Dataset, batch_size: int, strategy: tf.distribute.Strategy
) -> tf.data.Dataset | tf.distribute.DistributedDataset:
    """Gives every batch one size and shares it out to the devices.

    The size is the global batch size, rounded up to a multiple of the number of devices; what is
    added weighs nothing.
    """
    replicas = strategy.num_replicas_in_sync
    size = -(-batch_size // replicas) * replicas
    padded = batches.map(lambda batch: pad_batch(batch, size))
    if replicas == 1:
        return padded
    options = pipeline_options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return strategy.experimental_distribute_dataset(padded.with_options(options))


def start(config: TrainConfig) -> tf.distribute.Strategy:
    """Sets up the process as a run's config says and returns its strategy."""
    set_up(config.seed, config.deterministic, config.virtual_devices)
    set_precision(resolve_precision(config.precision))
    return make_strategy(config.distribution)
