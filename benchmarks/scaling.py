"""What a training step transfers, stores and computes; and a check with two workers on loopback.

python -m benchmarks.scaling              # the calculated table, one minute
python -m benchmarks.scaling --measure    # and the measurement, about six minutes on two cores
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import ARTICLE, ROOT, print_table, worker_environments, write_result
from research.system.environment import import_tensorflow

ROWS = {
    "ResNet101V2": ("100", "conv5", "0"),
    "VGG16": ("block5", "0"),
    "InceptionV3": ("100",),
    "DenseNet121": ("100",),
    "EfficientNetV2B0": ("100",),
    "MobileNetV2": ("100", "none"),
}
MEASURED = (("MobileNetV2", "100"), ("ResNet50V2", "conv5"), ("VGG16", "block4"))
STEPS = 20


def load_of(backbone: str, unfreeze_from: str) -> dict[str, Any]:
    """Builds a model without weights; returns the load of a step at 160 x 160 pixels, two classes.

    Returns:
      backbone, unfreeze_from: as given.
      trained_parameters: of backbone and head.
      exchanged_bytes: all-reduced by the devices in each step: one float32 per trained parameter.
      checkpoint_bytes: all variables, and RMSprop's slot variable of each trained parameter.
      operations: multiplications and additions per photo: one forward pass of the trunk, one
        forward and two backward passes of the rest.
      trunk_share: the trunk's share of the operations, which a trunk cache saves.
    """
    from benchmarks.peers import operations_per_photo
    from research.loop.builder import build_network
    from research.settings.train_config import TrainConfig

    config = TrainConfig(backbone=backbone, unfreeze_from=unfreeze_from, weights="none")
    built = build_network(config, ("cat", "dog"))
    model = built.network.model
    trained = sum(math.prod(variable.shape) for variable in model.trainable_variables)
    trunk, rest = operations_per_photo(built)
    return {
        "backbone": backbone,
        "unfreeze_from": unfreeze_from,
        "trained_parameters": trained,
        "exchanged_bytes": 4 * trained,
        "checkpoint_bytes": 4 * (model.count_params() + trained),
        "operations": trunk + rest,
        "trunk_share": trunk / (trunk + rest),
    }


def train(folder: Path, backbone: str, unfreeze_from: str, workers: int, steps: int) -> float:
    """Trains two epochs of `steps` steps; returns the seconds per step of the second epoch."""
    run = folder / f"{workers}-{steps}"
    command = [sys.executable, "run_train.py", *ARTICLE, "--dataset=sketches", "--image_size=32"]
    command += [f"--backbone={backbone}", f"--unfreeze_from={unfreeze_from}", "--trunk_cache=off"]
    command += [f"--batch_size={4 * workers}", "--epochs=2", f"--steps_per_epoch={steps}"]
    command += [f"--ckpt_dir={run}"]
    one_thread = {"TF_NUM_INTRAOP_THREADS": "1", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command, env={**environment, **one_thread}, cwd=ROOT, stdout=subprocess.DEVNULL
        )
        for environment in worker_environments(workers)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(f"training {backbone} ended with {codes}")
    rows = (run / "metrics.jsonl").read_text().splitlines()
    return 4 * workers / json.loads(rows[-1])["photos_per_second"]


def measure(backbone: str, unfreeze_from: str) -> dict[str, Any]:
    """Counts the bytes per step on loopback, and times steps of one worker and of two workers."""
    import psutil

    def sent() -> int:
        return psutil.net_io_counters(pernic=True)["lo"].bytes_sent

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = sent()
        train(folder, backbone, unfreeze_from, 2, STEPS // 4)
        short = sent() - before
        alone = train(folder, backbone, unfreeze_from, 1, STEPS)
        before = sent()
        together = train(folder, backbone, unfreeze_from, 2, STEPS)
        long = sent() - before
    predicted = 2 * (2 - 1) * load_of(backbone, unfreeze_from)["exchanged_bytes"]
    counted = (long - short) / (2 * (STEPS - STEPS // 4))
    return {
        "backbone": backbone,
        "unfreeze_from": unfreeze_from,
        "predicted_bytes_per_step": predicted,
        "counted_bytes_per_step": counted,
        "counted_over_predicted": counted / predicted,
        "seconds_per_step_alone": alone,
        "seconds_per_step_together": together,
    }


def main() -> None:
    """Prints and writes the table and, with `--measure`, the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="also train with two workers")
    arguments = parser.parse_args()
    import_tensorflow()
    loads = [load_of(backbone, first) for backbone, layers in ROWS.items() for first in layers]
    figures = {"loads": loads}
    print_table(loads)
    if arguments.measure:
        figures["two_workers_on_loopback"] = [measure(*row) for row in MEASURED]
        print_table(figures["two_workers_on_loopback"])
    write_result("scaling", figures)


if __name__ == "__main__":
    main()
