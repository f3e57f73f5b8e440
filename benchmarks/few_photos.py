"""One to 25 photos per class: recipes, and a logistic regression on the same frozen features.

python -m benchmarks.few_photos --tasks cats_vs_dogs digits beetles textures typefaces \
    trash=FOLDER --weights=FILE --data_dir=DIR                  # takes hours; can be resumed

Tasks are named as in `benchmarks.ablation`. A third of the photos of a task, but at most 400, are
the test photos, which are the same in all runs. A draw takes some of the other photos at random.
They are all used for training: there is no validation split. The photos of a draw with few photos
are also in the same draw with more. The logistic regression is that of scikit-learn with its
defaults. It is trained on the features that the row `fast` is trained on, and predicts from those
that `fast` is evaluated on. The test photos are also those of the fold on which the rules of the
default were chosen.

The figures of each run are appended to `benchmarks/results/few_photos.jsonl`. It begins by printing
how long it will take. `--report` prints the table.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats
from sklearn.linear_model import LogisticRegression

from benchmarks.ablation import (
    BACKBONE,
    WEIGHTS,
    expected_seconds,
    expected_time,
    train_and_evaluate,
)
from benchmarks.ablation_rows import PRECISION, ROWS, record_new_settings, settings_of
from benchmarks.harness import RESULTS, ROOT
from benchmarks.tasks import (
    DividedSource,
    Fold,
    Task,
    absolute,
    all_photos,
    hash_of_weights,
    read_tasks,
)
from flags.command_line import parse_config
from research.data.source import Example, Source
from research.settings.train_config import TrainConfig
from research.system.environment import import_tensorflow
from research.system.program import ended_by_a_line

if TYPE_CHECKING:
    from research.data.split_arrays import SplitArrays
    from research.evaluation.scores import Predictions

PHOTOS = (1, 5, 10, 25)  # per class
DRAWS = 10
TEST_FOLD, TEST_PHOTOS = Fold(seed=0, index=0, folds=3), 400
REGRESSION = "logistic regression"
REGRESSION_SETTINGS = "C=1, float32"  # in place of a hash of settings


def draw_photos(source: Source, draw: int, per_class: int) -> DividedSource:
    """Returns some training photos of each class, and the test photos.

    Args:
      source: the photos of a task.
      draw: number of the draw; the test photos do not depend on it.
      per_class: training photos per class, or all if there are fewer.
    """
    photos = sorted(all_photos(source), key=lambda photo: _place(photo.name))
    test = [photo for photo in photos if TEST_FOLD.split_of(photo.name) == "test"]
    others = [photo for photo in photos if TEST_FOLD.split_of(photo.name) != "test"]
    train: list[Example] = []
    for label in range(len(source.class_names)):
        own = [photo for photo in others if photo.label == label]
        order = np.random.default_rng((draw, label)).permutation(len(own))
        train += [own[index] for index in order[:per_class]]
    return DividedSource(source.class_names, {"train": train, "test": test[:TEST_PHOTOS]})


def _place(name: str) -> bytes:
    """Returns a place in an order that depends neither on classes nor on folders."""
    return hashlib.sha256(name.encode()).digest()


def frozen_features(
    config: TrainConfig, source: Source, split: str
) -> tuple[np.ndarray, SplitArrays]:
    """Computes the features of a split with the initial weights of the backbone.

    Args:
      config: the settings of a run that trains only the head.
      source: the photos.
      split: its name.

    Returns:
      The features of each view of each photo, float32 (views, photos, channels); and the photos.
    """
    import tensorflow as tf

    from research.loop.builder import build_network, make_loader
    from research.loop.trunk.frozen_layers import BATCH_SIZE, view_batches
    from research.system.devices import set_precision

    set_precision(config.precision)
    network, loader = build_network(config, source.class_names).network, make_loader(config, source)
    compute = tf.function(lambda batch: network.features(batch, training=False), autograph=False)
    views = [
        np.concatenate([compute(one) for one in view_batches(loader, split, view, BATCH_SIZE)])
        for view in range(loader.augmentation_of(split).views or 1)
    ]
    return np.stack(views), loader.examples(split)


def regress(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, photos: SplitArrays
) -> Predictions:
    """Fits a logistic regression to all views, and predicts from the mean logits of the views.

    Args:
      train: features of training photos, float (views, photos, channels).
      labels: their classes, int (photos,).
      test: features of test photos, float (views, photos, channels).
      photos: the test photos.
    """
    from research.evaluation.scores import Predictions

    fitted = LogisticRegression(max_iter=2000)
    fitted.fit(train.reshape(-1, train.shape[-1]), np.tile(labels, len(train)))
    logits = np.mean([fitted.decision_function(view) for view in test], axis=0)
    return Predictions(photos.names, photos.labels, logits.reshape(len(photos), -1))


def run_draw(
    flags: list[str], backbone: str, weights: str, draw: int, missing: Sequence[tuple[str, int]]
) -> Iterator[dict[str, Any]]:
    """Makes runs of one task and draw in this process, and yields their figures.

    Args:
      flags: of run_train.py that select the photos, and those that follow from them.
      backbone: its name.
      weights: its weights, as for run_train.py.
      draw: number of the draw.
      missing: the row and the photos per class of each run.
    """
    common = [f"--backbone={backbone}", f"--weights={weights}", PRECISION]
    head_alone = parse_config(TrainConfig, [*common, *ROWS["fast"], *flags])
    import_tensorflow()
    import tensorflow as tf

    from research.loop.open_photos import photos_of_run

    tf.get_logger().setLevel("ERROR")  # it warns that each run traces its functions
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints if it prepares the photos
        opened = photos_of_run(head_alone)
        photos = DividedSource(opened.class_names, {"train": all_photos(opened)})  # read once
    tested: tuple[np.ndarray, SplitArrays] | None = None
    for row, per_class in missing:
        begin = time.perf_counter()
        drawn = draw_photos(photos, draw, per_class)
        with contextlib.redirect_stdout(io.StringIO()):  # the caller prints the figures
            if row == REGRESSION:
                if tested is None:  # the same for each number of training photos
                    size = head_alone.evaluation_size
                    larger = dataclasses.replace(head_alone, image_size=size, evaluation_scale=1.0)
                    tested = frozen_features(larger, drawn, "test")
                features, trained = frozen_features(head_alone, drawn, "train")
                predictions = regress(features, trained.labels, *tested)
                figures = {
                    "accuracy": float(predictions.correct.mean()),
                    "log_loss": float(predictions.losses().mean()),
                }
            else:
                config = parse_config(TrainConfig, [*common, *ROWS[row], *flags])
                figures = train_and_evaluate(dataclasses.replace(config, seed=draw), drawn, [""])
        place = {"row": row, "photos": per_class, "draw": draw}
        yield {**place, **figures, "process_seconds": time.perf_counter() - begin}


def settings_of_row(row: str) -> str:
    """Returns what identifies the settings of a row; runs with others are ignored."""
    return REGRESSION_SETTINGS if row == REGRESSION else settings_of(row)


def current_runs(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the runs of these draws, backbone and weights whose rows have the same settings."""
    if not arguments.out.exists():
        return []
    settings = {row: settings_of_row(row) for row in (*ROWS, REGRESSION)}
    weights = hash_of_weights(arguments.weights) if arguments.weights else WEIGHTS
    return [
        run
        for run in map(json.loads, arguments.out.read_text(encoding="utf-8").splitlines())
        if (run["backbone"], run["weights"]) == (arguments.backbone, weights)
        and settings.get(run["row"]) == run["settings"]
        and run["draw"] < arguments.draws
    ]


def run_all(arguments: argparse.Namespace, tasks: Sequence[Task]) -> None:
    """Makes the runs that the file does not have: one process for each task and draw."""
    record_new_settings()
    runs = current_runs(arguments)
    rows = [*arguments.rows, REGRESSION]
    done = {(run["task"], run["row"], run["photos"], run["draw"]) for run in runs}
    missing = {
        (task.name, draw): [
            (row, photos)
            for photos in arguments.photos
            for row in rows
            if (task.name, row, photos, draw) not in done
        ]
        for draw in range(arguments.draws)
        for task in tasks
    }
    pairs = [(row, task) for (task, _), left in missing.items() for row, _ in left]
    print(expected_time(*expected_seconds(pairs, runs), len(pairs), jobs=1), flush=True)
    if arguments.plan:
        return
    flags = {task.name: [*task.photos, *task.others] for task in tasks}
    common = {
        "backbone": arguments.backbone,
        "weights": hash_of_weights(arguments.weights),
    }
    for (task_name, draw), left in missing.items():
        if not left:
            continue
        settings = {"backbone": arguments.backbone, "weights": absolute(arguments.weights)}
        settings |= {"draw": draw, "missing": left}
        command = [sys.executable, "-m", "benchmarks.few_photos", "--run", json.dumps(settings)]
        command += ["--", *flags[task_name]]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                run = {"task": task_name, **common, **json.loads(line)}
                run["settings"] = settings_of_row(run["row"])
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(run) + "\n")
                print(
                    f"{task_name:<14} {run['photos']:>3} photos, draw {draw} {run['row']:<20} "
                    f"accuracy {run['accuracy']:.4f} log loss {run['log_loss']:.4f} "
                    f"{run['process_seconds']:.0f} seconds",
                    flush=True,
                )
        if process.returncode:
            sys.exit(f"draw {draw} of {task_name} failed; the same command continues")


def table(runs: Sequence[Mapping[str, Any]], row: str = "default") -> str:
    """Returns a Markdown table: a row, and its differences from the others with 95 % intervals."""
    others = [name for name in dict.fromkeys(run["row"] for run in runs) if name != row]
    against = " | ".join(f"against {name}" for name in others)
    lines = [
        f"| task | photos per class | draws | accuracy of {row}, % | {against} "
        f"| log loss of {row} | {against} |",
        "| --- " * (5 + 2 * len(others)) + "|",
    ]
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    for task, photos in sorted(
        {(run["task"], run["photos"]) for run in runs}, key=lambda at: (tasks.index(at[0]), at[1])
    ):
        found: dict[str, dict[int, Mapping[str, Any]]] = {}
        for run in runs:
            if (run["task"], run["photos"]) == (task, photos):
                found.setdefault(run["row"], {})[run["draw"]] = run
        own = found.get(row, {})
        if not own:
            continue
        cells = [task, str(photos), str(len(own))]
        for key, scale, digits in (("accuracy", 100, 1), ("log_loss", 1, 3)):
            cells.append(f"{scale * np.mean([run[key] for run in own.values()]):.{digits}f}")
            for other in others:
                shared = own.keys() & found.get(other, {}).keys()
                changes = [scale * (own[at][key] - found[other][at][key]) for at in shared]
                cells.append(difference_text(np.array(changes), digits))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def difference_text(changes: np.ndarray, digits: int) -> str:
    """Returns the mean of paired differences and its interval, in bold if it excludes 0.

    The interval is a t interval over the draws. It says how certain the mean is for these test
    photos.
    """
    if not len(changes):
        return ""
    mean = changes.mean()
    if len(changes) < 2:
        return f"{mean:+.{digits}f}"
    error = changes.std(ddof=1) / np.sqrt(len(changes))
    width = error * stats.t.ppf(0.975, len(changes) - 1)
    text = f"{mean:+.{digits}f} ({mean - width:+.{digits}f} to {mean + width:+.{digits}f})"
    return f"**{text}**" if abs(mean) > width else text


def main() -> None:
    """Makes the missing runs or, with `--report`, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", help="names, or NAME=FOLDER; see benchmarks.ablation")
    parser.add_argument("--data_dir", help="folder of prepared TFDS data sets")
    parser.add_argument("--backbone", default=BACKBONE, help="of all rows (%(default)s)")
    parser.add_argument("--weights", help="Keras weights file of the backbone, or none")
    parser.add_argument("--rows", nargs="*", default=["default", "fast"], help="of the ablation")
    parser.add_argument("--photos", nargs="*", type=int, default=PHOTOS, help="per class")
    parser.add_argument("--draws", type=int, default=DRAWS, help="number of draws (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "few_photos.jsonl")
    parser.add_argument("--plan", action="store_true", help="only print how long it will take")
    parser.add_argument("--report", action="store_true", help="print the table")
    parser.add_argument("--run", help="make the runs of one task and draw, given as JSON")
    parser.add_argument("flags", nargs="*", help="with --run: flags of run_train.py")
    arguments = parser.parse_args()
    if arguments.run:
        settings = json.loads(arguments.run)
        with ended_by_a_line():
            for run in run_draw(arguments.flags, **settings):
                print(json.dumps(run), flush=True)
        return
    tasks = read_tasks(parser, arguments, list(ROWS))
    if arguments.report:
        print(table(current_runs(arguments)))
    else:
        try:
            run_all(arguments, tasks)
        except KeyboardInterrupt:
            sys.exit("stopped; the same command continues")


if __name__ == "__main__":
    main()
