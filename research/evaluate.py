"""Evaluates checkpoints of runs on photos, and writes figures and pictures beside them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from research import evaluation_pictures as drawn
from research import pictures
from research.checkpoint import find_checkpoint
from research.checkpoint_files import pointed
from research.commands import EvalConfig
from research.comparison import comparison_table
from research.console import short_path
from research.errors import UserError
from research.evaluation import Evaluation
from research.evaluator import Evaluator
from research.run_directory import RunDirectory, write_file
from research.sources import Source

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
    for ckpt_dir in config.ckpt_dir:  # before anything is computed
        for checkpoint in config.checkpoint:
            RunDirectory(ckpt_dir).read_config()
            if not config.watch:
                find_checkpoint(RunDirectory(ckpt_dir).checkpoints, checkpoint)
    if config.watch:
        return watch(config, source)
    evaluations = []
    for ckpt_dir in config.ckpt_dir:
        evaluator = Evaluator(config, ckpt_dir, config.checkpoint[0], source)
        for checkpoint in config.checkpoint:
            evaluator.classifier.restore(checkpoint)
            evaluations += evaluator.evaluate_splits()
    if len(evaluations) > 1:
        print(f"\n{comparison_table(evaluations, config.resamples)}", flush=True)
    if len(config.ckpt_dir) > 1:
        runs = [RunDirectory(ckpt_dir) for ckpt_dir in config.ckpt_dir]
        curves = [(short_path(run.path), run.read_metrics()) for run in runs]
        file = runs[0].pictures / "learning_curves.png"
        write_file(file, pictures.png(drawn.learning_curves(curves)))
        print(f"learning curves: {short_path(file)}", flush=True)
    return evaluations


def watch(config: EvalConfig, source: Source | None = None) -> list[Evaluation]:
    """Evaluates each new last checkpoint of a run, until its training ends.

    Raises:
      UserError: none came in `watch_timeout` seconds while training had not ended.
    """
    directory = RunDirectory(config.ckpt_dir[0])
    evaluator: Evaluator | None = None
    evaluations: list[Evaluation] = []
    for checkpoint in new_checkpoints(directory, config.watch_timeout):
        try:
            evaluator = evaluator or Evaluator(config, config.ckpt_dir[0], checkpoint, source)
            evaluator.classifier.restore(checkpoint)
        except UserError:
            if os.path.exists(f"{checkpoint}.index"):
                raise
            continue  # training has replaced it meanwhile
        evaluations += evaluator.evaluate_splits()
    return evaluations


def new_checkpoints(directory: RunDirectory, timeout: float) -> Iterator[str]:
    """Yields the path of each last checkpoint that is seen, until training has ended.

    Raises:
      UserError: none came in `timeout` seconds.
    """
    seen, since = None, time.monotonic()
    while True:
        finished = directory.result_file.exists()  # before looking: the last one is not missed
        folder = directory.checkpoints / "latest"
        latest = next((str(folder / name) for name in reversed(pointed(folder))), None)
        if latest and latest != seen:
            yield latest
            seen, since = latest, time.monotonic()
        elif finished:
            return
        elif time.monotonic() - since > timeout:
            raise UserError(
                f"no new checkpoint came to {str(directory.path)!r} in {timeout:.0f} seconds, and "
                "its training has not ended; give a longer --watch_timeout"
            )
        else:
            time.sleep(SECONDS_BETWEEN_LOOKS)
