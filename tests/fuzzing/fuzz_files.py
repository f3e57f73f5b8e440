"""Damages every kind of file that could come from someone else, and reads it.

python -m tests.fuzzing.fuzz_files --mutations=500     # about 2 minutes on two cores

These outcomes are allowed: the content is unchanged; it has other numbers, as in weights without a
checksum, where a flipped bit cannot be detected; the file is refused in one line; or it is not
used. A traceback, a crash, a hang or unbounded memory is a violation. A separate process reads the
files, so that a crash is counted and a new process reads the next file.
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

from benchmarks.harness import write_result
from tests.fuzzing.mutations import MUTATIONS, Mutate, reseal
from tests.fuzzing.valid_files import Reader

SECONDS_PER_FILE = 60.0
MAX_MEMORY = 2**31  # bytes
HARMLESS = ("unchanged", "other numbers", "refused", "not used")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A kind of file.

    Attributes:
      name: a short description.
      file: its path, or a pattern, below the folder of the valid files.
      reader: `weights`, `transformer`, `run` or `cache`; see `Reader.read`.
      mutations: functions that damage it, by name.
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
    Subject("safetensors", "transformer/small.safetensors", "transformer"),
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
    """Returns whether two results of `Reader.read` are equal, bit for bit."""
    return len(one) == len(other) and all(
        left.tobytes() == right.tobytes() if isinstance(left, np.ndarray) else left == right
        for left, right in zip(one, other, strict=True)
    )


def outcome_of(reader: Reader, kind: str, folder: Path, file: Path, valid: Any) -> str:
    """Reads a damaged file and returns the outcome: one of HARMLESS, or the violation."""
    from research.system.errors import UserError

    try:
        found = reader.read(kind, folder, file)
    except UserError as error:
        return "refused" if len(str(error).splitlines()) == 1 else f"lines: {error}"
    except Exception as error:
        return f"traceback: {error!r:.300}"
    if found is None:
        return "not used"
    return "unchanged" if equal(found, valid) else "other numbers"


def serve(connection: Connection, folder: Path) -> None:
    """Reads the files that a connection sends and returns the outcomes, until it sends None."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # TensorFlow logs each damaged checkpoint
    reader = Reader()
    valid = {kind: reader.read(kind, folder, folder / file) for kind, file in VALID_FILES.items()}
    with open("/proc/self/statm") as pages:
        taken = int(pages.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2 * MAX_MEMORY, resource.RLIM_INFINITY))
    connection.send("ready")
    while task := connection.recv():
        kind, damaged, file = task
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcome = outcome_of(reader, kind, damaged, file, valid[kind])
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        connection.send((outcome if grown < MAX_MEMORY else f"memory: {grown:,} bytes", grown))


VALID_FILES = {
    "weights": "weights/small.weights.h5",
    "transformer": "transformer/small.safetensors",
    "run": "run",
    "cache": "cache",
}


class Server:
    """A process that reads files and is replaced by a new one when it crashes or hangs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: Any = None

    def ask(self, kind: str, damaged: Path, file: Path) -> tuple[str, int]:
        """Returns the outcome for a file and the growth of the process's peak memory in bytes."""
        if self._process is None:
            self._start()
        self._connection.send((kind, damaged, file))
        try:
            if self._connection.poll(SECONDS_PER_FILE):
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
        """Kills the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def damaged_copies(
    subject: Subject, valid: Path, folder: Path, count: int, seed: int
) -> Iterator[tuple[str, Path]]:
    """Yields `count` times the name of a mutation and the path of a file damaged by it.

    The file is in a copy of its run or cache, which the next copy replaces.
    """
    (source,) = valid.glob(subject.file)
    top = source.relative_to(valid).parts[0]
    content = source.read_bytes()
    names = list(subject.mutations)
    for index in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(valid / top, folder / top)
        name = names[index % len(names)]
        target = folder / source.relative_to(valid)
        random = np.random.default_rng([seed, index, *subject.name.encode()])
        target.write_bytes(subject.mutations[name](content, random))
        yield name, target


def fuzz(
    subject: Subject, valid: Path, count: int, seed: int, read: Callable[..., tuple[str, int]]
) -> tuple[collections.Counter[str], list[str], int]:
    """Damages a file `count` times; returns outcomes, violations and the largest memory growth."""
    counts: collections.Counter[str] = collections.Counter()
    violations, most = [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "damaged"
        for index, (mutation, file) in enumerate(
            damaged_copies(subject, valid, folder, count, seed)
        ):
            outcome, grown = read(subject.reader, folder, file)
            counts[outcome.partition(":")[0]] += 1
            most = max(most, grown)
            if outcome not in HARMLESS:
                violations.append(f"{subject.name}, {mutation}, number {index}: {outcome}")
    return counts, violations, most


def main() -> None:
    """Damages files, counts and writes the outcomes; exit code 1 for a violation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=500, help="number of damaged files")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    each = -(-arguments.mutations // len(SUBJECTS))
    figures: dict[str, Any] = {}
    violations: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        valid = Path(name) / "valid"
        valid.mkdir()
        writing = multiprocessing.get_context("spawn").Process(target=write_all, args=(valid,))
        writing.start()
        writing.join()
        server = Server(valid)
        for subject in SUBJECTS:
            counts, wrong, most = fuzz(subject, valid, each, arguments.seed, server.ask)
            violations += wrong
            figures[subject.name] = {**dict(counts), "memory_grew_by_megabytes": most // 2**20}
            print(f"{subject.name:<24}{dict(counts)}, memory grew by {most:,} bytes", flush=True)
        server.stop()
    for violation in violations:
        print(violation, file=sys.stderr)
    total = each * len(SUBJECTS)
    print(f"{total} mutations, {len(violations)} violations")
    result = {"mutations": total, "violations": violations, "outcomes": figures}
    write_result("fuzz_files", result)
    sys.exit(bool(violations))


def write_all(folder: Path) -> None:
    """Writes the valid files; called in a separate process, which loads TensorFlow."""
    Reader().write(folder)


if __name__ == "__main__":
    main()
