"""Photos per second of a training step: this project, keras.Model.fit and PyTorch, in turns.

python -m benchmarks.train_step                # about 15 minutes on two cores
python -m benchmarks.train_step --peer=torch   # beside PyTorch and timm; about 15 minutes

Backbone, photos, optimizer and batch size are the same; `--unfreeze_from=100`, no trunk cache. Each
process repeats one step of `fit`, one of this project with BatchNorm frozen, and one of this
project with BatchNorm in training mode, as in `fit`. Environments take turns too: `AVX2` and
`no oneDNN` stand for a CPU without AVX-512, where TensorFlow leaves oneDNN off by default and
`run_train.py` switches it on.

With `--peer=torch`, the steps of `torch_step.py` take turns with these, in float32 and in bfloat16.
`--peer_python` is the interpreter of an environment with torch and timm.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from benchmarks.harness import ROOT, data_flags, data_parser, print_table, seconds_of, write_result

ENVIRONMENTS = {
    "oneDNN": {"TF_ENABLE_ONEDNN_OPTS": "1"},
    "AVX2": {"TF_ENABLE_ONEDNN_OPTS": "1", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "no oneDNN": {"TF_ENABLE_ONEDNN_OPTS": "0"},
}
BACKBONES = {"MobileNetV2": 24, "ResNet101V2": 4}  # steps to time
WARM_UP_STEPS = 3
BATCH_SIZE = 32
PRECISIONS = ("float32", "bfloat16")
TORCH_STEPS = ("torch, BatchNorm frozen", "torch, BatchNorm training")


def matrix_product_rate(precision: str, size: int = 2048, repeats: int = 10) -> float:
    """Returns the operations per second of a product of two square matrices."""
    import tensorflow as tf

    matrix = tf.cast(tf.random.uniform((size, size)), precision)
    product = tf.function(lambda: tf.reduce_sum(matrix @ matrix))
    product()
    seconds = [seconds_of(lambda: product().numpy()) for _ in range(repeats)]
    return 2 * size**3 / statistics.median(seconds)


def add_peer_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that measure beside PyTorch."""
    parser.add_argument("--peer", choices=("torch",), help="measure beside PyTorch")
    parser.add_argument(
        "--peer_python", default=sys.executable, help="interpreter with torch and timm"
    )


def peer_flags(arguments: argparse.Namespace) -> list[str]:
    """Returns the flags that pass the peer, if any, on to a subprocess."""
    if not arguments.peer:
        return []
    return [f"--peer={arguments.peer}", f"--peer_python={arguments.peer_python}"]


class TorchSteps:
    """The process of `torch_step.py`.

    Args:
      process: the running program.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._is_ready = False

    def ask(self, kind: str, count: int = 1) -> float:
        """Returns the seconds of a step, or the answer to another question of `torch_step.py`.

        Args:
          kind: of the step.
          count: number of steps.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count} {kind}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if not self._is_ready:
            self._is_ready = True
            self._answer()
        line = self._process.stdout.readline()
        if not line:
            sys.exit("the program of PyTorch ended; --peer_python needs torch and timm")
        return line


@contextmanager
def torch_steps(
    arguments: argparse.Namespace, batch_size: int = BATCH_SIZE
) -> Iterator[TorchSteps | None]:
    """Starts and ends the process of PyTorch; gives None without `--peer=torch`."""
    if arguments.peer is None:
        yield None
        return
    program = str(ROOT / "benchmarks" / "torch_step.py")
    command = [arguments.peer_python, program, arguments.backbone, arguments.precision]
    command.append(str(batch_size))
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield TorchSteps(process)
        finally:
            process.kill()


def measure(arguments: argparse.Namespace, torch: TorchSteps | None) -> dict[str, Any]:
    """Times the steps of one backbone in this process; returns the seconds of each step."""
    from research.system.environment import import_tensorflow

    import_tensorflow()
    import keras

    from benchmarks import peers
    from research.system import devices

    devices.set_precision(arguments.precision)
    photos = peers.decoded_photos(arguments)
    rates = {"TensorFlow": matrix_product_rate(arguments.precision)}
    ours: dict[str, Any] = {}
    operations = 0.0
    for mode in () if arguments.fit_alone else ("frozen", "train"):
        run = peers.set_up_article(
            arguments, bn_mode=mode, backbone=arguments.backbone, precision=arguments.precision
        )
        operations = sum(peers.operations_per_photo(run.built))
        name = {"frozen": "frozen", "train": "training"}[mode]
        ours[f"ours, BatchNorm {name}"] = peers.training_step(run, run.built.network, run.loader)
    timed: dict[str, list[float]] = {kind: [] for kind in ("fit", *ours)}
    if torch is not None:
        rates["PyTorch"] = torch.ask("matrix product")
        timed |= {kind: [] for kind in TORCH_STEPS}

    class Turns(keras.callbacks.Callback):
        """Makes the other steps between those of `fit`."""

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self.begin = time.perf_counter()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            timed["fit"].append(time.perf_counter() - self.begin)
            for kind, step in ours.items():
                timed[kind].append(seconds_of(step))
            if torch is not None:
                for kind in TORCH_STEPS:
                    timed[kind].append(torch.ask(kind))

    batches = peers.fit_batches(photos, "train").repeat()
    steps = WARM_UP_STEPS + arguments.steps
    peers.fit_model(arguments.backbone, 100).fit(
        batches, steps_per_epoch=steps, verbose=0, callbacks=[Turns()]
    )
    return {
        "seconds": {kind: seconds[WARM_UP_STEPS:] for kind, seconds in timed.items()},
        "operations_per_photo": operations,
        "matrix_product_rates": rates,
    }


def measure_in(
    environment: str, backbone: str, precision: str, steps: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Calls `measure` in a new process with the variables of an environment."""
    command = [sys.executable, "-m", "benchmarks.train_step", *data_flags(arguments)]
    command += [f"--backbone={backbone}", f"--precision={precision}"]
    command += peer_flags(arguments)
    if environment == "no oneDNN":
        command += ["--fit_alone", f"--steps={max(3, steps // 4)}"]
    else:
        command += [f"--steps={steps}"]
    variables = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **ENVIRONMENTS[environment]}
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def rates_of(done: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the photos per second of each kind of step, from its median in all processes."""
    return {
        kind: BATCH_SIZE / statistics.median([s for one in done for s in one["seconds"][kind]])
        for kind in done[0]["seconds"]
    }


def compare(backbone: str, steps: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures a backbone in all environments, in turns; returns rates and ratios."""
    runs: dict[str, list[dict[str, Any]]] = {environment: [] for environment in ENVIRONMENTS}
    for _ in range(arguments.rounds):
        for environment, done in runs.items():
            done.append(measure_in(environment, backbone, arguments.precision, steps, arguments))
    rates = {environment: rates_of(done) for environment, done in runs.items()}
    ratios = {}
    for environment in ("oneDNN", "AVX2"):
        rate, done = rates[environment], runs[environment]
        for kind in sorted(rate.keys() - {"fit"}):
            ratios[f"{environment}: {kind} / fit"] = rate[kind] / rate["fit"]
        product = statistics.median([one["matrix_product_rates"]["TensorFlow"] for one in done])
        share = rate["ours, BatchNorm frozen"] * done[0]["operations_per_photo"] / product
        rate["share of the matrix-product rate"] = share
    ratios["AVX2: ours, BatchNorm frozen / fit without oneDNN"] = (
        rates["AVX2"]["ours, BatchNorm frozen"] / rates["no oneDNN"]["fit"]
    )
    return {"photos_per_second": rates, "ratios": ratios}


def compare_with_torch(
    backbone: str, steps: int, arguments: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Measures a backbone beside PyTorch in each precision, in turns; returns rates and ratios."""
    runs: dict[str, list[dict[str, Any]]] = {precision: [] for precision in PRECISIONS}
    for _ in range(arguments.rounds):
        for precision, done in runs.items():
            done.append(measure_in("oneDNN", backbone, precision, steps, arguments))
    rates = {precision: rates_of(done) for precision, done in runs.items()}
    ratios = {}
    for precision, rate in rates.items():
        for kind in ("frozen", "training"):
            ours, torch = (rate[f"{who}, BatchNorm {kind}"] for who in ("ours", "torch"))
            ratios[f"{precision}: ours / torch, BatchNorm {kind}"] = ours / torch
    for kind in rates["float32"]:
        ratios[f"bfloat16 / float32: {kind}"] = rates["bfloat16"][kind] / rates["float32"][kind]
    products = {
        precision: {
            library: statistics.median([one["matrix_product_rates"][library] for one in done])
            for library in done[0]["matrix_product_rates"]
        }
        for precision, done in runs.items()
    }
    return {"photos_per_second": rates, "ratios": ratios, "matrix_product_rates": products}


def print_figures(backbone: str, compared: Mapping[str, Any]) -> None:
    """Prints the rates and ratios of a backbone."""
    print(f"{backbone}: photos per second, then ratios of them")
    for name, rates in compared["photos_per_second"].items():
        print_table([{"": name, **rates}])
    print_table([{"": name, "ratio": ratio} for name, ratio in compared["ratios"].items()])


def main() -> None:
    """Measures all backbones, prints and writes the figures."""
    parser = data_parser(__doc__)
    parser.add_argument("--precision", default="float32", help="without --peer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="processes per environment")
    add_peer_flags(parser)
    parser.add_argument("--backbone", help="measure only this one, in this process; print JSON")
    parser.add_argument("--steps", type=int, default=10, help="with --backbone")
    parser.add_argument("--fit_alone", action="store_true", help="with --backbone")
    arguments = parser.parse_args()
    if arguments.backbone:
        with torch_steps(arguments) as torch:
            print(json.dumps(measure(arguments, torch)))
        return
    figures = {}
    for backbone, steps in BACKBONES.items():
        comparison = compare_with_torch if arguments.peer else compare
        figures[backbone] = comparison(backbone, steps, arguments)
        print_figures(backbone, figures[backbone])
    write_result("train_step_torch" if arguments.peer else "train_step", figures)


if __name__ == "__main__":
    main()
