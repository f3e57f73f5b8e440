"""Arguments, timing, tables and result files, shared by all benchmarks."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from research.system.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
REPORT_END = "<!-- end -->"
# Flags of run_train.py: the article's settings, with BatchNorm frozen and random weights.
ARTICLE = (
    f"--flagfile={ROOT / 'recipes' / 'article.flags'}",
    "--bn_mode=frozen",
    "--weights=none",
)


def data_parser(docstring: str, dataset: str = "sketches") -> argparse.ArgumentParser:
    """Returns a parser with the flags that select the photos.

    Args:
      docstring: of the benchmark; its first line is the description.
      dataset: the default data set. `sketches` is built in and needs no download.
    """
    parser = argparse.ArgumentParser(description=docstring.splitlines()[0])
    parser.add_argument("--dataset", default=dataset, help="TFDS data set (%(default)s)")
    parser.add_argument("--data_dir", help="folder of prepared TFDS data sets")
    return parser


def data_flags(arguments: argparse.Namespace) -> list[str]:
    """Returns the flags that pass the data set, and the weights if any, on to a subprocess."""
    flags = [f"--dataset={arguments.dataset}"]
    for name in ("data_dir", "weights"):
        if path := getattr(arguments, name, None):
            flags.append(f"--{name}={Path(path).absolute()}")
    return flags


def seconds_of(action: Callable[[], object]) -> float:
    """Returns the seconds that a call takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def seconds_to_exit(*arguments: str, code: int = 0) -> float:
    """Returns the seconds until Python with these arguments ends; it must end with this code."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True
    )
    seconds = time.perf_counter() - begin
    if done.returncode != code:
        raise RuntimeError(f"{arguments} ended with {done.returncode}: {done.stderr!r}")
    return seconds


def worker_environments(count: int) -> list[dict[str, str]]:
    """Returns the environment of each worker of one run, on free ports of this machine.

    A single worker has no `TF_CONFIG`.
    """
    if count == 1:
        return [dict(os.environ)]
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    cluster = {"worker": [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]}
    for one in sockets:
        one.close()
    tasks = [{"cluster": cluster, "task": {"type": "worker", "index": i}} for i in range(count)]
    return [{**os.environ, "TF_CONFIG": json.dumps(task)} for task in tasks]


def write_class_folders(
    folder: Path, encoded: Sequence[bytes], counts: Mapping[str, int], classes: int
) -> None:
    """Writes JPEG files, with a folder for each split and in it one for each class.

    If a split has fewer photos than there are classes, it has photos of the first classes only.

    Args:
      folder: where to write.
      encoded: contents, which are repeated. Bytes after the end of the image make each file
        different.
      counts: number of photos of each split.
      classes: number of classes. The class of a photo is arbitrary.
    """
    number = itertools.count()
    for split, photos in counts.items():
        folders = [folder / split / f"class{k:05}" for k in range(min(classes, photos))]
        for one in folders:
            one.mkdir(parents=True)
        for index in range(photos):
            name = f"{next(number):07}"
            content = encoded[index % len(encoded)] + name.encode()
            (folders[index % len(folders)] / f"{name}.jpg").write_bytes(content)


def anonymous_bytes(pid: int) -> int:
    """Returns the anonymous memory of a process in bytes, 0 if the process has ended (Linux).

    Pages of mapped files are excluded: the system can reclaim them at any time.
    """
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    kilobytes = (line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))
    return 1024 * int(next(kilobytes, 0))


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows below the names of their columns, numbers with four significant digits."""
    texts = [list(rows[0])]
    for row in rows:
        texts.append([f"{x:,.4g}" if isinstance(x, float) else str(x) for x in row.values()])
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for text in texts:
        cells = (f"{cell:>{width}}" for cell, width in zip(text, widths, strict=True))
        print("  ".join(cells), flush=True)


def write_result(name: str, figures: dict[str, Any]) -> None:
    """Writes figures to results/NAME.json, with processor, versions and date; prints the path."""
    date = datetime.date.today().isoformat()
    result = {"benchmark": name, "date": date, **describe_machine(), **figures}
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {file}")


def read_rows(name: str) -> list[dict[str, Any]]:
    """Returns the `rows` of results/NAME.json; none if there is no such file.

    Raises:
      UserError: they are of another processor, or of other versions.
    """
    file = RESULTS / f"{name}.json"
    if not file.exists():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    now = describe_machine()
    for key in ("processor", "versions"):
        if found[key] != now[key]:
            raise UserError(
                f"the {key} of {str(file)!r}: {found[key]}; here: {now[key]}; remove the file to "
                "measure everything here"
            )
    return found["rows"]


def describe_machine() -> dict[str, Any]:
    """Returns the processor, the number of its cores, and the versions of what measures."""
    packages = ("tensorflow", "keras", "numpy")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }


def write_report(program: str, text: str, file: Path) -> None:
    """Replaces the part of a document between the marks of a benchmark's report."""
    document, opening = file.read_text(encoding="utf-8"), report_mark(program)
    before, begin, rest = document.partition(opening)
    _, end, after = rest.partition(REPORT_END)
    if not begin or not end:
        sys.exit(f"{file} has no lines {opening!r} and {REPORT_END!r}; add them")
    file.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def report_mark(program: str) -> str:
    """Returns the line before the report of a benchmark in a document."""
    return f"<!-- begin of the report of benchmarks.{program} -->"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not on Linux
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
