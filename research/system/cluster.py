"""The workers of a multi-worker run, from `TF_CONFIG` or Slurm. Does not import TensorFlow."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
import time
from typing import Any

from research.system import slurm
from research.system.errors import UserError, WorkerLostError

EXAMPLE = (
    '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}'
)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of a run, and this process's place among them.

    Attributes:
      workers: addresses, host:port; the first is the chief, which keeps the run's records.
      index: of this process in `workers`.
    """

    workers: tuple[str, ...]
    index: int

    @property
    def is_chief(self) -> bool:
        """Whether this process keeps the run's records."""
        return self.index == 0

    def __str__(self) -> str:
        role = "the chief" if self.is_chief else "worker 0 keeps the records"
        return f"worker {self.index} of {len(self.workers)}, {role}"


def find_cluster(distribution: str) -> Cluster | None:
    """Returns the workers named in `TF_CONFIG` or by Slurm; None to train without other workers.

    `TF_CONFIG` overrules Slurm. A cluster of one worker is no cluster: a note on standard error
    says that it is not used.

    Args:
      distribution: the setting; `auto` uses what is set.

    Raises:
      UserError: workers are required and not named, or `TF_CONFIG` or a variable of Slurm is
        invalid.
    """
    if distribution not in ("auto", "multi_worker"):
        return None
    if text := os.environ.get("TF_CONFIG", ""):
        return _from_tf_config(text)
    if slurm.number_of_tasks(os.environ) > 1:
        return _from_slurm()
    if distribution == "multi_worker":
        raise UserError(
            "distribution is 'multi_worker', and the environment variable TF_CONFIG is not set; "
            f"expected for example {EXAMPLE}, or several tasks that are started by Slurm's srun"
        )
    if os.environ.get("SLURM_NTASKS", "1") != "1":
        _note(
            f"the Slurm job has {os.environ['SLURM_NTASKS']} tasks, but srun did not start this "
            "process in them; training without others"
        )
    return None


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def _from_slurm() -> Cluster:
    try:
        step = slurm.read_step(os.environ)
    except (ValueError, KeyError) as error:
        reason = f"{error.args[0]} is not set" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"the variables of Slurm do not name the workers ({reason}); set TF_CONFIG, or give "
            "--distribution=none"
        ) from error
    if step.tasks_here > 1:
        _note(
            f"Slurm started {step.tasks_here} tasks on this host; give each its own GPUs with srun "
            "--gpus-per-task, or start one task per host, which uses all its GPUs"
        )
    return Cluster(step.addresses, step.rank)


def _from_tf_config(text: str) -> Cluster | None:
    try:
        cluster = _parse(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"has no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"TF_CONFIG is {text[:200]!r}, which does not name the workers ({reason}); expected "
            f"for example {EXAMPLE}, or give --distribution=none"
        ) from error
    if len(cluster.workers) > 1:
        return cluster
    _note("TF_CONFIG names one worker; training without others")
    return None


def wait_for_names(cluster: Cluster, timeout: float) -> None:
    """Waits until the host name of each worker has an address.

    A note on standard error names the first one that has none.

    Args:
      cluster: the workers.
      timeout: in seconds.

    Raises:
      WorkerLostError: a name still has no address.
    """
    deadline, is_told = time.monotonic() + timeout, False
    for address in cluster.workers:
        while problem := _lookup_problem(address):
            reason = f"this is {cluster}; the host of {address} is not known ({problem})"
            if time.monotonic() >= deadline:
                raise WorkerLostError(f"{reason}; correct TF_CONFIG, or give --distribution=none")
            if not is_told:
                _note(f"{reason}; waiting for it")
                is_told = True
            time.sleep(min(1.0, timeout))


def check_port(cluster: Cluster) -> None:
    """Raises `WorkerLostError` if another process holds the port of this worker."""
    port = int(cluster.workers[cluster.index].rpartition(":")[2])
    try:
        with socket.socket() as listener:
            # As gRPC does: connections of an earlier worker that are closing do not matter.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", port))
    except OSError as error:
        raise WorkerLostError(
            f"this is {cluster}; its port {port} cannot be used ({error.strerror}); end the "
            "process that uses it, such as an earlier worker, or name another port in TF_CONFIG"
        ) from error


def _lookup_problem(address: str) -> str | None:
    host, _, port = address.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        return str(error.strerror)
    return None


def _parse(value: dict[str, Any]) -> Cluster:
    jobs, task = value["cluster"], value["task"]
    unknown = sorted(set(jobs) - {"chief", "worker"})
    if unknown:
        raise ValueError(f"tasks of type {unknown[0]!r} are not supported")
    chiefs, workers = list(jobs.get("chief", [])), list(jobs.get("worker", []))
    addresses = chiefs + workers
    if len(chiefs) > 1 or not addresses or len(set(addresses)) < len(addresses):
        raise ValueError("addresses are missing or given twice")
    for address in addresses:
        host, _, port = str(address).rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"{address!r} is not host:port")
    kind, index = task["type"], int(task["index"])
    own = {"chief": chiefs, "worker": workers}.get(kind, [])
    if not 0 <= index < len(own):
        raise ValueError(f"there is no task {index} of type {kind!r}")
    return Cluster(tuple(addresses), index + (len(chiefs) if kind == "worker" else 0))
