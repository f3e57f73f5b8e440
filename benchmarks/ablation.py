"""What each ingredient of a recipe is worth: cross-validation, one ingredient in or out a row.

python -m benchmarks.ablation --weights=FILE --data_dir=DIR     # hours; it resumes where it stopped

All photos of a data set are cut in folds, anew for each seed. Each row of `ROWS` is trained on all
folds but one, a tenth of which it validates on, and evaluated on the photos of the one left out,
as `run_train.py` and `run_eval.py` do it, in a process of its own. Rows take turns, and so do seeds
and folds, so that whatever is there when it is stopped compares like with like. Each run's figures
are kept in `benchmarks/results/ablation.jsonl`.
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
    key_of,
    settings_of,
    ways_of,
)
from benchmarks.record import RESULTS
from flags.command_line import parse_config
from research.settings.program_configs import EvalConfig
from research.settings.train_config import TrainConfig
from research.system.environment import import_tensorflow

ROOT = Path(__file__).resolve().parents[1]
BACKBONE = "MobileNetV2"


@dataclasses.dataclass(frozen=True)
class Fold:
    """A part of the photos to evaluate on; the others are trained on.

    Attributes:
      seed: of the run, and of how photos are cut in folds.
      index: which fold is evaluated on.
      folds: how many there are.
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
    """Trains once in this process, and evaluates in each of some ways; returns the figures."""
    config = parse_config(TrainConfig, flags)
    import_tensorflow()
    from research.data.open_source import open_source
    from research.data.source import Example, Source
    from research.evaluation.evaluate import evaluate
    from research.train import train

    class FoldSource(Source):
        """Other splits of the same photos."""

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

    source = FoldSource(open_source(config.dataset, config.image_folder, config.data_dir))
    begin, begin_on_cores = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, ckpt_dir=f"{folder}/run", seed=fold.seed)
        train(config, source)
        figures = {
            "seconds": time.perf_counter() - begin,
            "core_seconds": time.process_time() - begin_on_cores,
        }
        for name in evaluations:
            asked = EvalConfig(
                ckpt_dir=(str(config.ckpt_dir),), resamples=0, pictures=False, **EVALUATIONS[name]
            )
            (evaluation,) = evaluate(asked, source)
            figures[key_of(name, "accuracy")] = evaluation.accuracy
            figures[key_of(name, "log_loss")] = evaluation.loss
    return figures


def run_rows(arguments: Any, file: Path) -> None:
    """Runs what is not in the file yet, each run in a process of its own, on its own cores."""
    done = {(run["row"], run["seed"], run["fold"]) for run in current_runs(file, arguments.folds)}
    missing = [
        (row, fold)
        for turn in range(arguments.folds)
        for seed in range(arguments.seeds)
        for fold in [Fold(seed, (seed + turn) % arguments.folds, arguments.folds)]
        for row in arguments.rows or ROWS
        if (row, fold.seed, fold.index) not in done
    ]
    data = [f"--dataset={arguments.dataset}", f"--weights={Path(arguments.weights).absolute()}"]
    data += [f"--data_dir={Path(arguments.data_dir).absolute()}"] if arguments.data_dir else []
    data += [f"--backbone={BACKBONE}"]
    last = DATA_FLAGS.get(arguments.dataset, ())  # recipes say otherwise
    all_cores = sorted(os.sched_getaffinity(0))
    free: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for job in range(arguments.jobs):
        free.put(all_cores[job :: arguments.jobs])

    def run(row: str, fold: Fold) -> dict[str, Any]:
        asked = {
            "fold": dataclasses.asdict(fold),
            "evaluations": ways_of(row),
            "cores": (cores := free.get()),
        }
        command = [sys.executable, "-m", "benchmarks.ablation", "--run", json.dumps(asked)]
        process = subprocess.run(
            [*command, "--", *data, *ROWS[row], *last], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
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
                with file.open("a", encoding="utf-8") as appended:
                    appended.write(json.dumps(figures) + "\n")
                print(
                    f"{figures['row']:<30} seed {figures['seed']} fold {figures['fold']} "
                    f"accuracy {figures['accuracy']:.4f} log loss {figures['log_loss']:.4f} "
                    f"{figures['core_seconds']:.0f} core seconds",
                    flush=True,
                )
        except RuntimeError as error:
            pool.shutdown(cancel_futures=True)
            sys.exit(str(error))


def current_runs(file: Path, folds: int) -> list[dict[str, Any]]:
    """Returns the runs so far, on photos cut in so many folds, of rows as they are now."""
    if not file.exists():
        return []
    runs = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    now = {**{row: settings_of(row) for row in ROWS}, **REMOVED}
    return [run for run in runs if run["folds"] == folds and now.get(run["row"]) == run["settings"]]


def main() -> None:
    """Runs what is missing, or reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="cats_vs_dogs", help="a TFDS name (%(default)s)")
    parser.add_argument("--data_dir", help="where TFDS keeps prepared data sets")
    parser.add_argument("--weights", help=f"a Keras weights file of {BACKBONE}")
    parser.add_argument("--folds", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    parser.add_argument("--rows", nargs="*", help="only these")
    parser.add_argument("--out", type=Path, default=RESULTS / "ablation.jsonl")
    parser.add_argument("--report", action="store_true", help="print the table, draw the plot")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "ablation.png")
    parser.add_argument("--run", help="be one run: fold, evaluations and cores as JSON")
    parser.add_argument("flags", nargs="*", help="with --run: of run_train.py")
    arguments = parser.parse_args()
    if arguments.run:
        asked = json.loads(arguments.run)
        os.sched_setaffinity(0, asked["cores"])
        fold = Fold(**asked["fold"])
        print(json.dumps(run_fold(arguments.flags, fold, asked["evaluations"])))
    elif arguments.report:
        summaries = summarize(current_runs(arguments.out, arguments.folds), arguments.folds)
        plot(summaries, arguments.picture)
        print(table(summaries))
    else:
        run_rows(arguments, arguments.out)


if __name__ == "__main__":
    main()
