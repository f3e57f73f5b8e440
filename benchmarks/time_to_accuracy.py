"""Seconds until a validation accuracy is reached: ours, and the article's recipe through `fit`.

python -m benchmarks.time_to_accuracy --weights=FILE --data_dir=DIR      # about 10 minutes

Whole processes, from their start, imports included, in turns. The clock stops at the end of the
first epoch whose validation accuracy is high enough. `stock` is the environment that a user of this
machine has; `avx2` as on a CPU without AVX-512, where TensorFlow leaves oneDNN off unless it is
asked for, which `run_train.py` does.
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
from pathlib import Path
from typing import Any

from benchmarks.record import write_result

ROOT = Path(__file__).resolve().parents[1]
BACKBONE = "MobileNetV2"
# What the peer and we find in the environment.
ENVIRONMENTS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "stock": ({}, {}),
    "avx2": ({"TF_ENABLE_ONEDNN_OPTS": "0"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}),
}
RECIPES = {
    "head on cached features": (
        "--flagfile=recipes/article.flags",
        "--unfreeze_from=none",
        "--epochs=30",
        "--head_optimizer=adam",
        "--head_learning_rate=1e-2",
    ),
    "article's, by our loop": ("--flagfile=recipes/article.flags", "--bn_mode=frozen"),
}


def first_time(
    command: list[str], variables: dict[str, str], pattern: str, target: float
) -> dict[str, float]:
    """Runs a process until it prints an accuracy of at least `target`, then ends it.

    Args:
      command: of a process that prints a line an epoch.
      variables: added to its environment.
      pattern: finds the validation accuracy in that line.
      target: in [0, 1].

    Returns:
      The seconds and epochs that it took; of all its epochs and `inf` seconds if it never did.
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
            found = re.search(pattern, line)
            if found is None:
                continue
            epochs += 1
            if float(found.group(1)) >= target:
                return {"seconds": time.perf_counter() - begin, "epochs": epochs}
    finally:
        process.kill()
        process.wait()
    return {"seconds": float("inf"), "epochs": epochs}


def fit(arguments: Any) -> None:
    """The article, in this process: prints the validation accuracy of each epoch."""
    import keras
    import tensorflow as tf
    import tensorflow_datasets as tfds

    from benchmarks.peers import fit_model

    keras.utils.set_random_seed(arguments.seed)
    train, validation = tfds.load(
        arguments.dataset,
        split=["train[:80%]", "train[80%:90%]"],
        as_supervised=True,
        data_dir=arguments.data_dir,
    )

    def prepare(image: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.image.resize(tf.cast(image, tf.float32) / 127.5 - 1, (160, 160)), label

    class Tell(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            print(f"validation accuracy {logs['val_binary_accuracy']:.4f}", flush=True)

    fit_model(BACKBONE, 100, arguments.weights).fit(
        train.map(prepare).shuffle(1000).batch(32),
        epochs=10,
        validation_data=validation.map(prepare).batch(32),
        verbose=0,
        callbacks=[Tell()],
    )


def main() -> None:
    """Measures, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="cats_vs_dogs", help="a TFDS name (%(default)s)")
    parser.add_argument("--data_dir", help="where TFDS keeps prepared data sets")
    parser.add_argument("--weights", required=True, help=f"a Keras weights file of {BACKBONE}")
    parser.add_argument("--target", type=float, default=0.98, help="accuracy (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--fit", action="store_true", help="be the peer, print its accuracies")
    parser.add_argument("--seed", type=int, default=0, help="with --fit")
    arguments = parser.parse_args()
    if arguments.fit:
        fit(arguments)
        return
    data = [f"--dataset={arguments.dataset}", f"--weights={Path(arguments.weights).absolute()}"]
    data += [f"--data_dir={Path(arguments.data_dir).absolute()}"] if arguments.data_dir else []
    figures: dict[str, Any] = {"target": arguments.target}
    for environment, (of_fit, of_ours) in ENVIRONMENTS.items():
        timed: dict[str, list[dict[str, float]]] = {kind: [] for kind in ("fit", *RECIPES)}
        for seed in range(arguments.seeds):
            peer = [sys.executable, "-m", "benchmarks.time_to_accuracy", "--fit", *data]
            peer += [f"--seed={seed}"]
            line = r"^validation accuracy ([\d.]+)"
            timed["fit"].append(first_time(peer, of_fit, line, arguments.target))
            for recipe, flags in RECIPES.items():
                ours = [sys.executable, "run_train.py", f"--backbone={BACKBONE}", *data, *flags]
                # The fifth column of an epoch's line.
                line = r"^ +\d+/\d+ +[\d.]+ +[\d.]+ +[\d.]+ +([\d.]+)"
                with tempfile.TemporaryDirectory() as folder:
                    ours += [f"--seed={seed}", f"--ckpt_dir={folder}/run"]
                    ours += [f"--cache_dir={folder}/cache"]  # empty
                    timed[recipe].append(first_time(ours, of_ours, line, arguments.target))
        medians = {
            kind: statistics.median(run["seconds"] for run in runs) for kind, runs in timed.items()
        }
        figures[environment] = {"median_seconds": medians, "runs": timed}
        for kind, seconds in medians.items():
            each = ", ".join(f"{run['seconds']:.1f} s ({run['epochs']})" for run in timed[kind])
            print(
                f"{environment:<8}{kind:<26}{seconds:>7.1f} s{seconds / medians['fit']:>6.2f} of "
                f"fit   seconds (epochs): {each}",
                flush=True,
            )
    print(f"written to {write_result('time_to_accuracy', figures)}")


if __name__ == "__main__":
    main()
