"""Seconds that a user waits: for `--help`, for an error in a flag, for the first training step.

python -m benchmarks.start_up          # about 3 minutes on two cores
python -m benchmarks.start_up --hosts  # processor time of each of several hosts, 2 minutes
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.harness import (
    ARTICLE,
    ROOT,
    print_table,
    seconds_to_exit,
    worker_environments,
    write_class_folders,
    write_result,
)

ROUNDS = 3
PHOTOS_OF_HOSTS, HOSTS = 10_000, (1, 2, 4)
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


def write_photos(folder: Path) -> None:
    """Writes JPEG files of 640 x 480 pixels to train on, and a few for validation."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    counts = {"train": PHOTOS_OF_HOSTS, "validation": 64}
    write_class_folders(folder, [buffer.getvalue()], counts, classes=2)


def processor_seconds_of_hosts(photos: Path, folder: Path, count: int) -> list[float]:
    """Returns the processor seconds of each host of a run of two steps with an empty photo cache.

    The hosts share the folder of the cache. They are processes on this machine, so that the time on
    a clock would tell nothing.
    """
    command = [sys.executable, "run_train.py", *ARTICLE, f"--image_folder={photos}"]
    command += ["--backbone=SmallResNet", "--unfreeze_from=stage2", "--trunk_cache=off"]
    command += ["--photo_cache=disk", f"--cache_dir={folder / 'cache'}", "--epochs=1"]
    command += ["--steps_per_epoch=2", f"--ckpt_dir={folder / 'run'}"]
    processes = [
        subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
        for environment in worker_environments(count)
    ]
    seconds = []
    for process in processes:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds.append(usage.ru_utime + usage.ru_stime)
    if codes := [process.returncode for process in processes if process.returncode]:
        raise RuntimeError(f"{command} ended with {codes}")
    return seconds


def measure_hosts() -> None:
    """Measures, prints and writes the processor time of 1, 2 and 4 hosts."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        photos = Path(name) / "photos"
        write_photos(photos)
        for count in HOSTS:
            folder = Path(name) / str(count)
            folder.mkdir()
            seconds = processor_seconds_of_hosts(photos, folder, count)
            rows.append({"hosts": count, "processor seconds": max(seconds), "each": seconds})
    print_table(rows)
    write_result("start_up_of_hosts", {"photos": PHOTOS_OF_HOSTS, "rows": rows})


def main() -> None:
    """Measures, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", action="store_true", help="only processor time of several hosts")
    if parser.parse_args().hosts:
        measure_hosts()
        return
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
