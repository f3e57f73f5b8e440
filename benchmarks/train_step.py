"""Photos per second of a training step: this project and keras.Model.fit, in turns.

python -m benchmarks.train_step        # about 15 minutes on two cores

Backbone, photos, optimizer and batch size are the same; `--unfreeze_from=100`, no trunk cache. Each
process repeats one step of `fit`, one of this project with BatchNorm frozen, and one of this
project with BatchNorm in training mode, as in `fit`. Environments take turns too: `AVX2` and
`no oneDNN` stand for a CPU without AVX-512, where TensorFlow leaves oneDNN off by default and
`run_train.py` switches it on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks.harness import data_flags, data_parser, print_table, seconds_of, write_result

ENVIRONMENTS = {
    "oneDNN": {"TF_ENABLE_ONEDNN_OPTS": "1"},
    "AVX2": {"TF_ENABLE_ONEDNN_OPTS": "1", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "no oneDNN": {"TF_ENABLE_ONEDNN_OPTS": "0"},
}
BACKBONES = {"MobileNetV2": 24, "ResNet101V2": 4}  # steps to time
WARM_UP_STEPS = 3


def matrix_product_rate(size: int = 2048, repeats: int = 10) -> float:
    """Returns the operations per second of a product of two float32 matrices."""
    import tensorflow as tf

    matrix = tf.random.uniform((size, size))
    product = tf.function(lambda: tf.reduce_sum(matrix @ matrix))
    product()
    seconds = [seconds_of(lambda: product().numpy()) for _ in range(repeats)]
    return 2 * size**3 / statistics.median(seconds)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times the steps of one backbone in this process; returns the seconds of each step."""
    from research.system.environment import import_tensorflow

    import_tensorflow()
    import keras

    from benchmarks import peers
    from research.system import devices

    devices.set_precision(devices.resolve_precision(arguments.precision))
    photos = peers.decoded_photos(arguments)
    rate = matrix_product_rate()
    ours: dict[str, Any] = {}
    operations = 0.0
    for mode in () if arguments.fit_alone else ("frozen", "train"):
        run = peers.set_up_article(arguments, bn_mode=mode, backbone=arguments.backbone)
        operations = sum(peers.operations_per_photo(run.built))
        ours[f"ours, BatchNorm {mode}"] = peers.training_step(run, run.built.network, run.loader)
    timed: dict[str, list[float]] = {kind: [] for kind in ("fit", *ours)}

    class Turns(keras.callbacks.Callback):
        """Runs this project's steps between those of `fit`."""

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self.begin = time.perf_counter()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            timed["fit"].append(time.perf_counter() - self.begin)
            for kind, step in ours.items():
                timed[kind].append(seconds_of(step))

    batches = peers.fit_batches(photos, "train").repeat()
    steps = WARM_UP_STEPS + arguments.steps
    peers.fit_model(arguments.backbone, 100).fit(
        batches, steps_per_epoch=steps, verbose=0, callbacks=[Turns()]
    )
    return {
        "seconds": {kind: seconds[WARM_UP_STEPS:] for kind, seconds in timed.items()},
        "operations_per_photo": operations,
        "matrix_product_rate": rate,
    }


def measure_in(
    environment: str, backbone: str, steps: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Calls `measure` in a new process with the variables of an environment."""
    command = [sys.executable, "-m", "benchmarks.train_step", *data_flags(arguments)]
    command += [f"--backbone={backbone}", f"--precision={arguments.precision}"]
    if environment == "no oneDNN":
        command += ["--fit_alone", f"--steps={max(3, steps // 4)}"]
    else:
        command += [f"--steps={steps}"]
    variables = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **ENVIRONMENTS[environment]}
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(backbone: str, steps: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures a backbone in all environments, in turns; returns rates and ratios."""
    runs: dict[str, list[dict[str, Any]]] = {environment: [] for environment in ENVIRONMENTS}
    for _ in range(arguments.rounds):
        for environment, done in runs.items():
            done.append(measure_in(environment, backbone, steps, arguments))
    rates: dict[str, dict[str, float]] = {}
    for environment, done in runs.items():
        rates[environment] = {
            kind: 32 / statistics.median([s for one in done for s in one["seconds"][kind]])
            for kind in done[0]["seconds"]
        }
    ratios = {}
    for environment in ("oneDNN", "AVX2"):
        rate, done = rates[environment], runs[environment]
        for kind in sorted(rate.keys() - {"fit"}):
            ratios[f"{environment}: {kind} / fit"] = rate[kind] / rate["fit"]
        product = statistics.median([one["matrix_product_rate"] for one in done])
        share = rate["ours, BatchNorm frozen"] * done[0]["operations_per_photo"] / product
        rate["share of the matrix-product rate"] = share
    ratios["AVX2: ours, BatchNorm frozen / fit without oneDNN"] = (
        rates["AVX2"]["ours, BatchNorm frozen"] / rates["no oneDNN"]["fit"]
    )
    return {"photos_per_second": rates, "ratios": ratios}


def main() -> None:
    """Measures all backbones, prints and writes the figures."""
    parser = data_parser(__doc__)
    parser.add_argument("--precision", default="float32", help="of both variants (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="processes per environment")
    parser.add_argument("--backbone", help="measure only this one, in this process; print JSON")
    parser.add_argument("--steps", type=int, default=10, help="with --backbone")
    parser.add_argument("--fit_alone", action="store_true", help="with --backbone")
    arguments = parser.parse_args()
    if arguments.backbone:
        print(json.dumps(measure(arguments)))
        return
    figures = {}
    for backbone, steps in BACKBONES.items():
        figures[backbone] = compared = compare(backbone, steps, arguments)
        print(f"{backbone}: photos per second, then ratios of them")
        for environment, rates in compared["photos_per_second"].items():
            print_table([{"environment": environment, **rates}])
        print_table([{"": name, "ratio": ratio} for name, ratio in compared["ratios"].items()])
    write_result("train_step", figures)


if __name__ == "__main__":
    main()
