"""Photos a second of a training step, ours against keras.Model.fit, step by step in turns.

python -m benchmarks.train_step        # about 15 minutes on two cores

Same backbone, photos, optimizer and batch size; `--unfreeze_from=100`, no trunk cache. Each process
makes a step of `fit`, one of ours with BatchNorm frozen, one of ours with BatchNorm in training
mode (as `fit` does it), and again. Environments take turns too: `stock` as a user has it, `avx2` as
on a CPU without AVX-512, where TensorFlow leaves oneDNN off for `fit`, and we switch it on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks.record import write_result

ENVIRONMENTS = {
    "oneDNN": {"TF_ENABLE_ONEDNN_OPTS": "1"},
    "AVX2": {"TF_ENABLE_ONEDNN_OPTS": "1", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "no oneDNN": {"TF_ENABLE_ONEDNN_OPTS": "0"},
}
BACKBONES = {"MobileNetV2": 24, "ResNet101V2": 4}  # and the steps that are timed of each


def matrix_product_rate(size: int = 2048, repeats: int = 10) -> float:
    """Returns the operations a second of a product of two float32 matrices."""
    import tensorflow as tf

    matrix = tf.random.uniform((size, size))
    product = tf.function(lambda: tf.reduce_sum(matrix @ matrix))
    product()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        product().numpy()
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / statistics.median(seconds)


def measure(backbone: str, steps: int, with_ours: bool, arguments: Any) -> dict[str, Any]:
    """Times steps in turns in this process; returns the seconds of each kind's steps."""
    from research.system.environment import import_tensorflow

    import_tensorflow()
    import keras

    from benchmarks import peers
    from research.models.cost import multiplications
    from research.system import devices as runtime

    runtime.set_precision(runtime.resolve_precision(arguments.precision))
    photos = peers.photos_of(arguments)
    rate = matrix_product_rate()
    kinds: dict[str, Any] = {}
    operations = 0.0
    for mode in ("frozen", "train") if with_ours else ():
        config = dataclasses.replace(peers.article(mode), backbone=backbone)
        ours = peers.our_run(config, photos)
        layers, first = ours.built.network.model.backbone.layers, ours.built.first_trainable
        operations = 2.0 * sum(map(multiplications, layers[:first]))
        operations += 6.0 * sum(map(multiplications, layers[first:]))
        learner, batches = ours.learner(), peers.endless(photos)
        kinds[f"ours, BatchNorm {mode}"] = lambda learner=learner, batches=batches: (
            learner.train_steps(batches, 1)
        )
    timed: dict[str, list[float]] = {"fit": [], **{kind: [] for kind in kinds}}

    class Turns(keras.callbacks.Callback):
        """Makes the other steps between those of `fit`."""

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self.begin = time.perf_counter()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            timed["fit"].append(time.perf_counter() - self.begin)
            for kind, step in kinds.items():
                begin = time.perf_counter()
                step()
                timed[kind].append(time.perf_counter() - begin)

    warm_up = 3
    batches = peers.fit_batches(photos, "train").repeat()
    peers.fit_model(backbone, 100).fit(
        batches, steps_per_epoch=warm_up + steps, verbose=0, callbacks=[Turns()]
    )
    return {
        "seconds": {kind: seconds[warm_up:] for kind, seconds in timed.items()},
        "operations_a_photo": operations,
        "matrix_product_rate": rate,
    }


def run(backbone: str, steps: int, environment: str, arguments: Any) -> dict[str, Any]:
    """Measures in a process of its own, in an environment of its own."""
    command = [sys.executable, "-m", "benchmarks.train_step", f"--backbone={backbone}"]
    command += [f"--steps={steps}", f"--dataset={arguments.dataset}"]
    command += [f"--precision={arguments.precision}"]
    command += [f"--data_dir={arguments.data_dir}"] if arguments.data_dir else []
    command += ["--fit_alone"] if environment == "no oneDNN" else []
    variables = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **ENVIRONMENTS[environment]}
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(backbone: str, steps: int, rounds: int, arguments: Any) -> dict[str, Any]:
    """Measures in all environments, in turns, and returns rates and ratios."""
    runs: dict[str, list[dict[str, Any]]] = {environment: [] for environment in ENVIRONMENTS}
    for _ in range(rounds):
        for environment, done in runs.items():
            alone = max(3, steps // 4) if environment == "no oneDNN" else steps
            done.append(run(backbone, alone, environment, arguments))
    rates: dict[str, dict[str, float]] = {}
    for environment, done in runs.items():
        rates[environment] = {
            kind: 32 / statistics.median([s for one in done for s in one["seconds"][kind]])
            for kind in done[0]["seconds"]
        }
    for environment in ("oneDNN", "AVX2"):
        product = statistics.median([one["matrix_product_rate"] for one in runs[environment]])
        operations = runs[environment][0]["operations_a_photo"]
        share = rates[environment]["ours, BatchNorm frozen"] * operations / product
        rates[environment]["share of the matrix-product rate"] = share
    full, avx2, bare = rates.values()
    ratios = {
        f"{environment}: {kind} / fit": of[kind] / of["fit"]
        for environment, of in (("oneDNN", full), ("AVX2", avx2))
        for kind in of
        if kind.startswith("ours")
    }
    ratios["AVX2: ours, BatchNorm frozen / fit without oneDNN"] = (
        avx2["ours, BatchNorm frozen"] / bare["fit"]
    )
    return {"photos_per_second": rates, "ratios": ratios}


def main() -> None:
    """Measures all backbones, prints and writes the figures."""
    from benchmarks import arguments as data

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data.add_data_arguments(parser)
    parser.add_argument("--precision", default="float32", help="of both (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="how often each process runs")
    parser.add_argument("--backbone", help="measure this one in this process, print JSON")
    parser.add_argument("--steps", type=int, default=10, help="with --backbone")
    parser.add_argument("--fit_alone", action="store_true", help="with --backbone")
    arguments = parser.parse_args()
    if arguments.backbone:
        ours = not arguments.fit_alone
        print(json.dumps(measure(arguments.backbone, arguments.steps, ours, arguments)))
        return
    figures = {}
    for backbone, steps in BACKBONES.items():
        figures[backbone] = compare(backbone, steps, arguments.rounds, arguments)
        print(f"{backbone}, photos a second")
        for environment, rates in figures[backbone]["photos_per_second"].items():
            for kind, rate in rates.items():
                print(f"  {environment + ': ' + kind:<58}{rate:>10.2f}")
        print("  ratios")
        for name, ratio in figures[backbone]["ratios"].items():
            print(f"  {name:<58}{ratio:>10.2f}", flush=True)
    print(f"written to {write_result('train_step', figures)}")


if __name__ == "__main__":
    main()
