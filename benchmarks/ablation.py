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

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from benchmarks.record import RESULTS
from flags.command_line import parse_config
from research.commands import EvalConfig
from research.config import TrainConfig
from research.environment import import_tensorflow
from research.settings import setting_of

ROOT = Path(__file__).resolve().parents[1]
BACKBONE = "MobileNetV2"

# What each row gives besides no recipe: the default.
ROWS: dict[str, tuple[str, ...]] = {
    "default": (),
    "article": ("--flagfile=recipes/article.flags",),
    "fast": ("--flagfile=recipes/fast.flags",),
    "best": ("--flagfile=recipes/best.flags",),
    "from layer 54": ("--unfreeze_from=54",),
    "every layer": ("--unfreeze_from=0",),
    "trained at 192": ("--image_size=192",),
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
# How the default's runs are evaluated; those of other rows are as the first.
EVALUATIONS: dict[str, dict[str, Any]] = {
    "": {},
    "checkpoint of least validation loss": {"checkpoint": ("best",)},
    "no mirror averaging": {"mirror_averaging": "off"},
    "evaluated at 160": {"image_size": 160},
    "evaluated at 224": {"image_size": 224},
}


def key_of(alternative: str, figure: str) -> str:
    """Returns what a run's figure is called in its line."""
    return f"{alternative}: {figure}" if alternative else figure


def title_of(row: str, evaluation: str) -> str:
    """Returns what a row that is evaluated in some way is called in the table."""
    return f"{row}, {evaluation}" if evaluation else row


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
    all_cores = sorted(os.sched_getaffinity(0))
    free: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for job in range(arguments.jobs):
        free.put(all_cores[job :: arguments.jobs])

    def run(row: str, fold: Fold) -> dict[str, Any]:
        asked = {
            "fold": dataclasses.asdict(fold),
            "evaluations": list(EVALUATIONS)[: None if row == "default" else 1],
            "cores": (cores := free.get()),
        }
        command = [sys.executable, "-m", "benchmarks.ablation", "--run", json.dumps(asked)]
        process = subprocess.run(
            [*command, "--", *data, *ROWS[row]], cwd=ROOT, stdout=subprocess.PIPE, text=True
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


def settings_of(row: str) -> str:
    """Returns a hash of a row's settings: a run counts only as long as they are the same."""
    parsed = parse_config(TrainConfig, list(ROWS[row]))
    config = {
        field.name: getattr(parsed, field.name)
        for field in dataclasses.fields(parsed)
        if setting_of(field).changes_result
    }
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def current_runs(file: Path, folds: int) -> list[dict[str, Any]]:
    """Returns the runs so far, on photos cut in so many folds, of rows as they are now."""
    if not file.exists():
        return []
    runs = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    now = {row: settings_of(row) for row in ROWS}
    return [run for run in runs if run["folds"] == folds and now.get(run["row"]) == run["settings"]]


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
      core_seconds: of training, median: seconds of all cores together.
    """

    row: str
    runs: int
    accuracy: tuple[float, float]
    log_loss: tuple[float, float]
    accuracy_difference: tuple[float, float]
    log_loss_difference: tuple[float, float]
    core_seconds: float


def summarize(runs: list[dict[str, Any]], folds: int) -> list[Summary]:
    """Compares each row with `default` on the folds that both have."""
    found: dict[str, dict[tuple[int, int], dict[str, float]]] = {}
    for run in runs:
        for name in EVALUATIONS:
            if key_of(name, "accuracy") in run:
                figures = {key: run[key_of(name, key)] for key in ("accuracy", "log_loss")}
                figures["core_seconds"] = run["core_seconds"]
                found.setdefault(title_of(run["row"], name), {})[run["seed"], run["fold"]] = figures
    default = found["default"]
    summaries = []
    for row in (title_of(row, name) for row in ROWS for name in EVALUATIONS):
        if row not in found:
            continue
        own = found[row]
        shared = sorted(own.keys() & default.keys())
        values = {
            key: np.array([figures[key] for figures in own.values()])
            for key in ("accuracy", "log_loss", "core_seconds")
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
                float(np.median(values["core_seconds"])),
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

    def measured(figure: tuple[float, float], scale: float, digits: int) -> str:
        mean, error = figure
        known = "" if np.isnan(error) else f" ± {scale * error:.{digits}f}"
        return f"{scale * mean:.{digits}f}{known}"

    def change(difference: tuple[float, float], scale: float, digits: int) -> str:
        mean, probability = difference
        known = "" if np.isnan(probability) else f" (p {probability:.2f})"
        return "" if np.isnan(mean) or one is summaries[0] else f"{scale * mean:+.{digits}f}{known}"

    lines = [
        "| | runs | accuracy, % | against default | log loss | against default | core seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in summaries:
        lines.append(
            f"| {one.row} | {one.runs} | {measured(one.accuracy, 100, 2)} | "
            f"{change(one.accuracy_difference, 100, 2)} | {measured(one.log_loss, 1, 4)} | "
            f"{change(one.log_loss_difference, 1, 4)} | {one.core_seconds:.0f} |"
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
