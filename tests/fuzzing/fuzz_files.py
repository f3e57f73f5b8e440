"""Damages every kind of file that a stranger could hand over, and looks what becomes of it.

python -m tests.fuzzing.fuzz_files --mutations=500     # about 2 minutes on two cores

Each mutation is met in one of these ways: what is read is as it was; or other numbers, as in
weights without a checksum, where nothing tells a flipped bit from a trained one; or it is refused
in one line, or not used. Never a traceback, a crash, a hang, or memory without a bound. Files are
read in a process of its own, so that a crash is counted and the next file is read by another.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import write_result
from tests.fuzzing.mutations import MUTATIONS, Mutate, reseal
from tests.fuzzing.right_files import Reader

SECONDS_A_FILE = 60.0
MOST_MEMORY = 2**31
HARMLESS = ("as it was", "other numbers", "refused", "not used")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A kind of file.

    Attributes:
      name: what it is.
      file: its path below the folder of the right files.
      reader: what reads it: `weights`, `run` or `cache`.
      mutations: how it is damaged, by name.
    """

    name: str
    file: str
    reader: str
    mutations: dict[str, Mutate] = dataclasses.field(default_factory=lambda: dict(MUTATIONS))


SUBJECTS = (
    Subject("weights of Keras 3", "weights/small.weights.h5", "weights"),
    Subject("compressed weights", "weights/compressed.weights.h5", "weights"),
    Subject("archive of Keras 3", "weights/small.keras", "weights"),
    Subject("compressed archive", "weights/compressed.keras", "weights"),
    Subject("model of Keras 2", "weights/small.h5", "weights"),
    Subject("SavedModel", "weights/saved_model/saved_model.pb", "weights"),
    Subject("checkpoint's index", "run/checkpoints/latest/step-7.index", "run"),
    Subject("index, resealed", "run/checkpoints/latest/step-7.index", "run", {"reseal": reseal}),
    Subject("checkpoint's values", "run/checkpoints/latest/step-7.data-00000-of-00001", "run"),
    Subject("checkpoint's pointer", "run/checkpoints/latest/checkpoint", "run"),
    Subject("config.json", "run/config.json", "run"),
    Subject("labels.txt", "run/labels.txt", "run"),
    Subject("data.json", "run/data.json", "run"),
    Subject("metrics.jsonl", "run/metrics.jsonl", "run"),
    Subject("trunk cache's list", "cache/*/contents.json", "cache"),
    Subject("trunk cache's values", "cache/*/0.bin", "cache"),
)


def equal(one: Any, other: Any) -> bool:
    """Tells whether two readings are the same, bit for bit."""
    return len(one) == len(other) and all(
        left.tobytes() == right.tobytes() if isinstance(left, np.ndarray) else left == right
        for left, right in zip(one, other, strict=True)
    )


def outcome_of(reader: Reader, kind: str, folder: Path, file: Path, right: Any) -> str:
    """Reads a damaged file and says, in a few words, how it was met."""
    from research.system.errors import UserError

    try:
        found = reader.read(kind, folder, file)
    except UserError as error:
        return "refused" if len(str(error).splitlines()) == 1 else f"lines: {error}"
    except Exception as error:
        return f"traceback: {error!r:.300}"
    if found is None:
        return "not used"
    return "as it was" if equal(found, right) else "other numbers"


def serve(connection: Connection, folder: Path) -> None:
    """Reads the files that a connection names, until it names none."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # TensorFlow tells of each damaged checkpoint
    reader = Reader()
    right = {kind: reader.read(kind, folder, folder / file) for kind, file in RIGHT_FILES.items()}
    with open("/proc/self/statm") as pages:
        taken = int(pages.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2 * MOST_MEMORY, resource.RLIM_INFINITY))
    connection.send("ready")
    while task := connection.recv():
        kind, damaged, file = task
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        said = outcome_of(reader, kind, damaged, file, right[kind])
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        connection.send((said if grown < MOST_MEMORY else f"memory: {grown:,} bytes", grown))


RIGHT_FILES = {"weights": "weights/small.weights.h5", "run": "run", "cache": "cache"}


class Server:
    """A process that reads files, replaced by another when it dies or hangs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: Any = None

    def ask(self, kind: str, damaged: Path, file: Path) -> tuple[str, int]:
        """Returns how a file is met, and by how many bytes the process's peak memory grew."""
        if self._process is None:
            self._start()
        self._connection.send((kind, damaged, file))
        try:
            if self._connection.poll(SECONDS_A_FILE):
                return self._connection.recv()
            self.stop()
            return "hang", 0
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            self._process = None
            return f"crash: exit code {code}", 0

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self._folder), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.recv()

    def stop(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def damaged_copies(
    subject: Subject, right: Path, folder: Path, count: int, seed: int
) -> Iterator[tuple[str, Path]]:
    """Yields the name of a mutation and the path of a file damaged by it, so many times.

    The file lies in a copy of the run or cache that it is of, which the next one replaces.
    """
    (source,) = right.glob(subject.file)
    top = source.relative_to(right).parts[0]
    content = source.read_bytes()
    names = list(subject.mutations)
    for index in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(right / top, folder / top)
        name = names[index % len(names)]
        target = folder / source.relative_to(right)
        random = np.random.default_rng([seed, index, *subject.name.encode()])
        target.write_bytes(subject.mutations[name](content, random))
        yield name, target


def fuzz(
    subject: Subject, right: Path, count: int, seed: int, read: Callable[..., tuple[str, int]]
) -> tuple[collections.Counter[str], list[str], int]:
    """Damages a kind of file so many times; returns outcomes, violations and the most memory."""
    counts: collections.Counter[str] = collections.Counter()
    violations, most = [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "damaged"
        for index, (mutation, file) in enumerate(
            damaged_copies(subject, right, folder, count, seed)
        ):
            said, grown = read(subject.reader, folder, file)
            counts[said.partition(":")[0]] += 1
            most = max(most, grown)
            if said not in HARMLESS:
                violations.append(f"{subject.name}, {mutation}, number {index}: {said}")
    return counts, violations, most


def main() -> None:
    """Damages, counts and writes the figures; ends with 1 where a file was not met as it must."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    each = -(-arguments.mutations // len(SUBJECTS))
    figures: dict[str, Any] = {}
    violations: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        right = Path(name) / "right"
        right.mkdir()
        writing = multiprocessing.get_context("spawn").Process(target=write_all, args=(right,))
        writing.start()
        writing.join()
        server = Server(right)
        for subject in SUBJECTS:
            counts, wrong, most = fuzz(subject, right, each, arguments.seed, server.ask)
            violations += wrong
            figures[subject.name] = {**dict(counts), "memory_grew_by_megabytes": most // 2**20}
            print(f"{subject.name:<24}{dict(counts)}, memory grew by {most:,} bytes", flush=True)
        server.stop()
    for violation in violations:
        print(violation, file=sys.stderr)
    total = each * len(SUBJECTS)
    print(f"{total} mutations, {len(violations)} violations")
    result = {"mutations": total, "violations": violations, "outcomes": figures}
    print(f"written to {write_result('fuzz_files', result)}")
    sys.exit(bool(violations))


def write_all(folder: Path) -> None:
    """Writes a right file of each kind, in a process of its own, as TensorFlow stays loaded."""
    Reader().write(folder)


if __name__ == "__main__":
    main()
