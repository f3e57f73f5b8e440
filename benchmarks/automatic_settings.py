"""Seconds that the rules of `auto` take: run_train.py with `auto`, and with the values it chose.

python -m benchmarks.automatic_settings -- --image_folder=DIR --backbone=MobileNetV2 --weights=FILE

Whole processes are timed, in turns. The flags after `--` are those of run_train.py. Each run has an
empty folder for its cache.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import print_table, seconds_to_exit, write_result
from research.runs.run_directory import RunDirectory


def train(flags: Sequence[str], folder: Path) -> tuple[float, dict[str, str]]:
    """Trains in a process.

    Args:
      flags: of run_train.py.
      folder: empty folder for the run and its cache.

    Returns:
      The seconds, and the values that were chosen automatically, by setting.
    """
    places = (f"--ckpt_dir={folder / 'run'}", f"--cache_dir={folder / 'cache'}")
    seconds = seconds_to_exit("run_train.py", *flags, *places)
    directory = RunDirectory(folder / "run")
    chosen = {name: str(choice.value) for name, choice in directory.read_choices().items()}
    return seconds, chosen


def main() -> None:
    """Measures, prints and writes the seconds and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--name", default="automatic_settings", help="of the file of results (%(default)s)"
    )
    parser.add_argument("--turns", type=int, default=5, help="number of turns (%(default)s)")
    parser.add_argument("flags", nargs="+", help="of run_train.py, after --")
    arguments = parser.parse_args()
    rows = []
    for turn in range(arguments.turns):
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            automatic, chosen = train(arguments.flags, Path(first))
            given = [f"--{name}={value}" for name, value in chosen.items()]
            with_values, not_given = train([*arguments.flags, *given], Path(second))
        if not_given:
            raise RuntimeError(f"the second run also chose {', '.join(not_given)}")
        row = {"turn": turn, "auto": automatic, "values given": with_values}
        rows.append({**row, "ratio": automatic / with_values})
        print_table(rows[-1:])
    median = statistics.median(row["ratio"] for row in rows)
    print(f"median ratio {median:.3f}")
    flags = [re.sub(r"=.*/", "=", flag) for flag in arguments.flags]  # without folders
    write_result(arguments.name, {"flags": flags, "runs": rows, "ratio": median})


if __name__ == "__main__":
    main()
