"""The processes that train together: one, or one a host; how they meet, and what they tell."""

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

from research.system.cluster import Cluster
from research.system.errors import UserError, program_name
from research.system.interruption import by_the_system

# What TensorFlow raises in one worker when another is gone.
LOST = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
    tf.errors.InternalError,
    tf.errors.UnavailableError,
)


class WorkerLostError(UserError):
    """Another worker of the run has ended or does not answer."""


def join_cluster(cluster: Cluster, timeout: int) -> tf.distribute.Strategy:
    """Waits for the other workers and returns the strategy over all of their GPUs, or CPUs.

    From then on TensorFlow notices within about ten seconds when one of them is gone.

    Args:
      cluster: the workers.
      timeout: seconds to wait for the others, here and in each exchange. Where they do not come,
        the process is killed, after a line on standard error.
    """
    own = cluster.workers[cluster.index]
    others = ", ".join(address for address in cluster.workers if address != own)
    advice = "start every worker, and check the addresses in TF_CONFIG"
    line = (
        f"{program_name()}: this is {cluster}, and not all of {others} came within "
        f"{timeout} s; {advice}, or give a longer --worker_timeout"
    )
    # gRPC would ask a proxy of the environment for the way to the next host, and wait for ever.
    hosts = [address.rpartition(":")[0] for address in cluster.workers]
    os.environ.setdefault("no_grpc_proxy", ",".join([*hosts, os.environ.get("no_proxy", "")]))
    with _killed_after(timeout, line):
        try:
            options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=timeout)
            return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
        except (tf.errors.OpError, RuntimeError) as error:
            raise UserError(
                f"this is {cluster}, which cannot meet {others}: {_reason(error)}; {advice}"
            ) from error


WATCHER = """
import os, select, signal, sys
if not select.select([sys.stdin], [], [], float(sys.argv[2]))[0]:
    print(sys.argv[3], file=sys.stderr, flush=True)
    os.kill(int(sys.argv[1]), signal.SIGKILL)
"""


@contextlib.contextmanager
def _killed_after(seconds: int, line: str) -> Iterator[None]:
    """Kills this process, after a line on standard error, if what is within takes longer.

    By a process of its own, which ends when this one closes its input or dies: TensorFlow waits in
    C++ while it holds Python's lock, so that no thread, exception or signal handler runs here.
    """
    command = [sys.executable, "-c", WATCHER, str(os.getpid()), str(seconds), line]
    # Its input is closed here, and its end awaited. Ctrl-C is this process's alone.
    with (
        by_the_system(),
        subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True),
    ):
        yield


class Team:
    """This process and the others that train with it.

    Args:
      strategy: over the devices of all of them.
      cluster: who they are; None where this process trains by itself.
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
        """Turns what TensorFlow raises when another worker is gone into a `WorkerLostError`."""
        try:
            yield
        except LOST as error:
            if self.cluster is None:
                raise
            raise WorkerLostError(
                f"this is {self.cluster}; another ended or does not answer ({_reason(error)}): "
                "start all of them again with the same flags to resume from the last checkpoint"
            ) from error

    @contextlib.contextmanager
    def chief_first(self) -> Iterator[None]:
        """Lets the other workers do something only after the chief has done it."""
        if not self.leads:
            self.chiefs_word(None)
        yield
        if self.leads:
            self.chiefs_word(None)

    def chiefs_word(self, value: Any) -> Any:
        """Returns the chief's value, which can be written as JSON, in all who call this."""
        if self.cluster is None:
            return value
        letters = json.dumps(value).encode() if self.leads else b""
        (size,) = self._from_chief([tf.constant([len(letters)], tf.float64)])
        letters = letters or bytes(int(size[0]))
        (heard,) = self._from_chief([tf.constant(list(letters), tf.float64)])
        return json.loads(bytes(int(letter) for letter in heard.numpy()))

    def add_up(self, values: Sequence[float]) -> list[float]:
        """Adds up what each device of all processes is given, value by value; all must call it."""
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
        """Gives everyone the chief's values, so that only the chief needs a checkpoint's files."""
        if self.cluster is None:
            return
        # Every format used here fits in a float64 exactly, and every kind of exchange knows that.
        values = [tf.cast(tf.convert_to_tensor(variable), tf.float64) for variable in variables]
        for variable, value in zip(variables, self._from_chief(values), strict=True):
            variable.assign(tf.cast(value, variable.dtype))

    def _from_chief(self, values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Adds up over the devices what the chief's first one has, and zeros of the others."""

        @tf.function(autograph=False)
        def exchange(values: list[tf.Tensor]) -> list[tf.Tensor]:
            def on_replica() -> list[tf.Tensor]:
                context = tf.distribute.get_replica_context()
                speaks = tf.equal(context.replica_id_in_sync_group, 0)
                spoken = [tf.where(speaks, value, tf.zeros_like(value)) for value in values]
                return list(context.all_reduce(tf.distribute.ReduceOp.SUM, spoken))

            heard = self.strategy.run(on_replica)
            return [self.strategy.experimental_local_results(value)[0] for value in heard]

        return list(exchange(list(values)))


def _reason(error: Exception) -> str:
    text = error.message if isinstance(error, tf.errors.OpError) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "abort" in line or "connect" in line or "task" in line]
    return (telling or lines or [type(error).__name__])[0][:200]
