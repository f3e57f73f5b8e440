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

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from benchmarks.record import RESULTS
from flags.command_line import parse_config
from research.config import EvalConfig, TrainConfig
from research.environment import import_tensorflow

ROOT = Path(__file__).resolve().parents[1]
BACKBONE = "MobileNetV2"

# What each row gives besides no recipe: the default.
ROWS: dict[str, tuple[str, ...]] = {
    "default": (),
    "article": ("--flagfile=recipes/article.flags",),
    "fast": ("--flagfile=recipes/fast.flags",),
    "best": ("--flagfile=recipes/best.flags",),
    "no head-only epochs": ("--head_epochs=0", "--head_learning_rate=1e-4"),
    "20 head-only epochs": ("--head_epochs=20",),
    "5 epochs": ("--epochs=5",),
    "20 epochs": ("--epochs=20",),
    "backbone rate / 3": ("--backbone_learning_rate=3e-5",),
    "backbone rate x 3": ("--backbone_learning_rate=3e-4",),
    "constant rates": ("--head_schedule=constant", "--backbone_schedule=constant"),
    "one cycle": ("--head_schedule=one_cycle", "--backbone_schedule=one_cycle"),
    "no warm-up": ("--warmup=0steps",),
    "stage decay 0.7": ("--stage_decay=0.7",),
    "gradual unfreezing": ("--gradual_unfreezing=2",),
    "weight decay (AdamW 0.05)": ("--backbone_optimizer=adamw", "--weight_decay=0.05"),
    "RMSprop": ("--backbone_optimizer=rmsprop",),
    "BatchNorm training": ("--bn_mode=train",),
    "label smoothing 0.1": ("--label_smoothing=0.1",),
    "no mirror images in training": ("--nohorizontal_flip",),
    "fixed crops": ("--fixed_crops",),
    "random crops": ("--random_crop_area=0.5",),
    "colour jitter": ("--colour_jitter=0.3",),
    "RandAugment": ("--rand_augment=5",),
    "mixup": ("--mixup=0.2",),
    "CutMix": ("--cutmix=1",),
    "weights not averaged": ("--weight_averaging=0",),
    "early stopping": ("--early_stopping=3",),
    "balanced class weights": ("--class_weights=balanced",),
}
# How else the runs are evaluated: all of them, and the default's.
OTHER_CHECKPOINT = "least validation loss"
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "": {"checkpoint": "latest"},
    OTHER_CHECKPOINT: {"checkpoint": "best"},
}
ALTERNATIVES: dict[str, dict[str, Any]] = {
    **CHECKPOINTS,
    "no mirror averaging": {"checkpoint": "latest", "mirror_averaging": "off"},
    "evaluated at 160": {"checkpoint": "latest", "image_size": 160},
    "evaluated at 224": {"checkpoint": "latest", "image_size": 224},
}


def key_of(alternative: str, figure: str) -> str:
    """Returns what a run's figure is called in its line."""
    return f"{alternative}: {figure}" if alternative else figure


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


def run_fold(flags: list[str], fold: Fold, alternatives: bool) -> dict[str, float]:
    """Trains once in this process, and evaluates, in other ways too if asked; returns figures."""
    config = parse_config(TrainConfig, flags)
    import_tensorflow()
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
        for name, asked in (ALTERNATIVES if alternatives else CHECKPOINTS).items():
            evaluation = evaluate(EvalConfig(ckpt_dir=config.ckpt_dir, **asked), source)
            figures[key_of(name, "accuracy")] = evaluation.accuracy
            figures[key_of(name, "log_loss")] = evaluation.loss
    return figures


def run_rows(arguments: Any, file: Path) -> None:
    """Runs what is not in the file yet, each run in a process of its own."""
    done = {(run["row"], run["seed"], run["fold"]) for run in current_runs(file)}
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
                command += [json.dumps(dataclasses.asdict(fold))]
                command += [] if ROWS[row] else ["--alternatives"]
                command += ["--", *data, *ROWS[row]]
                process = subprocess.run(
                    command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, text=True
                )
                if process.returncode:
                    sys.exit(f"row {row!r} failed: {process.stdout[-2000:]}")
                figures = json.loads(process.stdout.splitlines()[-1])
                run = {
                    "row": row,
                    "settings": settings_of(row),
                    "seed": seed,
                    "fold": index,
                    **figures,
                }
                with file.open("a", encoding="utf-8") as appended:
                    appended.write(json.dumps(run) + "\n")
                print(
                    f"{row:<40}{seed:>3}{index:>3}{run['accuracy']:>8.4f}"
                    f"{run['log_loss']:>8.4f}"
                    f"{run[key_of(OTHER_CHECKPOINT, 'accuracy')]:>8.4f}"
                    f"{run[key_of(OTHER_CHECKPOINT, 'log_loss')]:>8.4f}{run['seconds']:>8.1f} s",
                    flush=True,
                )


def settings_of(row: str) -> str:
    """Returns a hash of all settings of a row: a run counts only as long as they are the same."""
    config = dataclasses.asdict(parse_config(TrainConfig, list(ROWS[row])))
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def current_runs(file: Path) -> list[dict[str, Any]]:
    """Returns the runs so far of rows as they are now."""
    if not file.exists():
        return []
    runs = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    now = {row: settings_of(row) for row in ROWS}
    return [run for run in runs if now.get(run["row"]) == run["settings"]]


@dataclasses.dataclass(frozen=True)
class Summary:
    """A row of the table.

    Attributes:
      row: its name.
      runs: how many it is made of.
      accuracy: mean over the runs, and its standard error.
      log_loss: the same, in nats.
      accuracy_difference: to `default` on the same folds, mean, and the p-value of a paired test.
      log_loss_difference: the same.
      seconds: median of a run.
    """

    row: str
    runs: int
    accuracy: tuple[float, float]
    log_loss: tuple[float, float]
    accuracy_difference: tuple[float, float]
    log_loss_difference: tuple[float, float]
    seconds: float


def summarize(runs: list[dict[str, Any]], folds: int) -> list[Summary]:
    """Compares each row with `default` on the folds that both have."""
    found: dict[str, dict[tuple[int, int], dict[str, float]]] = {}
    for run in runs:
        for name in ALTERNATIVES:
            if key_of(name, "accuracy") in run:
                figures = {key: run[key_of(name, key)] for key in ("accuracy", "log_loss")}
                figures["seconds"] = run["seconds"]
                row = ", ".join(part for part in (run["row"], name) if part)
                found.setdefault(row, {})[run["seed"], run["fold"]] = figures
    default = found["default"]
    summaries = []
    for row, own in found.items():
        shared = sorted(own.keys() & default.keys())
        values = {
            key: np.array([figures[key] for figures in own.values()])
            for key in ("accuracy", "log_loss", "seconds")
        }
        differences = {
            key: np.array([own[place][key] - default[place][key] for place in shared])
            for key in ("accuracy", "log_loss")
        }
        summaries.append(
            Summary(
                row,
                len(own),
                mean_and_error(values["accuracy"]),
                mean_and_error(values["log_loss"]),
                paired_test(differences["accuracy"], folds),
                paired_test(differences["log_loss"], folds),
                float(np.median(values["seconds"])),
            )
        )
    return summaries


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Returns the mean and its standard error, as if the runs were independent; NaN of one."""
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(values.mean()), float(error)


def paired_test(differences: np.ndarray, folds: int) -> tuple[float, float]:
    """Returns the mean difference and the p-value of a corrected resampled t-test.

    Runs share training photos, so that they are not independent: the variance is multiplied by
    1 / n + 1 / (folds - 1) instead of 1 / n (Nadeau and Bengio 2003, Machine Learning 52).
    """
    count = len(differences)
    deviation = differences.std(ddof=1) if count > 1 else 0.0
    if not deviation:
        return float(differences.mean()) if count else np.nan, np.nan
    error = deviation * np.sqrt(1 / count + 1 / (folds - 1))
    t = differences.mean() / error
    return float(differences.mean()), float(2 * stats.t.sf(abs(t), count - 1))


def table(summaries: list[Summary]) -> str:
    """Returns the rows as a Markdown table."""

    def change(difference: tuple[float, float], scale: float, digits: int) -> str:
        mean, probability = difference
        if np.isnan(probability):
            return ""
        return f"{scale * mean:+.{digits}f} (p {probability:.2f})"

    lines = [
        "| | runs | accuracy, % | against default | log loss | against default | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in summaries:
        (accuracy, accuracy_error), (loss, loss_error) = one.accuracy, one.log_loss
        lines.append(
            f"| {one.row} | {one.runs} | {100 * accuracy:.2f} ± {100 * accuracy_error:.2f} | "
            f"{change(one.accuracy_difference, 100, 2)} | {loss:.4f} ± {loss_error:.4f} | "
            f"{change(one.log_loss_difference, 1, 4)} | {one.seconds:.0f} |"
        )
    return "\n".join(lines)


def plot(summaries: list[Summary], file: Path) -> None:
    """Draws accuracy and log loss of each row with their standard errors."""
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(summaries)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(summaries), 0, -1)
    for axis, title, pairs in (
        (left, "accuracy, %", [(100 * a, 100 * e) for a, e in (s.accuracy for s in summaries)]),
        (right, "log loss, nats", [s.log_loss for s in summaries]),
    ):
        means, errors = zip(*pairs, strict=True)
        axis.errorbar(means, places, xerr=errors, fmt="o", capsize=3)
        axis.axvline(means[0], color="grey", linewidth=0.8)
        axis.set_title(title)
        axis.grid(alpha=0.3)
    left.set_yticks(list(places), [summary.row for summary in summaries])
    figure.savefig(file, dpi=100)


def main() -> None:
    """Runs what is missing, or reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="cats_vs_dogs", help="a TFDS name (%(default)s)")
    parser.add_argument("--data_dir", help="where TFDS keeps prepared data sets")
    parser.add_argument("--weights", help=f"a Keras weights file of {BACKBONE}")
    parser.add_argument("--folds", type=int, default=5, help="how many (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--rows", nargs="*", help="only these")
    parser.add_argument("--out", type=Path, default=RESULTS / "ablation.jsonl")
    parser.add_argument("--report", action="store_true", help="print the table, draw the plot")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "ablation.png")
    parser.add_argument("--alternatives", action="store_true", help="with --run")
    parser.add_argument("--run", help="be one run: a fold as JSON")
    parser.add_argument("flags", nargs="*", help="with --run: of run_train.py")
    arguments = parser.parse_args()
    if arguments.run:
        fold = Fold(**json.loads(arguments.run))
        print(json.dumps(run_fold(arguments.flags, fold, arguments.alternatives)))
    elif arguments.report:
        summaries = summarize(current_runs(arguments.out), arguments.folds)
        plot(summaries, arguments.picture)
        print(table(summaries))
    else:
        run_rows(arguments, arguments.out)


if __name__ == "__main__":
    main()
