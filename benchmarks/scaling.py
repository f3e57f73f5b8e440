"""What a training step sends, stores and computes; and two workers on loopback as a check.

python -m benchmarks.scaling              # the table on paper, a minute
python -m benchmarks.scaling --measure    # and the measurement, about six minutes on two cores
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.record import write_result
from research.system.environment import import_tensorflow

ROOT = Path(__file__).resolve().parents[1]
ROWS = (
    ("ResNet101V2", "100"),
    ("ResNet101V2", "conv5"),
    ("ResNet101V2", "0"),
    ("VGG16", "block5"),
    ("VGG16", "0"),
    ("InceptionV3", "100"),
    ("DenseNet121", "100"),
    ("EfficientNetV2B0", "100"),
    ("MobileNetV2", "100"),
    ("MobileNetV2", "none"),
)
MEASURED = (("MobileNetV2", "100"), ("ResNet50V2", "conv5"), ("VGG16", "block4"))
STEPS = 20


@dataclasses.dataclass(frozen=True)
class Load:
    """What one step of fine-tuning means, at 160 x 160 pixels and two classes.

    Attributes:
      backbone: its name.
      unfreeze_from: the first trainable layer.
      trained_parameters: of backbone and head.
      exchanged_bytes: what the devices add up in a step: a float32 a trained parameter.
      checkpoint_bytes: all variables, and RMSprop's one number a trained parameter.
      operations: multiplications and additions a photo: one forward pass of the trunk, one forward
        and two backward of the rest.
      trunk_share: the trunk's share of them, which a cached trunk spares.
    """

    backbone: str
    unfreeze_from: str
    trained_parameters: int
    exchanged_bytes: int
    checkpoint_bytes: int
    operations: float
    trunk_share: float


def load_of(backbone: str, unfreeze_from: str) -> Load:
    """Builds a model without weights and counts."""
    from research.models.cost import multiplications
    from research.settings.train_config import TrainConfig
    from research.training.builder import build_network

    config = TrainConfig(backbone=backbone, unfreeze_from=unfreeze_from, weights="none")
    built = build_network(config, ("cat", "dog"))
    model, first = built.network.model, built.first_trainable
    trained = sum(math.prod(variable.shape) for variable in model.trainable_variables)
    layers = model.backbone.layers
    below = 2.0 * sum(map(multiplications, layers[:first]))
    above = 6.0 * sum(map(multiplications, layers[first:]))
    return Load(
        backbone,
        unfreeze_from,
        trained,
        exchanged_bytes=4 * trained,
        checkpoint_bytes=4 * (model.count_params() + trained),
        operations=below + above,
        trunk_share=below / (below + above),
    )


def train(folder: Path, backbone: str, unfreeze_from: str, workers: int, steps: int) -> float:
    """Trains two epochs of `steps` steps and returns the seconds a step of the second."""
    sockets = [socket.socket() for _ in range(workers)]
    for found in sockets:
        found.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{found.getsockname()[1]}" for found in sockets]
    for found in sockets:
        found.close()
    processes = []
    for index in range(workers):
        task = {"type": "worker", "index": index}
        environment = {**os.environ, "TF_NUM_INTRAOP_THREADS": "1", "OMP_NUM_THREADS": "1"}
        if workers > 1:
            cluster = {"cluster": {"worker": addresses}, "task": task}
            environment["TF_CONFIG"] = json.dumps(cluster)
        command = [
            *(sys.executable, str(ROOT / "run_train.py")),
            f"--flagfile={ROOT / 'recipes' / 'article.flags'}",
            *("--dataset=sketches", "--bn_mode=frozen"),
            *(f"--backbone={backbone}", f"--unfreeze_from={unfreeze_from}", "--weights=none"),
            *("--image_size=32", f"--batch_size={4 * workers}", "--epochs=2", "--trunk_cache=off"),
            *(f"--steps_per_epoch={steps}", f"--ckpt_dir={folder / f'{workers}-{steps}'}"),
        ]
        processes.append(
            subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.DEVNULL)
        )
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(f"training {backbone} ended with {codes}")
    rows = (folder / f"{workers}-{steps}" / "metrics.jsonl").read_text().splitlines()
    return 4 * workers / json.loads(rows[-1])["photos_per_second"]


def measure(backbone: str, unfreeze_from: str) -> dict[str, float | str]:
    """Counts the bytes on loopback a step, and the time that a second worker costs."""
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
    predicted = 2 * (2 - 1) * load_of(backbone, unfreeze_from).exchanged_bytes
    counted = (long - short) / (2 * (STEPS - STEPS // 4))
    return {
        "backbone": backbone,
        "unfreeze_from": unfreeze_from,
        "predicted_bytes_a_step": predicted,
        "counted_bytes_a_step": counted,
        "counted_over_predicted": counted / predicted,
        "seconds_a_step_alone": alone,
        "seconds_a_step_together": together,
    }


def main() -> None:
    """Prints and writes the table, and the measurement if asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="train with two workers too")
    arguments = parser.parse_args()
    import_tensorflow()
    loads = [load_of(*row) for row in ROWS]
    print(
        f"{'backbone':<17}{'from':>7}{'trained':>12}{'exchanged':>11}{'checkpoint':>12}"
        f"{'a photo':>14}{'trunk':>7}"
    )
    for load in loads:
        print(
            f"{load.backbone:<17}{load.unfreeze_from:>7}{load.trained_parameters:>12,}"
            f"{load.exchanged_bytes / 1e6:>8.1f} MB{load.checkpoint_bytes / 1e6:>9.1f} MB"
            f"{load.operations / 1e9:>8.2f} GFLOP{load.trunk_share:>7.0%}",
            flush=True,
        )
    figures: dict[str, object] = {"loads": [dataclasses.asdict(load) for load in loads]}
    if arguments.measure:
        measured = [measure(*row) for row in MEASURED]
        for row in measured:
            print(
                f"{row['backbone']:<17}{row['unfreeze_from']:>7}: "
                f"{row['counted_bytes_a_step'] / 1e6:.2f} MB a step on loopback, "  # type: ignore[operator]
                f"{row['counted_over_predicted']:.3f} of the formula; "
                f"{row['seconds_a_step_alone']:.3f} s alone, "
                f"{row['seconds_a_step_together']:.3f} s together"
            )
        figures["two_workers_on_loopback"] = measured
    print(f"written to {write_result('scaling', figures)}")


if __name__ == "__main__":
    main()
