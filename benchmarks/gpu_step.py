"""Photos per second of a training step on a GPU: this project, keras.Model.fit and PyTorch.

python -m benchmarks.gpu_step --peer=torch --peer_python=PYTHON   # 4 to 6 minutes per case

Backbone, photos, optimizer and batch size are the same; `--unfreeze_from=100`, no trunk cache,
input from decoded photos in memory. The steps of this project, of `fit` and, with `--peer=torch`,
of `torch_step.py` with `torch.compile` take turns. A turn is some steps, after which all wait for
the GPU. PyTorch needs no input: its photos are in the memory of the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness import data_flags, data_parser, print_table, seconds_of, write_result
from benchmarks.train_step import (
    TorchSteps,
    add_peer_flags,
    matrix_product_rate,
    peer_flags,
    torch_steps,
)

# Backbone, number format and batch size.
CASES = (
    ("MobileNetV2", "bfloat16", 32),
    ("ResNet101V2", "bfloat16", 32),
    ("MobileNetV2", "bfloat16", 256),
    ("MobileNetV2", "float32", 32),
    ("MobileNetV2", "float16", 32),
)
OURS = {
    "ours, BatchNorm frozen": {"bn_mode": "frozen", "xla": "on"},
    "ours, BatchNorm training": {"bn_mode": "train", "xla": "on"},
    "ours, BatchNorm frozen, no XLA": {"bn_mode": "frozen", "xla": "off"},
}
TORCH = (
    "torch, BatchNorm frozen",
    "torch, BatchNorm training",
    "torch, BatchNorm frozen, CUDA graphs",
)
STEPS_IN_A_TURN, TURNS, WARM_UP_TURNS = 30, 8, 1


def measure(arguments: argparse.Namespace, torch: TorchSteps | None) -> dict[str, Any]:
    """Times the steps of one case in this process; returns a row for each kind of step."""
    from research.system.environment import import_tensorflow

    import_tensorflow()
    import keras
    import tensorflow as tf

    from benchmarks import peers
    from research.system import devices

    gpus = tf.config.list_physical_devices("GPU")
    on_gpu = bool(gpus)
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)  # PyTorch needs some, too
    batch, backbone = arguments.batch_size, arguments.backbone
    devices.set_precision(arguments.precision)
    photos = peers.decoded_photos(arguments)
    steps: dict[str, Callable[..., float]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for kind, settings in OURS.items():
        run = peers.set_up_article(
            arguments,
            backbone=backbone,
            precision=arguments.precision,
            batch_size=batch,
            **settings,
        )
        steps[kind] = peers.training_step(run, run.built.network, run.loader)
        rows[kind] = {"seconds_of_first_step": seconds_of(steps[kind])}
        first = rows[kind]["seconds_of_first_step"]
        print(f"{kind}: first step after {first:.0f} s", file=sys.stderr, flush=True)
    turns: dict[str, list[float]] = {kind: [] for kind in ("fit", *OURS)}
    waiting: dict[str, list[float]] = {kind: [] for kind in OURS}
    memory: dict[str, float] = {}
    count = arguments.steps

    def begin_turn() -> tuple[float, float]:
        if not on_gpu:
            return time.perf_counter(), 0.0
        tf.config.experimental.reset_memory_stats("GPU:0")
        allocated = tf.config.experimental.get_memory_info("GPU:0")["current"]
        return time.perf_counter(), allocated

    def end_turn(kind: str, begin: tuple[float, float]) -> None:
        turns[kind].append((time.perf_counter() - begin[0]) / count)
        if on_gpu:
            memory[kind] = tf.config.experimental.get_memory_info("GPU:0")["peak"] - begin[1]

    class Turns(keras.callbacks.Callback):
        """Makes the turns of the other kinds between those of `fit`."""

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if batch % count == 0:
                self.begin = begin_turn()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 0:
                self.model.optimizer.iterations.numpy()
                first = time.perf_counter() - self.begin[0]
                rows["fit"] = {"seconds_of_first_step": first}
            if (batch + 1) % count:
                return
            self.model.optimizer.iterations.numpy()  # waits for the GPU
            end_turn("fit", self.begin)
            for kind, make_steps in steps.items():
                begin = begin_turn()
                waited = make_steps(count)
                end_turn(kind, begin)
                waiting[kind].append(waited / (count * turns[kind][-1]))
            if torch is None:
                return
            for kind in TORCH:
                turns.setdefault(kind, []).append(torch.ask(kind, count))
                memory[kind] = torch.ask("memory")

    model = peers.fit_model(backbone, 100)
    batches = peers.fit_batches(photos, "train", batch).repeat()
    total = count * (WARM_UP_TURNS + arguments.turns)
    model.fit(batches, steps_per_epoch=total, verbose=0, callbacks=[Turns()])
    for kind, seconds in turns.items():
        kept = seconds[WARM_UP_TURNS:]
        rows.setdefault(kind, {})
        rows[kind]["photos_per_second"] = batch / statistics.median(kept)
        rows[kind]["seconds_per_step"] = kept
        rows[kind]["bytes_of_a_step"] = memory.get(kind)
        if kind in waiting:
            rows[kind]["share_waiting"] = statistics.median(waiting[kind][WARM_UP_TURNS:])
    rates = {"TensorFlow": matrix_product_rate(arguments.precision, 8192)}
    names = [tf.config.experimental.get_device_details(gpu)["device_name"] for gpu in gpus]
    return {"gpus": names, "rows": rows, "matrix_product_rates": rates}


def print_rows(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Prints the figures of a case."""
    print(title)
    base = rows["ours, BatchNorm frozen"]["photos_per_second"]
    print_table(
        [
            {
                "": kind,
                "photos/s": row["photos_per_second"],
                "ours frozen / it": base / row["photos_per_second"],
                "waiting": row.get("share_waiting", "-"),
                "MB": (row["bytes_of_a_step"] or 0) / 1e6,
                "first step, s": row.get("seconds_of_first_step", "-"),
            }
            for kind, row in rows.items()
        ]
    )


def main() -> None:
    """Measures all cases, prints and writes the figures."""
    parser = data_parser(__doc__)
    add_peer_flags(parser)
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)), help="numbers")
    parser.add_argument("--steps", type=int, default=STEPS_IN_A_TURN, help="in a turn")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--backbone", help="measure only this one, in this process; print JSON")
    parser.add_argument("--precision", default="bfloat16", help="with --backbone")
    parser.add_argument("--batch_size", type=int, default=32, help="with --backbone")
    arguments = parser.parse_args()
    if arguments.backbone:
        with torch_steps(arguments, arguments.batch_size) as torch:
            print(json.dumps(measure(arguments, torch)))
        return
    figures: dict[str, Any] = {}
    for backbone, precision, batch in map(CASES.__getitem__, arguments.cases):
        command = [sys.executable, "-m", "benchmarks.gpu_step", *data_flags(arguments)]
        command += [f"--backbone={backbone}", f"--precision={precision}", f"--batch_size={batch}"]
        command += [f"--steps={arguments.steps}", f"--turns={arguments.turns}"]
        command += peer_flags(arguments)
        variables = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
        case = f"{backbone}, {precision}, {batch} photos per step"
        figures[case] = json.loads(done.stdout.splitlines()[-1])
        print_rows(case, figures[case]["rows"])
        write_result("gpu_step", {"cases": figures})


if __name__ == "__main__":
    main()
