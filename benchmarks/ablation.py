"""Recipes and single settings compared on several tasks, by cross-validation.

python -m benchmarks.ablation --tasks cats_vs_dogs digits beetles textures typefaces trash=FOLDER \
    --weights=FILE --data_dir=DIR                               # takes hours; can be resumed

A task is a TFDS data set, a folder given as NAME=FOLDER, or one that `drawn_tasks.py` draws. All
photos of a task are divided into folds, in a new way for each seed. Each row of `ROWS` is trained
on all folds but one, with a tenth of them for validation, and evaluated on the fold left out, with
the functions behind `run_train.py` and `run_eval.py`, in a process of its own. The rows of
`FIT_ROWS` are trained with `fit` on the same photos. All rows of a task, seed and fold use one
trunk cache on disk, in the folder of `--caches`, which is removed after them. Seeds and folds take
turns, so that the rows can be compared whenever the program is stopped. It begins by printing how
long it will take. The figures of each run are appended to `benchmarks/results/ablation.jsonl`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablation_report import report
from benchmarks.ablation_rows import (
    EVALUATIONS,
    FIT_ROWS,
    PRECISION,
    ROWS,
    evaluations_of,
    has_few_views,
    key_of,
    record_new_settings,
    settings_of,
)
from benchmarks.fit_recipes import fit
from benchmarks.harness import RESULTS, ROOT, write_report
from benchmarks.tasks import Fold, Task, absolute, divide, hash_of_weights, read_tasks
from flags.command_line import parse_config
from research.data.source import Source
from research.settings.program_configs import EvalConfig
from research.settings.train_config import TrainConfig
from research.system.environment import import_tensorflow
from research.system.program import ended_by_a_line

BACKBONE = "MobileNetV2"
WEIGHTS = "b5c304ecf014"  # hash of the weights file of the results, for `--report`


def run_fold(flags: list[str], fold: Fold, evaluations: Sequence[str]) -> dict[str, float]:
    """Trains once in this process, runs the named evaluations and returns the figures."""
    config = dataclasses.replace(parse_config(TrainConfig, flags), seed=fold.seed)
    import_tensorflow()
    from research.loop.open_photos import photos_of_run

    return train_and_evaluate(config, divide(photos_of_run(config), fold), evaluations)


def train_and_evaluate(
    config: TrainConfig, source: Source, evaluations: Sequence[str]
) -> dict[str, float]:
    """Trains in a temporary folder, and runs the named evaluations on the test photos.

    Returns:
      The seconds of the training, and the accuracy and the log loss of each evaluation; see
      `key_of`.
    """
    from research.evaluation.evaluate import evaluate
    from research.train import train

    begin, begin_on_cores = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, ckpt_dir=f"{folder}/run")
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


def fit_fold(row: str, flags: list[str], fold: Fold) -> dict[str, float]:
    """Trains a row of `FIT_ROWS` in this process, evaluates it and returns the figures.

    Args:
      row: its name.
      flags: of run_train.py, which select the photos, the backbone and its weights.
      fold: the photos to evaluate on.
    """
    config = parse_config(TrainConfig, flags)
    import_tensorflow()
    from research.loop.open_photos import photos_of_run

    source = divide(photos_of_run(config), fold)
    begin, begin_on_cores = time.perf_counter(), time.process_time()
    # A task without horizontal flips has pictures whose mirror image has another meaning.
    flips, weights = config.horizontal_flip, config.weights
    trained = fit(FIT_ROWS[row], config.backbone, weights, source, fold.seed, mirrored=flips)
    seconds, core_seconds = time.perf_counter() - begin, time.process_time() - begin_on_cores
    predictions = trained.predictions("test")
    return {
        "seconds": seconds,
        "core_seconds": core_seconds,
        "accuracy": float(predictions.correct.mean()),
        "log_loss": float(predictions.losses().mean()),
    }


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run to make."""

    task: Task
    fold: Fold
    row: str

    @property
    def group(self) -> str:
        """The runs with the same group have the same photos and share a trunk cache."""
        return f"{self.task.name}-{self.fold.seed}-{self.fold.index}"

    def flags(self, backbone: str, weights: str, cache: Path) -> list[str]:
        """Returns the flags of run_train.py."""
        first = [*self.task.photos, f"--backbone={backbone}", f"--weights={weights}"]
        place = "disk" if has_few_views(self.row) else "auto"
        first += [f"--trunk_cache={place}", f"--cache_dir={cache / self.group}"]
        first += [PRECISION]
        # The default and `fast` find out by themselves that digits must not be mirrored.
        return [*first, *ROWS.get(self.row, self.task.others)]


def plan_runs(
    tasks: Sequence[Task],
    rows: Sequence[str],
    seeds: int,
    folds: int,
    turns: int,
    runs: Sequence[Mapping[str, Any]],
) -> list[Planned]:
    """Returns the runs that are not on file, in the order in which they are made.

    In each turn, each seed is trained with one fold, and another one than in the other turns.
    Seeds begin at 1: the rules and the recipes were chosen on folds of seed 0.
    """
    done = {(run["task"], run["row"], run["seed"], run["fold"]) for run in runs}
    return [
        Planned(task, fold, row)
        for turn in range(min(turns, folds))
        for seed in range(1, seeds + 1)
        for fold in [Fold(seed, (seed + turn) % folds, folds)]
        for task in tasks
        for row in rows
        if (task.name, row, fold.seed, fold.index) not in done
    ]


def expected_seconds(
    missing: Iterable[tuple[str, str]], runs: Sequence[Mapping[str, Any]]
) -> tuple[float, int]:
    """Estimates the seconds of runs from finished runs of the same row and task.

    Args:
      missing: row and task of each run to make.
      runs: the finished runs.

    Returns:
      The sum over the runs; and the number of runs without such a run on file. They are estimated
      by the median of their row on other tasks, or else by that of all rows.
    """
    seconds: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        for key in ((run["row"], run["task"]), (run["row"], ""), ("", "")):
            seconds.setdefault(key, []).append(run["process_seconds"])
    total, unknown = 0.0, 0
    for row, task in missing:
        found = next((key for key in ((row, task), (row, ""), ("", "")) if key in seconds), None)
        total += statistics.median(seconds[found]) if found else 0.0
        unknown += found != (row, task)
    return total, unknown


def expected_time(seconds: float, unknown: int, count: int, jobs: int) -> str:
    """Returns the estimate of `expected_seconds` as a line of text."""
    length = f"about {seconds / jobs / 3600:.1f} hours" if seconds or not count else "unknown time"
    text = f"{count} runs, {length} with --jobs={jobs}"
    if unknown:
        text += f"; {unknown} of them have no finished run of the same row and task to go by"
    return text


def run_rows(arguments: argparse.Namespace, tasks: Sequence[Task]) -> None:
    """Makes the runs that the file does not have, each in its own process on its own cores."""
    record_new_settings()
    runs = current_runs(arguments)
    rows = arguments.rows or [*ROWS, *FIT_ROWS]
    missing = plan_runs(
        tasks, rows, arguments.seeds, arguments.folds, arguments.turns or arguments.folds, runs
    )
    pairs = [(one.row, one.task.name) for one in missing]
    print(expected_time(*expected_seconds(pairs, runs), len(pairs), arguments.jobs), flush=True)
    if arguments.plan:
        return
    weights, weights_hash = absolute(arguments.weights), hash_of_weights(arguments.weights)
    left = {one.group: 0 for one in missing}
    for one in missing:
        left[one.group] += 1
    all_cores = sorted(os.sched_getaffinity(0))
    free: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for job in range(arguments.jobs):
        free.put(all_cores[job :: arguments.jobs])
    failed = 0

    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:

        def run(one: Planned) -> dict[str, Any] | str:
            """Returns the line of a run, or the end of the output of a failed one."""
            cores, begin = free.get(), time.perf_counter()
            settings = {"row": one.row, "fold": dataclasses.asdict(one.fold), "cores": cores}
            command = [sys.executable, "-m", "benchmarks.ablation", "--run", json.dumps(settings)]
            command += ["--", *one.flags(arguments.backbone, weights, arguments.caches)]
            process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            free.put(cores)
            if process.returncode:
                return f"{process.stdout[-500:]}\n{process.stderr[-1500:]}"
            return {
                "row": one.row,
                "task": one.task.name,
                "settings": settings_of(one.row),
                "backbone": arguments.backbone,
                "weights": weights_hash,
                "seed": one.fold.seed,
                "fold": one.fold.index,
                "folds": one.fold.folds,
                # Such a run took less time than without the runs before it.
                "found_cache": "found there" in process.stdout,
                "process_seconds": time.perf_counter() - begin,
                **json.loads(process.stdout.splitlines()[-1]),
            }

        futures = {pool.submit(run, one): one for one in missing}
        try:
            for finished in concurrent.futures.as_completed(futures):
                one, figures = futures[finished], finished.result()
                left[one.group] -= 1
                if not left[one.group]:
                    shutil.rmtree(arguments.caches / one.group, ignore_errors=True)
                if isinstance(figures, str):
                    failed += 1
                    print(f"{one.row} on {one.group} failed: {figures}", file=sys.stderr)
                    continue
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(figures) + "\n")
                print(
                    f"{one.task.name:<14} {one.row:<30} seed {one.fold.seed} "
                    f"fold {one.fold.index} accuracy {figures['accuracy']:.4f} "
                    f"log loss {figures['log_loss']:.4f} {figures['process_seconds']:.0f} seconds",
                    flush=True,
                )
        except BaseException:  # such as Ctrl-C
            pool.shutdown(cancel_futures=True)
            raise
    if failed:
        sys.exit(f"{failed} runs failed; the same command tries them again")


def current_runs(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the runs in the file with these folds, backbone and weights, and today's rows."""
    if not arguments.out.exists():
        return []
    lines = arguments.out.read_text(encoding="utf-8").splitlines()
    settings = {row: settings_of(row) for row in (*ROWS, *FIT_ROWS)}
    weights = hash_of_weights(arguments.weights) if arguments.weights else WEIGHTS
    return [
        run
        for run in map(json.loads, lines)
        if run["folds"] == arguments.folds
        and (run["backbone"], run["weights"]) == (arguments.backbone, weights)
        and settings.get(run["row"]) == run["settings"]
    ]


def main() -> None:
    """Makes the missing runs or, with `--report`, writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", help="names, or NAME=FOLDER; with --report, all")
    parser.add_argument("--data_dir", help="folder of prepared TFDS data sets")
    parser.add_argument("--backbone", default=BACKBONE, help="of all rows (%(default)s)")
    parser.add_argument("--weights", help="Keras weights file of the backbone, or none")
    parser.add_argument("--folds", type=int, default=3, help="number of folds (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (%(default)s)")
    parser.add_argument("--turns", type=int, help="folds per seed; all if not given")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (%(default)s)")
    parser.add_argument("--rows", nargs="*", help="names of the rows to run; all if not given")
    parser.add_argument("--out", type=Path, default=RESULTS / "ablation.jsonl", help="results file")
    parser.add_argument(
        "--caches",
        type=Path,
        default=Path(tempfile.gettempdir(), "ablation-caches"),
        help="folder of the trunk caches, of one program at a time (%(default)s)",
    )
    parser.add_argument("--plan", action="store_true", help="only print how long it will take")
    parser.add_argument("--report", action="store_true", help="write the tables")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "recipes.md")
    parser.add_argument("--run", help="make one run: row, fold and cores as JSON")
    parser.add_argument("flags", nargs="*", help="with --run: flags of run_train.py")
    arguments = parser.parse_args()
    if arguments.run:
        settings = json.loads(arguments.run)
        os.sched_setaffinity(0, settings["cores"])
        row, fold = settings["row"], Fold(**settings["fold"])
        with ended_by_a_line():
            if row in FIT_ROWS:
                figures = fit_fold(row, arguments.flags, fold)
            else:
                figures = run_fold(arguments.flags, fold, evaluations_of(row))
            print(json.dumps(figures))
        return
    tasks = read_tasks(parser, arguments, [*ROWS, *FIT_ROWS])
    if arguments.report:
        runs = current_runs(arguments)
        names = [task.name for task in tasks] or list(dict.fromkeys(run["task"] for run in runs))
        text = report(runs, names, arguments.folds)
        write_report("ablation", text, arguments.document)
        print(text)
    else:
        try:
            run_rows(arguments, tasks)
        except KeyboardInterrupt:
            sys.exit("stopped; the same command continues")


if __name__ == "__main__":
    main()
