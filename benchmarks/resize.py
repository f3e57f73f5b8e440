"""The effect of `--resize` on accuracy and log loss, by cross-validation and on test photos.

python -m benchmarks.resize --runs=FILE --weights=FILE --data_dir=DIR --image_folders DIR DIR

The photos of `cats_vs_dogs` and of each folder, except their test split, are divided into three
folds. Each recipe is trained with each value of `--resize` on two folds, with a tenth of them for
validation, and evaluated on the third fold and on the test split. Differences from `squash` are
paired by photo and training run; their 95 % intervals are bootstrap intervals over photos.

The losses of each run are appended to the file of `--runs`, so that the program can be stopped and
started again. The table is printed at the end, and written to `benchmarks/results/resize.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ablation import BACKBONE
from benchmarks.ablation_rows import PRECISION, settings_of
from benchmarks.harness import ROOT, data_parser, write_result
from benchmarks.tasks import DividedSource, Fold, hash_of_weights
from flags.command_line import parse_config
from research.data.resizing import RESIZES
from research.settings.train_config import TrainConfig
from research.system.environment import import_tensorflow

FOLDS = 3
RESAMPLES = 2000
RECIPES = ("fast", "default")
TITLES = {"left_out": "left out", "test": "test"}  # of the photos to evaluate on
SPLITS = tuple(TITLES)
FIGURES = {"log loss": 1, "accuracy, %": 100}  # with their scale


def run_fold(flags: list[str], fold: Fold) -> dict[str, dict[str, tuple[float, bool]]]:
    """Trains once in this process, and evaluates on the fold left out and on the test split.

    Returns:
      For each of `SPLITS`: by the name of the photo, its log loss and whether its class is right.
    """
    config = parse_config(TrainConfig, flags)
    import_tensorflow()
    from research.data.open_source import open_source
    from research.evaluation.classifier import Classifier
    from research.evaluation.scores import Predictions
    from research.loop.builder import make_loader
    from research.train import train

    opened = open_source(config.dataset, config.image_folder, config.data_dir)
    photos = {"test": list(opened.examples("test"))}
    for photo in (*opened.examples("train"), *opened.examples("validation")):
        split = fold.split_of(photo.name)
        photos.setdefault("left_out" if split == "test" else split, []).append(photo)
    source = DividedSource(opened.class_names, photos)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        train(parse_config(TrainConfig, [*flags, f"--ckpt_dir={folder}/run"]), source)
        classifier = Classifier(f"{folder}/run")
        loader = make_loader(classifier.config, source)
        for split in SPLITS:
            examples = loader.examples(split)
            logits = classifier.logits(examples)
            predictions = Predictions(examples.names, examples.labels, logits)
            losses = predictions.losses().tolist()
            right = (predictions.predicted == predictions.labels).tolist()
            pairs = [(round(loss, 5), hit) for loss, hit in zip(losses, right, strict=True)]
            found[split] = dict(zip(examples.names, pairs, strict=True))
    return found


def run_all(arguments: argparse.Namespace) -> None:
    """Makes the runs that the file does not have, one after another."""
    done = {key_of(run) for run in read_runs(arguments.runs)}
    weights = hash_of_weights(arguments.weights)
    data = {"cats_vs_dogs": ["--dataset=cats_vs_dogs", f"--data_dir={arguments.data_dir}"]}
    for folder in arguments.image_folders:
        data[Path(folder).name] = [f"--image_folder={Path(folder).absolute()}"]
    turns = itertools.product(range(FOLDS), data, arguments.recipes, RESIZES)
    for index, name, recipe, resize in turns:
        run: dict[str, Any] = {"data": name, "recipe": recipe, "resize": resize, "fold": index}
        run |= {"weights": weights, "settings": settings_of(recipe)}
        if key_of(run) in done:
            continue
        flags = [PRECISION, f"--flagfile={ROOT}/recipes/{recipe}.flags", f"--backbone={BACKBONE}"]
        flags += [f"--weights={Path(arguments.weights).absolute()}", f"--resize={resize}"]
        command = [sys.executable, "-m", "benchmarks.resize", f"--runs={arguments.runs}"]
        command += [f"--run={index}", "--", *flags, *data[name]]
        process = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        run |= json.loads(process.stdout.splitlines()[-1])
        with arguments.runs.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        means = {split: np.mean(list(run[split].values()), axis=0) for split in SPLITS}
        shown = "  ".join(
            f"{split}: log loss {loss:.4f}, accuracy {hits:.4f}"
            for split, (loss, hits) in means.items()
        )
        print(f"{' '.join(map(str, key_of(run)[:4]))}  {shown}", flush=True)


def read_runs(file: Path) -> list[dict[str, Any]]:
    """Returns the finished runs."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return list(map(json.loads, lines))


def key_of(run: dict[str, Any]) -> tuple[Any, ...]:
    """Returns what distinguishes a run from the others."""
    names = ("data", "recipe", "resize", "fold", "weights", "settings")
    return tuple(run[name] for name in names)


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row per data set, recipe, split and `--resize`, compared with `squash`.

    Only the folds that all values of `--resize` have are used.
    """
    rows = []
    groups = dict.fromkeys((run["data"], run["recipe"]) for run in runs)
    for (data, recipe), split, resize in itertools.product(groups, SPLITS, RESIZES):
        own = [run for run in runs if (run["data"], run["recipe"]) == (data, recipe)]
        folds = [{one["fold"] for one in own if one["resize"] == name} for name in RESIZES]
        shared = set.intersection(*folds)
        figures, base = (figures_of(own, name, split, shared) for name in (resize, "squash"))
        if not shared:
            continue
        row = {"data": data, "recipe": recipe, "split": split, "resize": resize}
        row |= {"folds": len(shared), "photos": len(figures)}
        for column, (name, scale) in enumerate(FIGURES.items()):
            row[name] = scale * float(figures[:, column].mean())
            changes = scale * (figures[:, column] - base[:, column])
            row[f"{name}: difference"] = float(changes.mean())
            row[f"{name}: from"], row[f"{name}: to"] = interval_of(changes)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a Markdown table: the figures of `squash`, and the differences of the others."""
    others = [resize for resize in RESIZES if resize != "squash"]
    columns = [f"{name} of squash | {' | '.join(others)}" for name in FIGURES]
    lines = [f"| data | recipe | folds | photos | {' | '.join(columns)} |", "| --- " * 10 + "|"]
    found = {(row["data"], row["recipe"], row["split"], row["resize"]): row for row in rows}
    for data, recipe, split in dict.fromkeys(key[:3] for key in found):
        base = found[data, recipe, split, "squash"]
        cells = [data, recipe, str(base["folds"]), f"{base['photos']:,} {TITLES[split]}"]
        for name, digits in (("log loss", 3), ("accuracy, %", 1)):
            cells.append(f"{base[name]:.{digits}f}")
            for resize in others:
                cells.append(difference_text(found[data, recipe, split, resize], name, digits))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def difference_text(row: dict[str, Any], name: str, digits: int) -> str:
    """Returns a difference and its interval, in bold if the interval excludes 0."""
    mean, low, high = (row[f"{name}: {key}"] for key in ("difference", "from", "to"))
    text = f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    return f"**{text}**" if low * high > 0 else text


def figures_of(runs: list[dict[str, Any]], resize: str, split: str, folds: set[int]) -> np.ndarray:
    """Returns log loss and accuracy of each photo, (photos, 2), averaged over the runs."""
    photos: dict[str, list[tuple[float, bool]]] = {}
    for run in runs:
        if run["resize"] == resize and run["fold"] in folds:
            for name, pair in run[split].items():
                photos.setdefault(name, []).append(pair)
    return np.array([np.mean(photos[name], axis=0) for name in sorted(photos)])


def interval_of(changes: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % bootstrap interval of the mean over photos."""
    drawn = np.random.default_rng(0).integers(0, len(changes), (RESAMPLES, len(changes)))
    low, high = np.percentile(changes[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    """Makes the missing runs, then prints and writes the table."""
    parser = data_parser(__doc__, "cats_vs_dogs")
    parser.add_argument("--image_folders", nargs="*", default=[], help="folders of photos")
    parser.add_argument("--recipes", nargs="*", default=RECIPES, help="recipes to train")
    parser.add_argument("--weights", help=f"Keras weights file of {BACKBONE}")
    parser.add_argument("--runs", type=Path, required=True, help="file of the losses of each run")
    parser.add_argument("--report", action="store_true", help="only print and write the table")
    parser.add_argument("--run", type=int, help="make one run: the index of its fold")
    parser.add_argument("flags", nargs="*", help="with --run: flags of run_train.py")
    arguments = parser.parse_args()
    if arguments.run is not None:
        print(json.dumps(run_fold(arguments.flags, Fold(0, arguments.run, FOLDS))))
        return
    if not arguments.report:
        if not arguments.weights:
            parser.error("--weights is missing")
        run_all(arguments)
    rows = summarize(read_runs(arguments.runs))
    print(table(rows))
    write_result("resize", {"rows": rows})


if __name__ == "__main__":
    main()
