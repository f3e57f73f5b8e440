"""What a run and its evaluation cost as the number of photos and of classes grows.

python -m benchmarks.growth            # about an hour on two cores, and 5 GB of disk space
python -m benchmarks.growth --cells 2000x2 20000x1000 -- --trunk_cache=memory
python -m benchmarks.growth --report   # only the table in docs/scaling.md

A cell is a number of photos and a number of classes, such as 20000x100. Each cell is trained for
100 steps and evaluated, in one process each. A cell whose result is on file is not repeated;
results with other flags after `--` are other rows. These flags are for run_train.py, and also for
run_eval.py if it has them.

The photos are JPEG files of 64 x 64 pixels and 2 KB, and no two are equal. Eight of ten are for
training, and one each for validation and test.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.harness import (
    ARTICLE,
    ROOT,
    anonymous_bytes,
    read_rows,
    write_class_folders,
    write_report,
    write_result,
)
from research.runs.tracker import Tracker
from research.settings.program_configs import EvalConfig
from research.system.program import ended_by_a_line

NAME = "growth"
CELLS = (
    *("2000x2", "20000x2", "200000x2", "1000000x2"),
    *("20000x100", "20000x1000", "20000x10000"),
)
SPLITS = {"train": 8, "validation": 1, "test": 1}  # with their shares in ten photos
DRAWINGS, SIDE = 256, 64
STEPS, BATCH_SIZE = 100, 32
TRAINING = (
    *ARTICLE,
    "--backbone=SmallResNet",
    "--unfreeze_from=0",
    "--trunk_cache=off",
    "--image_size=32",
    f"--batch_size={BATCH_SIZE}",
    "--epochs=1",
    f"--steps_per_epoch={STEPS}",
)
CLOCK = "clock.jsonl"
KINDS = ("seconds", "processor_seconds")  # of the wall clock, and over all cores
ANONYMOUS = "peak_anonymous_bytes"
LONGEST_SECONDS = 3600.0


class Cell(NamedTuple):
    """A number of photos and a number of classes."""

    photos: int
    classes: int


class Clock(Tracker):
    """Writes the time of every tenth step into the run's folder."""

    def begin(self, settings: Mapping[str, Any], folder: str) -> None:
        self._file = Path(folder) / CLOCK

    def interval(self, step: int, figures: Mapping[str, float]) -> None:
        row = {"step": step, "seconds": time.time(), "processor_seconds": time.process_time()}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def write_photos(folder: Path, cell: Cell) -> None:
    """Writes the photos of a cell, which are a few drawings; see `write_class_folders`."""
    generator = np.random.default_rng(0)
    drawings = []
    for _ in range(DRAWINGS):
        noise = Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8))
        buffer = io.BytesIO()
        noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        drawings.append(buffer.getvalue())
    counts = {split: cell.photos * share // 10 for split, share in SPLITS.items()}
    write_class_folders(folder, drawings, counts, cell.classes)


def run_alone(script: str, flags: Sequence[str]) -> dict[str, float]:
    """Runs a script of the project.

    Returns:
      seconds: of the wall clock.
      processor_seconds: over all cores. Other load on the machine changes them little.
      peak_bytes: of the resident memory, with pages of files.
      peak_anonymous_bytes: without pages of files, which the system can reclaim at any time.

    Raises:
      RuntimeError: the script failed, or takes more than an hour.
    """
    command = [sys.executable, script, *flags]
    with tempfile.TemporaryFile("w+") as errors:
        begin, anonymous = time.perf_counter(), 0
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)
        while True:
            anonymous = max(anonymous, anonymous_bytes(process.pid))
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            seconds = time.perf_counter() - begin
            if pid:
                break
            if seconds > LONGEST_SECONDS:
                process.kill()
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(
                f"{command} ended with {process.returncode}: {errors.read()[-2000:]}"
            )
    return {
        "seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": 1024 * usage.ru_maxrss,
        ANONYMOUS: anonymous,
    }


def measure(cell: Cell, flags: Sequence[str]) -> dict[str, Any]:
    """Trains and evaluates a cell.

    Returns:
      photos, classes, flags: as given.
      first_step: seconds from the start of the process to the end of the first training step.
      second_start: the same of another run of the same photos, which finds what the first one kept.
      step: seconds per step, the medians over intervals of ten steps, without the first.
      train: seconds and memory of the training, with the validation after its last step.
      evaluate: seconds and memory of the evaluation of the test photos.
    """
    with tempfile.TemporaryDirectory() as name:
        photos, run = Path(name) / "photos", Path(name) / "run"
        write_photos(photos, cell)
        training = [*TRAINING, f"--image_folder={photos}", f"--cache_dir={Path(name) / 'cache'}"]
        training += [f"--tracker={Path(__file__)}:{Clock.__name__}", *flags]
        begin = time.time()
        train = run_alone("run_train.py", [*training, f"--ckpt_dir={run}"])
        known = {field.name for field in dataclasses.fields(EvalConfig)}
        shared = [flag for flag in flags if flag.lstrip("-").partition("=")[0] in known]
        evaluate = run_alone("run_eval.py", [f"--ckpt_dir={run}", *shared])
        other, begin_again = Path(name) / "other", time.time()
        run_alone("run_train.py", [*training, "--steps_per_epoch=10", f"--ckpt_dir={other}"])
        rows, rows_again = (
            list(map(json.loads, (one / CLOCK).read_text(encoding="utf-8").splitlines()))
            for one in (run, other)
        )
    step = {
        kind: statistics.median(
            (row[kind] - before[kind]) / (row["step"] - before["step"])
            for before, row in itertools.pairwise(rows)
        )
        for kind in KINDS
    }

    def first_step(begin: float, row: Mapping[str, float]) -> dict[str, float]:
        starts = {"seconds": begin, "processor_seconds": 0.0}
        return {kind: row[kind] - starts[kind] - (row["step"] - 1) * step[kind] for kind in KINDS}

    return {
        **cell._asdict(),
        "flags": list(flags),
        "first_step": first_step(begin, rows[0]),
        "second_start": first_step(begin_again, rows_again[0]),
        "step": step,
        "train": train,
        "evaluate": evaluate,
    }


def parse_cell(text: str) -> Cell:
    """Returns the cell that a text such as 20000x100 names."""
    photos, _, classes = text.partition("x")
    if not photos.isdecimal() or not classes.isdecimal() or not 2 <= int(classes) <= int(photos):
        raise argparse.ArgumentTypeError(
            f"a cell is {text!r}; expected PHOTOSxCLASSES with at least two classes and as many "
            "photos, such as 20000x100"
        )
    return Cell(int(photos), int(classes))


def measure_all(cells: Sequence[Cell], flags: Sequence[str]) -> None:
    """Measures the cells that have no result on file.

    Raises:
      UserError: the results on file are of another machine.
    """
    rows = read_rows(NAME)
    done = {(row["photos"], row["classes"], *row["flags"]) for row in rows}
    for cell in cells:
        if (*cell, *flags) in done:
            continue
        row = measure(cell, flags)
        print(row_text(row), flush=True)
        rows = sorted([*rows, row], key=lambda one: (one["flags"], one["classes"], one["photos"]))
        write_result(NAME, {"rows": rows})


def row_text(row: Mapping[str, Any]) -> str:
    """Returns a result as a row of the Markdown table."""
    cells = [f"{row['photos']:,}", f"{row['classes']:,}"]
    cells += [" ".join(f"`{flag}`" for flag in row["flags"]) or "-"]
    units = {"first_step": "s", "second_start": "s", "step": "ms", "evaluate": "s"}
    for part, unit in units.items():
        if part not in row:  # rows of an earlier version of this program
            cells.append("-")
            continue
        seconds, processor = (row[part][kind] * (1e3 if unit == "ms" else 1) for kind in KINDS)
        cells.append(f"{seconds:.3g} {unit} ({processor:.3g})")
    for part in ("train", "evaluate"):
        memory, anonymous = (row[part][kind] / 1e9 for kind in ("peak_bytes", ANONYMOUS))
        cells.append(f"{memory:.2f} GB ({anonymous:.2f})")
    return f"| {' | '.join(cells)} |"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the results as a Markdown table.

    In brackets are processor seconds, and the memory without pages of files.
    """
    columns = (
        *("photos", "classes", "flags", "first step after", "second run", "step", "evaluation"),
        *("memory of training", "memory of evaluation"),
    )
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    return "\n".join([*lines, *map(row_text, rows)])


def main() -> None:
    """Measures the missing cells, prints the table and writes it into the document."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--cells", nargs="+", metavar="PHOTOSxCLASSES", help="default: all")
    parser.add_argument("--report", action="store_true", help="only write the table")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "scaling.md")
    parser.add_argument("flags", nargs="*", help="after --: flags of run_train.py")
    arguments = parser.parse_args()
    try:
        cells = list(map(parse_cell, arguments.cells or CELLS))
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    with ended_by_a_line():
        if not arguments.report:
            measure_all(cells, arguments.flags)
        text = table(read_rows(NAME))
        write_report(NAME, text, arguments.document)
        print(text)


if __name__ == "__main__":
    main()
