"""Measures whether memory and disk use stay bounded in long runs.

python -m tests.reliability.long_run            # about 5 minutes on two cores
python -m tests.reliability.long_run --steps=2000
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.harness import anonymous_bytes, write_result
from tests.helpers import SMALL_RUN, draw_photos, script_environment
from tests.launcher import ROOT
from tests.reliability.consistency import event_bytes, file_sizes

PHOTOS_PER_CLASS = 80
STEPS_PER_EPOCH = 30  # few, so that memory left by each epoch is measurable
WARM_UP = 0.5  # share of the run in which memory reaches its normal size
SETTINGS = {
    "head on features, 100 steps a call": ("--unfreeze_from=none", "--trunk_cache=memory"),
    "layers on cached activations": ("--unfreeze_from=stage3", "--trunk_cache=memory"),
    "photos, augmented": (
        *("--unfreeze_from=stage3", "--trunk_cache=off", "--random_crop_area=0.5"),
        *("--mixup=0.2", "--rand_augment=5", "--colour_jitter=0.2"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """Resource use at a step: anonymous memory, files except event files, and event files."""

    step: int
    memory: int
    files: int
    file_bytes: int
    event_bytes: int


def sample(pid: int, step: int, run: Path) -> Sample:
    """Returns the resource use of a running process and its run's folder."""
    sizes = [size for file, size in file_sizes(run) if "events" not in file.parts]
    return Sample(step, anonymous_bytes(pid), len(sizes), sum(sizes), event_bytes(run)[1])


def last_step(run: Path) -> int:
    """Returns the step of the last complete checkpoint; 0 before the first."""
    try:
        pointer = (run / "checkpoints" / "latest" / "checkpoint").read_text(encoding="utf-8")
    except OSError:
        return 0
    named = next(line for line in pointer.splitlines() if line.startswith("model_checkpoint_path"))
    return int(re.findall(r"step-(\d+)", named)[0])


def watch(folder: Path, photos: Path, steps: int, flags: tuple[str, ...]) -> list[Sample]:
    """Trains for at least `steps` steps, and samples at each checkpoint that is noticed."""
    epochs = math.ceil(steps / STEPS_PER_EPOCH)
    run, log = folder / "run", folder / "log.txt"
    arguments = [str(ROOT / "run_train.py"), *SMALL_RUN, f"--image_folder={photos}", *flags]
    arguments += ["--batch_size=4", f"--steps_per_epoch={STEPS_PER_EPOCH}", f"--epochs={epochs}"]
    arguments += ["--weight_averaging=0.9"]
    arguments += ["--checkpoint_every=20", "--ckpt_dir=run"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env=script_environment(folder),
            stdout=file,
            stderr=file,
        )
    samples: list[Sample] = []
    try:
        while process.poll() is None:
            step = last_step(run)
            if step > (samples[-1].step if samples else 0):
                samples.append(sample(process.pid, step, run))
            time.sleep(0.005)
    finally:
        process.kill()
    if process.wait():
        raise RuntimeError(log.read_text(encoding="utf-8")[-2000:])
    return samples


def describe(samples: list[Sample]) -> dict[str, Any]:
    """Fits straight lines to the samples after the warm-up.

    The standard error of the slope assumes independent samples. Successive samples are correlated,
    so that it tends to be too small.
    """
    later = [one for one in samples if one.step >= WARM_UP * samples[-1].step]
    steps = np.array([one.step for one in later])
    memory = stats.linregress(steps, [one.memory / 1e6 for one in later])
    events = stats.linregress(steps, [one.event_bytes for one in later])
    return {
        "steps": samples[-1].step,
        "samples": len(later),
        "megabytes": later[-1].memory / 1e6,
        "steps_per_epoch": STEPS_PER_EPOCH,
        "megabytes_per_1000_steps": 1000 * memory.slope,
        "standard_error": 1000 * memory.stderr,
        "kilobytes_per_epoch": 1000 * STEPS_PER_EPOCH * memory.slope,
        "event_bytes_per_step": events.slope,
        "files_after_warm_up": [min(one.files for one in later), max(one.files for one in later)],
        "max_file_bytes": max(one.file_bytes for one in later),
    }


def main() -> None:
    """Measures, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000, help="steps of each run")
    arguments = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as name:
        photos = Path(name) / "photos"
        photos.mkdir()
        draw_photos(photos, PHOTOS_PER_CLASS)
        for number, (setting, flags) in enumerate(SETTINGS.items()):
            folder = Path(name) / str(number)
            folder.mkdir()
            figures[setting] = one = describe(watch(folder, photos, arguments.steps, flags))
            print(
                f"{setting:<36}{one['steps']:>7,} steps{one['megabytes']:>7.0f} MB"
                f"{one['megabytes_per_1000_steps']:>+9.3f} +- {one['standard_error']:.3f} MB and "
                f"{one['event_bytes_per_step']:.0f} KB of events per 1,000 steps; files "
                f"{one['files_after_warm_up']}, {one['max_file_bytes'] / 1e6:.1f} MB",
                flush=True,
            )
    write_result("long_run", {"runs": figures})


if __name__ == "__main__":
    main()
