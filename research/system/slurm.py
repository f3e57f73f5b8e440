"""The tasks of a Slurm job step, from the variables that `srun` sets. Does not import TensorFlow.

TensorFlow's `SlurmClusterResolver` reads the same variables, but sorts the hosts by name (host10
before host9, where Slurm counts host9 first), and needs GPUs.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping

# Below the ports that Linux gives to outgoing connections.
FIRST_PORT = 15000
PORTS_OF_A_STEP = 16
STEPS = 1000  # with ports of their own


@dataclasses.dataclass(frozen=True)
class SlurmStep:
    """The tasks of a job step, and this process's place among them.

    Attributes:
      addresses: of the tasks in the order of their ranks, host:port.
      rank: of this process.
      tasks_here: number of tasks on this host.
    """

    addresses: tuple[str, ...]
    rank: int
    tasks_here: int


def number_of_tasks(environment: Mapping[str, str]) -> int:
    """Returns the number of tasks that `srun` started together with this process; 0 without `srun`.

    The shell of `salloc` and the script of `sbatch` have `SLURM_NTASKS`, but are not tasks of a
    step, or are the only one.
    """
    number = environment.get("SLURM_STEP_NUM_TASKS", "")
    return int(number) if number.isdecimal() else 0


def read_step(environment: Mapping[str, str]) -> SlurmStep:
    """Returns the job step of this process.

    The ports follow from the numbers of the job and the step, so that jobs on the same host use
    different ports, and a requeued job uses the same ports.

    Args:
      environment: the environment variables of a task that `srun` started.

    Raises:
      KeyError: a variable is missing.
      ValueError: a variable has an unknown form, or ranks are not distributed in blocks.
    """
    hosts = expand_hosts(environment["SLURM_STEP_NODELIST"])
    counts = _expand_counts(environment["SLURM_STEP_TASKS_PER_NODE"])
    rank, tasks = int(environment["SLURM_PROCID"]), number_of_tasks(environment)
    if len(hosts) != len(counts) or sum(counts) != tasks or not 0 <= rank < tasks:
        raise ValueError(f"rank {rank} of {tasks} tasks on {len(hosts)} hosts: {counts}")
    places = [(host, local) for host, count in enumerate(counts) for local in range(count)]
    own = int(environment["SLURM_NODEID"]), int(environment["SLURM_LOCALID"])
    if places[rank] != own:
        raise ValueError("the tasks are not in blocks; give srun --distribution=block")
    if max(counts) > PORTS_OF_A_STEP:
        raise ValueError(f"a host has {max(counts)} tasks; expected at most {PORTS_OF_A_STEP}")
    # Steps of one job, and jobs with successive numbers, may run at the same time.
    number = 31 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    port = FIRST_PORT + PORTS_OF_A_STEP * (number % STEPS)
    addresses = tuple(f"{hosts[host]}:{port + local}" for host, local in places)
    return SlurmStep(addresses, rank, counts[own[0]])


def expand_hosts(hosts: str) -> list[str]:
    """Returns the names in a host list of Slurm, in its order: `a[08-10],b` is a08, a09, a10, b.

    Raises:
      ValueError: the list has another form.
    """
    part = r"(?:[\w.-]|\[[\d,-]+\])+"
    if not re.fullmatch(f"{part}(?:,{part})*", hosts):
        raise ValueError(f"the host list {hosts!r} has an unknown form")
    names = []
    for name in re.findall(part, hosts):
        pieces = [_alternatives(piece) for piece in re.split(r"(\[.*?\])", name)]
        names += ["".join(chosen) for chosen in itertools.product(*pieces)]
    return names


def _alternatives(piece: str) -> list[str]:
    if not piece.startswith("["):
        return [piece]
    numbers = []
    for item in piece[1:-1].split(","):
        first, _, last = item.partition("-")
        numbers += [
            str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)
        ]
    return numbers


def _expand_counts(counts: str) -> list[int]:
    """Returns the number of tasks of each host: `2(x3),1` is 2, 2, 2, 1."""
    expanded = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"the numbers of tasks {counts!r} have an unknown form")
        expanded += [int(match[1])] * int(match[2] or 1)
    return expanded
