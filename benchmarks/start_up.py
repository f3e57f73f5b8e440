"""How long a person waits: for `--help`, for a flag's error, for the first training step.

python -m benchmarks.start_up          # about 3 minutes on two cores
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import write_result

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 3
BACKBONES = {"SmallResNet": "stage2", "MobileNetV2": "100", "ResNet101V2": "100"}


def seconds_of(*flags: str, code: int) -> float:
    """Returns the seconds that run_train.py takes to end with this exit code."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "run_train.py", *flags], cwd=ROOT, capture_output=True)
    taken = time.perf_counter() - begin
    if done.returncode != code:
        raise RuntimeError(f"{flags} ended with {done.returncode}: {done.stderr!r}")
    return taken


def seconds_to_first_step(folder: Path, backbone: str) -> float:
    """Returns the seconds until the checkpoint after the first step is on disk."""
    run = folder / f"{backbone}-{time.monotonic_ns()}"
    command = [sys.executable, "run_train.py", "--dataset=sketches", f"--backbone={backbone}"]
    command += ["--flagfile=recipes/article.flags", "--bn_mode=frozen"]
    command += ["--weights=none", "--checkpoint_every=1", "--steps_per_epoch=2", "--epochs=1"]
    command += [f"--ckpt_dir={run}", f"--unfreeze_from={BACKBONES[backbone]}"]
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


def import_seconds() -> float:
    """Returns the seconds that Python takes to import TensorFlow and TFDS, for comparison."""
    begin = time.perf_counter()
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    code = "import tensorflow, tensorflow_datasets"
    subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    return time.perf_counter() - begin


def main() -> None:
    """Measures, prints and writes the figures."""
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        seconds_to_first_step(Path(name), "SmallResNet")  # draws the sketches if they are missing
        for _ in range(ROUNDS):
            for what, seconds in (
                ("--help", seconds_of("--help", code=0)),
                ("flag error", seconds_of("--epochs=many", code=2)),
                ("bare imports", import_seconds()),
                *(
                    (f"first step of {backbone}", seconds_to_first_step(Path(name), backbone))
                    for backbone in BACKBONES
                ),
            ):
                figures.setdefault(what, []).append(seconds)
    medians = {what: statistics.median(seconds) for what, seconds in figures.items()}
    for what, seconds in medians.items():
        print(f"{what:<28}{seconds:>8.2f} s")
    print(f"written to {write_result('start_up', {'seconds': medians})}")


if __name__ == "__main__":
    main()
