"""Seconds that a user waits: for `--help`, for an error in a flag, for the first training step.

python -m benchmarks.start_up          # about 3 minutes on two cores
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import ARTICLE, ROOT, print_table, seconds_to_exit, write_result

ROUNDS = 3
BACKBONES = {"SmallResNet": "stage2", "MobileNetV2": "100", "ResNet101V2": "100"}


def seconds_to_first_step(folder: str, backbone: str) -> float:
    """Returns the seconds until the checkpoint after the first step is on disk."""
    run = Path(folder) / f"{backbone}-{time.monotonic_ns()}"
    command = [sys.executable, "run_train.py", *ARTICLE, "--dataset=sketches"]
    command += ["--checkpoint_every=1", "--steps_per_epoch=2", "--epochs=1", f"--ckpt_dir={run}"]
    command += [f"--backbone={backbone}", f"--unfreeze_from={BACKBONES[backbone]}"]
    first = run / "checkpoints" / "latest" / "step-1.index"
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while not first.exists():
            if process.poll() is not None:
                raise RuntimeError(f"{command} ended with {process.returncode}")
            time.sleep(0.01)
        return time.perf_counter() - begin
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Measures, prints and writes the figures."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        seconds_to_first_step(folder, "SmallResNet")  # prepares the sketches if they are missing
        for _ in range(ROUNDS):
            seconds = {
                "--help": seconds_to_exit("run_train.py", "--help"),
                "flag error": seconds_to_exit("run_train.py", "--epochs=many", code=2),
                "bare imports": seconds_to_exit("-c", "import tensorflow, tensorflow_datasets"),
            }
            for backbone in BACKBONES:
                seconds[f"first step of {backbone}"] = seconds_to_first_step(folder, backbone)
            rounds.append(seconds)
    medians = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    print_table([{"start": name, "seconds": seconds} for name, seconds in medians.items()])
    write_result("start_up", {"seconds": medians})


if __name__ == "__main__":
    main()
