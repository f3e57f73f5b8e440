"""The processes that train together: how they connect, and the values they exchange."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from research.system.cluster import Cluster, check_port, wait_for_names
from research.system.errors import WorkerLostError, program_name
from research.system.interruption import by_the_system

# TensorFlow raises these in one worker when another worker has ended.
LOST = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
    tf.errors.InternalError,
    tf.errors.UnavailableError,
)


# Prints a note, then a line, and kills the process with this number, unless standard input closes.
WATCHER = """
import os, select, signal, sys
process, note_after, note, timeout, line = sys.argv[1:]
def has_ended(seconds):
    return select.select([sys.stdin], [], [], seconds)[0]
early = min(float(note_after), float(timeout))
if not has_ended(early):
    print(note, file=sys.stderr, flush=True)
    if not has_ended(float(timeout) - early):
        print(line, file=sys.stderr, flush=True)
        os.kill(int(process), signal.SIGKILL)
"""
NOTE_AFTER = 5.0  # seconds
# Of gradients that are exchanged together, while those of earlier layers are computed.
BYTES_PER_PACK = 16 * 2**20


def join_cluster(cluster: Cluster, timeout: int) -> tf.distribute.Strategy:
    """Waits for the other workers, and returns the strategy over the GPUs, or CPUs, of all.

    Afterwards TensorFlow notices within about ten seconds if a worker has ended.

    Args:
      cluster: the workers.
      timeout: seconds to wait for the other workers, here and in each exchange. If they do not
        connect here in time, the process prints a line on standard error and is killed.

    Raises:
      WorkerLostError: the host of a worker is not known, the port of this worker is in use, or
        TensorFlow cannot connect to the others.
    """
    check_port(cluster)
    wait_for_names(cluster, timeout)
    own = cluster.workers[cluster.index]
    others = ", ".join(address for address in cluster.workers if address != own)
    advice = "start every worker, and check these addresses"
    line = (
        f"{program_name()}: this is {cluster}, and not all of {others} connected within "
        f"{timeout} s; {advice}, or give a longer --worker_timeout"
    )
    # gRPC would connect to the other hosts through the environment's proxy, and wait forever.
    hosts = [address.rpartition(":")[0] for address in cluster.workers]
    os.environ.setdefault("no_grpc_proxy", ",".join([*hosts, os.environ.get("no_proxy", "")]))
    # TensorFlow waits in C++ and holds Python's global lock, so that no thread or signal handler
    # runs here. The watcher ends when this process closes its input or dies, and does not receive
    # Ctrl-C.
    note = f"note: this is {cluster}; waiting for {others}, at most {timeout} s"
    watcher = [sys.executable, "-c", WATCHER, str(os.getpid()), str(NOTE_AFTER), note]
    watcher += [str(timeout), line]
    with by_the_system(), subprocess.Popen(watcher, stdin=subprocess.PIPE, start_new_session=True):
        try:
            options = tf.distribute.experimental.CommunicationOptions(
                bytes_per_pack=BYTES_PER_PACK, timeout_seconds=timeout
            )
            return tf.distribute.MultiWorkerMirroredStrategy(_resolver(cluster), options)
        except (tf.errors.OpError, RuntimeError) as error:
            raise WorkerLostError(
                f"this is {cluster}, which cannot connect to {others}: {_reason(error)}; {advice}"
            ) from error


def _resolver(cluster: Cluster) -> tf.distribute.cluster_resolver.ClusterResolver:
    # By default, TensorFlow would read TF_CONFIG, and each worker would train alone without it.
    return tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": cluster.workers}),
        task_type="worker",
        task_id=cluster.index,
        num_accelerators={"GPU": len(tf.config.get_visible_devices("GPU"))},
        rpc_layer="grpc",
    )


class Team:
    """This process and the other workers.

    Args:
      strategy: over the devices of all workers.
      cluster: the workers; None if this process trains alone.
    """

    def __init__(self, strategy: tf.distribute.Strategy, cluster: Cluster | None = None) -> None:
        self.strategy = strategy
        self.cluster = cluster

    @property
    def leads(self) -> bool:
        """Whether this process keeps the run's records."""
        return self.cluster is None or self.cluster.is_chief

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Raises a `WorkerLostError` for the errors that mean that another worker has ended."""
        try:
            yield
        except LOST as error:
            if self.cluster is None:
                raise
            raise WorkerLostError(
                f"this is {self.cluster}; another worker ended or does not answer "
                f"({_reason(error)}); start all workers again with the same flags to resume from "
                "the last checkpoint"
            ) from error

    @contextlib.contextmanager
    def chief_first(self) -> Iterator[None]:
        """Runs the block in the chief first, and then in the other workers."""
        if not self.leads:
            self.from_chief(None)
        yield
        if self.leads:
            self.from_chief(None)

    def from_chief(self, value: Any) -> Any:
        """Returns the chief's value in all workers; all must call this. JSON must represent it."""
        if self.cluster is None:
            return value
        text = json.dumps(value).encode() if self.leads else b""
        (size,) = self._broadcast([tf.constant([len(text)], tf.float64)])
        text = text or bytes(int(size[0]))
        (received,) = self._broadcast([tf.constant(list(text), tf.float64)])
        return json.loads(bytes(int(byte) for byte in received.numpy()))

    def add_up(self, values: Sequence[float]) -> list[float]:
        """Returns the sum of each value over the devices of all workers; all must call this."""
        return [float(value) for value in self._add_up(tf.constant(values, tf.float32))]

    @functools.cached_property
    def _add_up(self) -> tf.types.experimental.GenericFunction:
        @tf.function(autograph=False)
        def add_up(values: tf.Tensor) -> tf.Tensor:
            def on_replica() -> tf.Tensor:
                context = tf.distribute.get_replica_context()
                own = tf.identity(values)  # on this device
                return context.all_reduce(tf.distribute.ReduceOp.SUM, own)

            return self.strategy.experimental_local_results(self.strategy.run(on_replica))[0]

        return add_up

    def copy_from_chief(self, variables: Sequence[tf.Variable]) -> None:
        """Assigns the chief's values to the variables of all workers; all must call this."""
        if self.cluster is None:
            return
        # A float64 holds every dtype used here exactly, and every collective supports it.
        values = [tf.cast(tf.convert_to_tensor(variable), tf.float64) for variable in variables]
        for variable, value in zip(variables, self._broadcast(values), strict=True):
            variable.assign(tf.cast(value, variable.dtype))

    def _broadcast(self, values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns the values of the chief's first device, as the sum with zeros of all others."""

        @tf.function(autograph=False)
        def exchange(values: list[tf.Tensor]) -> list[tf.Tensor]:
            def on_replica() -> list[tf.Tensor]:
                context = tf.distribute.get_replica_context()
                is_first = tf.equal(context.replica_id_in_sync_group, 0)
                sent = [tf.where(is_first, value, tf.zeros_like(value)) for value in values]
                return list(context.all_reduce(tf.distribute.ReduceOp.SUM, sent))

            received = self.strategy.run(on_replica)
            return [self.strategy.experimental_local_results(value)[0] for value in received]

        return list(exchange(list(values)))


def _reason(error: Exception) -> str:
    text = error.message if isinstance(error, tf.errors.OpError) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    best = [line for line in lines if "abort" in line or "connect" in line or "task" in line]
    return (best or lines or [type(error).__name__])[0][:200]
