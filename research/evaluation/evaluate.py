"""Evaluates checkpoints of runs on photos, and writes figures and pictures beside them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from research.data.source import Source
from research.evaluation.comparison import comparison_table
from research.evaluation.evaluator import Evaluator, open_photos
from research.evaluation.results import Evaluation
from research.runs import pictures
from research.runs.checkpoints import find_checkpoint
from research.runs.console import short_path
from research.runs.durable_files import write_file
from research.runs.run_directory import RunDirectory
from research.runs.sealed_files import pointed
from research.settings.program_configs import EvalConfig
from research.system.errors import UserError

SECONDS_BETWEEN_LOOKS = 1.0


def evaluate(config: EvalConfig, source: Source | None = None) -> list[Evaluation]:
    """Evaluates each checkpoint of each run on each split, as asked.

    Prints the figures, compares them where there are several, and writes them beside the
    checkpoints.

    Args:
      config: what to evaluate.
      source: photos to take instead of those that the config names.

    Raises:
      UserError: there is no such run, checkpoint or split, or the classes differ.
    """
    if config.watch:
        return watch(config, source)
    opened = []
    for ckpt_dir in config.ckpt_dir:  # all of them, before anything is computed
        directory = RunDirectory(ckpt_dir)
        opened.append((ckpt_dir, open_photos(config, directory, source)))
        for checkpoint in config.checkpoint:
            find_checkpoint(directory.checkpoints, checkpoint)
    evaluations: list[Evaluation] = []
    for ckpt_dir, photos in opened:
        evaluator = Evaluator(config, ckpt_dir, config.checkpoint[0], photos)
        for checkpoint in config.checkpoint:
            if evaluations:
                print()
            evaluator.classifier.restore(checkpoint)
            evaluations += evaluator.evaluate_splits()
    if len(evaluations) > 1:
        print(f"\n{comparison_table(evaluations, config.resamples)}", flush=True)
    runs = [RunDirectory(ckpt_dir) for ckpt_dir in config.ckpt_dir]
    curves = [(run.title, rows) for run in runs if (rows := run.read_metrics())]
    if config.pictures and len(curves) > 1:
        file = runs[0].pictures / "learning_curves.png"
        write_file(file, pictures.png(pictures.learning_curves(curves)))
        print(f"learning curves: {short_path(file)}", flush=True)
    return evaluations


def watch(config: EvalConfig, source: Source | None = None) -> list[Evaluation]:
    """Evaluates each new last checkpoint of a run, until its training ends.

    Raises:
      UserError: no run, or none of its checkpoints, came in `watch_timeout` seconds while training
        had not ended.
    """
    directory = RunDirectory(config.ckpt_dir[0])
    wait_for_run(directory, config.watch_timeout)
    photos = open_photos(config, directory, source)
    evaluator: Evaluator | None = None
    evaluations: list[Evaluation] = []
    for checkpoint in new_checkpoints(directory, config.watch_timeout):
        try:
            evaluator = evaluator or Evaluator(config, config.ckpt_dir[0], checkpoint, photos)
            evaluator.classifier.restore(checkpoint)
        except UserError:
            if os.path.exists(f"{checkpoint}.index"):
                raise
            continue  # training has replaced it meanwhile
        if evaluations:
            print()
        evaluations += evaluator.evaluate_splits()
    return evaluations


def wait_for_run(directory: RunDirectory, timeout: float) -> None:
    """Waits until a run has begun in a folder.

    Raises:
      UserError: none did in `timeout` seconds.
    """
    since = time.monotonic()
    if not directory.config_file.exists():
        print(f"waiting for a run to begin in {short_path(directory.path)}", flush=True)
    while not directory.config_file.exists():
        if time.monotonic() - since > timeout:
            raise UserError(
                f"no run began in {str(directory.path)!r} in {timeout:.0f} seconds; expected the "
                "folder of a training run, or a longer --watch_timeout"
            )
        time.sleep(SECONDS_BETWEEN_LOOKS)


def new_checkpoints(directory: RunDirectory, timeout: float) -> Iterator[str]:
    """Yields the path of the last checkpoint, and of each after it, until training has ended.

    Raises:
      UserError: none came in `timeout` seconds.
    """
    seen: list[str] = []
    since = time.monotonic()
    while True:
        finished = directory.result_file.exists()  # before looking: the last one is not missed
        kept = kept_checkpoints(directory)
        new = [path for path in kept if path not in seen] if seen else kept[-1:]
        seen = kept
        if new:
            yield from new
            since = time.monotonic()
        elif finished:
            return
        elif time.monotonic() - since > timeout:
            raise UserError(
                f"no new checkpoint came to {str(directory.path)!r} in {timeout:.0f} seconds, and "
                "its training has not ended; give a longer --watch_timeout"
            )
        else:
            time.sleep(SECONDS_BETWEEN_LOOKS)


def kept_checkpoints(directory: RunDirectory) -> list[str]:
    """Returns the paths of a run's last checkpoints, the last one last."""
    folder = directory.checkpoints / "latest"
    return [str(folder / name) for name in pointed(folder)]
