"""Seconds to a validation accuracy: this project, and the article's recipe with `fit`.

python -m benchmarks.time_to_accuracy --weights=FILE --data_dir=DIR      # about 10 minutes

Whole processes are timed, imports included, in turns. The clock stops at the end of the first epoch
that reaches the accuracy. `stock` uses the environment as it is. `avx2` stands for a CPU without
AVX-512, where TensorFlow leaves oneDNN off by default and `run_train.py` switches it on.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.harness import ARTICLE, ROOT, data_flags, data_parser, print_table, write_result

BACKBONE = "MobileNetV2"
# Environment variables of `fit` and of this project.
ENVIRONMENTS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "stock": ({}, {}),
    "avx2": ({"TF_ENABLE_ONEDNN_OPTS": "0"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}),
}
BFLOAT16 = "--precision=bfloat16"  # TensorFlow cannot combine it with a restricted oneDNN
HEAD_ALONE = (
    "--unfreeze_from=none",
    "--epochs=30",
    "--head_optimizer=adam",
    "--head_learning_rate=1e-2",
)
RECIPES = {
    "head on cached features": HEAD_ALONE,
    "head on cached features, bfloat16": (*HEAD_ALONE, BFLOAT16),
    "article's, by our loop": (),
}
# Regular expressions that find the validation accuracy in a printed line. In the lines of
# run_train.py, it is the fifth column.
FIT_LINE = r"^validation accuracy ([\d.]+)"
OUR_LINE = r"^ +\d+/\d+ +[\d.]+ +[\d.]+ +[\d.]+ +([\d.]+)"


def first_time(
    command: list[str], variables: dict[str, str], pattern: str, target: float
) -> dict[str, float]:
    """Runs a process until it prints an accuracy of at least `target`, then kills it.

    Args:
      command: of a process that prints one line per epoch.
      variables: added to its environment.
      pattern: regular expression that finds the validation accuracy in that line.
      target: in [0, 1].

    Returns:
      The seconds and epochs needed; infinite seconds if no epoch reached the target.
    """
    begin = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    epochs = 0
    try:
        for line in process.stdout:
            if found := re.search(pattern, line):
                epochs += 1
                if float(found[1]) >= target:
                    return {"seconds": time.perf_counter() - begin, "epochs": epochs}
    finally:
        process.kill()
        process.wait()
    return {"seconds": float("inf"), "epochs": epochs}


def fit(arguments: argparse.Namespace) -> None:
    """Trains with `fit` in this process and prints the validation accuracy of each epoch."""
    import keras
    import tensorflow_datasets as tfds

    from benchmarks.peers import fit_model, scale_and_resize

    keras.utils.set_random_seed(arguments.seed)
    train, validation = tfds.load(
        arguments.dataset,
        split=["train[:80%]", "train[80%:90%]"],
        as_supervised=True,
        data_dir=arguments.data_dir,
    )

    class PrintAccuracy(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            print(f"validation accuracy {logs['val_binary_accuracy']:.4f}", flush=True)

    fit_model(BACKBONE, 100, arguments.weights).fit(
        train.map(scale_and_resize).shuffle(1000).batch(32),
        epochs=10,
        validation_data=validation.map(scale_and_resize).batch(32),
        verbose=0,
        callbacks=[PrintAccuracy()],
    )


def compare(arguments: argparse.Namespace, environment: str) -> dict[str, list[dict[str, float]]]:
    """Runs `fit` and each recipe in turns, with each seed; returns the figures of their runs."""
    fit_variables, our_variables = ENVIRONMENTS[environment]
    recipes = {
        name: flags
        for name, flags in RECIPES.items()
        if BFLOAT16 not in flags or "ONEDNN_MAX_CPU_ISA" not in our_variables
    }
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in ("fit", *recipes)}
    for seed in range(arguments.seeds):
        common = [*data_flags(arguments), f"--seed={seed}"]
        peer = [sys.executable, "-m", "benchmarks.time_to_accuracy", "--fit", *common]
        runs["fit"].append(first_time(peer, fit_variables, FIT_LINE, arguments.target))
        for recipe, flags in recipes.items():
            ours = [sys.executable, "run_train.py", *ARTICLE, *flags, *common]
            with tempfile.TemporaryDirectory() as folder:
                ours += [f"--backbone={BACKBONE}", f"--ckpt_dir={folder}/run"]
                ours += [f"--cache_dir={folder}/cache"]  # empty
                runs[recipe].append(first_time(ours, our_variables, OUR_LINE, arguments.target))
    return runs


def main() -> None:
    """Measures, prints and writes the figures."""
    parser = data_parser(__doc__, "cats_vs_dogs")
    parser.add_argument("--weights", required=True, help=f"Keras weights file of {BACKBONE}")
    parser.add_argument("--target", type=float, default=0.98, help="accuracy (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (%(default)s)")
    parser.add_argument("--fit", action="store_true", help="run `fit` and print its accuracies")
    parser.add_argument("--seed", type=int, default=0, help="with --fit")
    arguments = parser.parse_args()
    if arguments.fit:
        fit(arguments)
        return
    figures: dict[str, Any] = {"target": arguments.target}
    for environment in ENVIRONMENTS:
        runs = compare(arguments, environment)
        medians = {kind: statistics.median(run["seconds"] for run in runs[kind]) for kind in runs}
        figures[environment] = {"median_seconds": medians, "runs": runs}
        print_table(
            [
                {
                    "environment": environment,
                    "recipe": kind,
                    "median seconds": medians[kind],
                    "relative to fit": medians[kind] / medians["fit"],
                    "seconds (epochs)": ", ".join(
                        f"{run['seconds']:.1f} ({run['epochs']})" for run in runs[kind]
                    ),
                }
                for kind in runs
            ]
        )
    write_result("time_to_accuracy", figures)


if __name__ == "__main__":
    main()
