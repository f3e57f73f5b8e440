"""Evaluates checkpoints of runs, and writes metrics and pictures into the runs' folders."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from research.data.source import Source
from research.evaluation.classifier import settings_of_run
from research.evaluation.comparison import comparison_table
from research.evaluation.find_variant import variant_of
from research.evaluation.one_run import Evaluator, open_evaluated
from research.evaluation.results import Evaluation
from research.runs import pictures
from research.runs.console import short_path
from research.runs.durable_files import write_file
from research.runs.restore import find_checkpoint
from research.runs.run_directory import RunDirectory
from research.runs.sealed_files import pointed
from research.settings.program_configs import EvalConfig
from research.system.errors import UserError
from research.tasks.checks import find_task

POLL_SECONDS = 1.0


def evaluate(config: EvalConfig, source: Source | None = None) -> list[Evaluation]:
    """Evaluates each checkpoint of each run on each split that a config names.

    Prints the metrics, compares several evaluations in a table, and writes the metrics next to the
    checkpoints.

    Args:
      config: what to evaluate.
      source: photos to use instead of those that the config names.

    Raises:
      UserError: a run, checkpoint or split does not exist, or the classes differ.
    """
    if config.watch:
        return watch(config, source)
    directories = [RunDirectory(ckpt_dir) for ckpt_dir in config.ckpt_dir]
    trained = [settings_of_run(one, config.task, config.backbone) for one in directories]
    tasks = [find_task(one.task) for one in trained]
    variants = dict(zip(map(variant_of, tasks), config.ckpt_dir, strict=True))
    if len(variants) > 1:
        named = " and ".join(map(repr, variants.values()))
        raise UserError(
            f"ckpt_dir is {named}, of which one has one label per photo and the other several; "
            "expected runs of the same kind: evaluate them one by one"
        )
    opened = []
    for directory, task in zip(directories, tasks, strict=True):  # before the first computation
        opened.append((directory, open_evaluated(config, directory, task, source)))
        for checkpoint in config.checkpoint:
            find_checkpoint(directory.checkpoints, checkpoint)
    evaluations: list[Evaluation] = []
    for directory, photos in opened:
        evaluator = Evaluator(config, directory, config.checkpoint[0], photos)
        for checkpoint in config.checkpoint:
            if evaluations:
                print()
            evaluator.classifier.restore(checkpoint)
            evaluations += evaluator.evaluate_splits()
    if len(evaluations) > 1:
        table = comparison_table(evaluator.variant, evaluations, config.resamples)
        print(f"\n{table}", flush=True)
    curves = [(run.title, rows) for run, _ in opened if (rows := run.read_metrics())]
    if config.pictures and len(curves) > 1:
        file = opened[0][0].pictures / "learning_curves.png"
        write_file(file, pictures.png(pictures.learning_curves(curves)))
        print(f"learning curves: {short_path(file)}", flush=True)
    return evaluations


def watch(config: EvalConfig, source: Source | None = None) -> list[Evaluation]:
    """Waits for a run to begin, and evaluates each new checkpoint until its training ends.

    Raises:
      UserError: the run or its next checkpoint did not appear within `watch_timeout` seconds.
    """
    directory, since = RunDirectory(config.ckpt_dir[0]), time.monotonic()
    if not directory.config_file.exists():
        print(f"waiting for a run to begin in {short_path(directory.path)}", flush=True)
    while not directory.config_file.exists():
        if time.monotonic() - since > config.watch_timeout:
            raise UserError(
                f"no run began in {str(directory.path)!r} within {config.watch_timeout} seconds; "
                "expected the folder of a training run, or a longer --watch_timeout"
            )
        time.sleep(POLL_SECONDS)
    task = find_task(settings_of_run(directory, config.task, config.backbone).task)
    photos = open_evaluated(config, directory, task, source)
    evaluator: Evaluator | None = None
    evaluations: list[Evaluation] = []
    for checkpoint in new_checkpoints(directory, config.watch_timeout):
        try:
            evaluator = evaluator or Evaluator(config, directory, checkpoint, photos)
            evaluator.classifier.restore(checkpoint)
        except UserError:
            if os.path.exists(f"{checkpoint}.index"):
                raise
            continue  # the training has deleted it in the meantime
        if evaluations:
            print()
        evaluations += evaluator.evaluate_splits()
    return evaluations


def new_checkpoints(directory: RunDirectory, timeout: float) -> Iterator[str]:
    """Yields the path of the latest checkpoint, and of each new one until the training ends.

    Raises:
      UserError: no checkpoint appeared within `timeout` seconds.
    """
    folder = directory.checkpoints / "latest"
    seen: list[str] = []
    since = time.monotonic()
    while True:
        finished = directory.result_file.exists()  # read first, to not miss the last checkpoint
        kept = [str(folder / name) for name in pointed(folder)]  # from the oldest to the latest
        new = [path for path in kept if path not in seen] if seen else kept[-1:]
        seen = kept
        if new:
            yield from new
            since = time.monotonic()
        elif finished:
            return
        elif time.monotonic() - since > timeout:
            raise UserError(
                f"no new checkpoint appeared in {str(directory.path)!r} within {timeout:.0f} "
                "seconds, and the training has not ended; give a longer --watch_timeout"
            )
        else:
            time.sleep(POLL_SECONDS)
