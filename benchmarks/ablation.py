"""The effect of each setting of a recipe: cross-validation, with one setting changed per row.

python -m benchmarks.ablation --weights=FILE --data_dir=DIR     # takes hours; can be resumed

All photos of a data set are divided into folds, in a new way for each seed. Each row of `ROWS` is
trained on all folds but one, with a tenth of them for validation, and evaluated on the fold left
out, with the functions behind `run_train.py` and `run_eval.py`, in a process of its own. Rows,
seeds and folds take turns, so that the rows can be compared whenever the program is stopped. The
figures of each run are appended to `benchmarks/results/ablation.jsonl`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablation_report import plot, summarize, table
from benchmarks.ablation_rows import (
    DATA_FLAGS,
    EVALUATIONS,
    REMOVED,
    ROWS,
    evaluations_of,
    key_of,
    settings_of,
)
from benchmarks.harness import RESULTS, ROOT, data_flags, data_parser
from flags.command_line import parse_config
from research.settings.program_configs import EvalConfig
from research.settings.train_config import TrainConfig
from research.system.environment import import_tensorflow

BACKBONE = "MobileNetV2"


@dataclasses.dataclass(frozen=True)
class Fold:
    """A fold of the photos to evaluate on; training uses the others.

    Attributes:
      seed: of the run, and of the division into folds.
      index: of the fold to evaluate on.
      folds: the number of folds.
    """

    seed: int
    index: int
    folds: int

    def split_of(self, name: str) -> str:
        """Returns `test`, `validation` or `train` for a photo's name."""
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        place = int.from_bytes(digest[:4], "big")
        if place % self.folds == self.index:
            return "test"
        return "validation" if place // self.folds % 10 == 0 else "train"


def run_fold(flags: list[str], fold: Fold, evaluations: Sequence[str]) -> dict[str, float]:
    """Trains once in this process, runs the named evaluations and returns the figures."""
    config = parse_config(TrainConfig, flags)
    import_tensorflow()
    from research.data.source import Example, Source
    from research.evaluation.evaluate import evaluate
    from research.loop.open_photos import photos_of_run
    from research.train import train

    class FoldSource(Source):
        """The same photos in the splits of the fold."""

        def __init__(self, source: Source) -> None:
            self.class_names = source.class_names
            self._photos: dict[str, list[Example]] = {}
            for split in ("train", "validation", "test"):
                for photo in source.examples(split):
                    self._photos.setdefault(fold.split_of(photo.name), []).append(photo)

        def count(self, split: str) -> int:
            return len(self._photos[split])

        def examples(self, split: str) -> Iterator[Example]:
            yield from self._photos[split]

    source = FoldSource(photos_of_run(config))
    begin, begin_on_cores = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, ckpt_dir=f"{folder}/run", seed=fold.seed)
        train(config, source)
        figures = {
            "seconds": time.perf_counter() - begin,
            "core_seconds": time.process_time() - begin_on_cores,
        }
        for name in evaluations:
            settings = {"resamples": 0, "pictures": False, **EVALUATIONS[name]}
            eval_config = EvalConfig(ckpt_dir=(str(config.ckpt_dir),), **settings)
            (evaluation,) = evaluate(eval_config, source)
            figures[key_of(name, "accuracy")] = evaluation.figures["accuracy"].value
            figures[key_of(name, "log_loss")] = evaluation.loss
    return figures


def run_rows(arguments: argparse.Namespace) -> None:
    """Makes the runs that the file does not have, each in its own process on its own cores."""
    done = {(run["row"], run["seed"], run["fold"]) for run in current_runs(arguments)}
    missing = [
        (row, fold)
        for turn in range(arguments.folds)
        for seed in range(arguments.seeds)
        for fold in [Fold(seed, (seed + turn) % arguments.folds, arguments.folds)]
        for row in arguments.rows or ROWS
        if (row, fold.seed, fold.index) not in done
    ]
    first = [*data_flags(arguments), f"--backbone={BACKBONE}"]
    last = DATA_FLAGS.get(arguments.dataset, ())  # after the rows, whose recipes differ from them
    all_cores = sorted(os.sched_getaffinity(0))
    free: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for job in range(arguments.jobs):
        free.put(all_cores[job :: arguments.jobs])

    def run(row: str, fold: Fold) -> dict[str, Any]:
        cores = free.get()
        settings = {"evaluations": evaluations_of(row), "cores": cores}
        settings["fold"] = dataclasses.asdict(fold)
        command = [sys.executable, "-m", "benchmarks.ablation", "--run", json.dumps(settings), "--"]
        command += [*first, *ROWS[row], *last]
        process = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        free.put(cores)
        if process.returncode:
            raise RuntimeError(f"row {row!r} failed: {process.stdout[-2000:]}")
        figures = json.loads(process.stdout.splitlines()[-1])
        place = {"seed": fold.seed, "fold": fold.index, "folds": fold.folds}
        return {"row": row, "settings": settings_of(row), **place, **figures}

    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        futures = [pool.submit(run, *one) for one in missing]
        try:
            for finished in concurrent.futures.as_completed(futures):
                figures = finished.result()
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(figures) + "\n")
                print(
                    f"{figures['row']:<30} seed {figures['seed']} fold {figures['fold']} "
                    f"accuracy {figures['accuracy']:.4f} log loss {figures['log_loss']:.4f} "
                    f"{figures['core_seconds']:.0f} core seconds",
                    flush=True,
                )
        except RuntimeError as error:
            pool.shutdown(cancel_futures=True)
            sys.exit(str(error))


def current_runs(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the runs in the file that have this number of folds and the rows' settings."""
    if not arguments.out.exists():
        return []
    lines = arguments.out.read_text(encoding="utf-8").splitlines()
    settings = {**{row: settings_of(row) for row in ROWS}, **REMOVED}
    return [
        run
        for run in map(json.loads, lines)
        if run["folds"] == arguments.folds and settings.get(run["row"]) == run["settings"]
    ]


def main() -> None:
    """Makes the missing runs or, with `--report`, prints and draws the result."""
    parser = data_parser(__doc__, "cats_vs_dogs")
    parser.add_argument("--weights", help=f"Keras weights file of {BACKBONE}")
    parser.add_argument("--folds", type=int, default=3, help="number of folds (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (%(default)s)")
    parser.add_argument("--rows", nargs="*", help="names of the rows to run; all if not given")
    parser.add_argument("--out", type=Path, default=RESULTS / "ablation.jsonl", help="results file")
    parser.add_argument("--report", action="store_true", help="print the table, draw the plot")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "ablation.png")
    parser.add_argument("--run", help="make one run: fold, evaluations and cores as JSON")
    parser.add_argument("flags", nargs="*", help="with --run: flags of run_train.py")
    arguments = parser.parse_args()
    if arguments.run:
        settings = json.loads(arguments.run)
        os.sched_setaffinity(0, settings["cores"])
        fold = Fold(**settings["fold"])
        print(json.dumps(run_fold(arguments.flags, fold, settings["evaluations"])))
    elif arguments.report:
        summaries = summarize(current_runs(arguments), arguments.folds)
        plot(summaries, arguments.picture)
        print(table(summaries))
    elif not arguments.weights:
        parser.error("--weights is missing")
    else:
        run_rows(arguments)


if __name__ == "__main__":
    main()
