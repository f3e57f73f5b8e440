"""What each ingredient of a recipe is worth: cross-validation, one ingredient in or out a row.

python -m benchmarks.ablation --weights=FILE --data_dir=DIR     # hours; it resumes where it stopped

All photos of a data set are cut in folds, anew for each seed. Each row of `ROWS` is trained on all
folds but one, a tenth of which it validates on, and evaluated on the photos of the one left out,
as `run_train.py` and `run_eval.py` do it, in a process of its own. Rows take turns, so that a slow
hour is shared by all. Each run's figures are kept in `benchmarks/results/ablation.jsonl`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

ROOT = Path(__file__).resolve().parents[1]
BACKBONE = "MobileNetV2"

# What each row changes in the settings of `recipes/default.flags`.
ROWS: dict[str, tuple[str, ...]] = {
    "default": (),
}


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


def run_fold(flags: list[str], fold: Fold) -> dict[str, float]:
    """Trains and evaluates once, in this process; returns the figures."""
    from flags.command_line import parse_config
    from research.config import EvalConfig, TrainConfig
    from research.environment import import_tensorflow

    config = parse_config(TrainConfig, flags)
    import_tensorflow()
    from research.checkpoint import find_checkpoint
    from research.evaluate import evaluate
    from research.sources import EncodedExample, Source, open_source
    from research.train import train

    class FoldSource(Source):
        """Other splits of the same photos."""

        def __init__(self, source: Source) -> None:
            self.class_names = source.class_names
            self._photos: dict[str, list[EncodedExample]] = {}
            for split in ("train", "validation", "test"):
                for photo in source.examples(split):
                    self._photos.setdefault(fold.split_of(photo.name), []).append(photo)

        def count(self, split: str) -> int:
            return len(self._photos[split])

        def examples(self, split: str) -> Iterator[EncodedExample]:
            yield from self._photos[split]

    source = FoldSource(open_source(config.dataset, config.image_folder, config.data_dir))
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, ckpt_dir=f"{folder}/run", seed=fold.seed)
        train(config, source)
        seconds = time.perf_counter() - begin
        figures = {"seconds": seconds}
        evaluation = None
        for checkpoint in ("best", "latest"):
            step = Path(find_checkpoint(Path(f"{folder}/run/checkpoints"), checkpoint)).name
            if evaluation is None or not evaluation.checkpoint.endswith(f"/{step}"):
                asked = EvalConfig(ckpt_dir=config.ckpt_dir, checkpoint=checkpoint)
                evaluation = evaluate(asked, source)
            figures[f"{checkpoint}_accuracy"] = evaluation.accuracy
            figures[f"{checkpoint}_log_loss"] = evaluation.loss
    return {**figures, "photos": evaluation.photos}


def run_rows(arguments: Any, file: Path) -> None:
    """Runs what is not in the file yet, each run in a process of its own."""
    done = {(run["row"], run["seed"], run["fold"]) for run in read_runs(file)}
    data = [f"--dataset={arguments.dataset}", f"--weights={Path(arguments.weights).absolute()}"]
    data += [f"--data_dir={Path(arguments.data_dir).absolute()}"] if arguments.data_dir else []
    data += [f"--backbone={BACKBONE}"]
    rows = arguments.rows or list(ROWS)
    for seed in range(arguments.seeds):
        for index in range(arguments.folds):
            for row in rows:
                if (row, seed, index) in done:
                    continue
                fold = Fold(seed, index, arguments.folds)
                command = [sys.executable, "-m", "benchmarks.ablation", "--run"]
                command += [json.dumps(dataclasses.asdict(fold)), "--", *data, *ROWS[row]]
                process = subprocess.run(
                    command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, text=True
                )
                if process.returncode:
                    sys.exit(f"row {row!r} failed: {process.stdout[-2000:]}")
                figures = json.loads(process.stdout.splitlines()[-1])
                run = {"row": row, "flags": ROWS[row], "seed": seed, "fold": index, **figures}
                with file.open("a", encoding="utf-8") as appended:
                    appended.write(json.dumps(run) + "\n")
                print(
                    f"{row:<40}{seed:>3}{index:>3}{run['best_accuracy']:>8.4f}"
                    f"{run['best_log_loss']:>8.4f}{run['latest_accuracy']:>8.4f}"
                    f"{run['latest_log_loss']:>8.4f}{run['seconds']:>8.1f} s",
                    flush=True,
                )


def read_runs(file: Path) -> list[dict[str, Any]]:
    """Returns all runs so far."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="cats_vs_dogs", help="a TFDS name (%(default)s)")
    parser.add_argument("--data_dir", help="where TFDS keeps prepared data sets")
    parser.add_argument("--weights", help=f"a Keras weights file of {BACKBONE}")
    parser.add_argument("--folds", type=int, default=5, help="how many (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--rows", nargs="*", help="only these")
    parser.add_argument("--out", type=Path, default=RESULTS / "ablation.jsonl")
    parser.add_argument("--run", help="be one run: a fold as JSON")
    parser.add_argument("flags", nargs="*", help="with --run: of run_train.py")
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run_fold(arguments.flags, Fold(**json.loads(arguments.run)))))
    else:
        run_rows(arguments, arguments.out)


if __name__ == "__main__":
    main()
