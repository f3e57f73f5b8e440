"""Peak memory of a run, and its growth with the number of photos.

python -m benchmarks.memory                # about 3 minutes on two cores
python -m benchmarks.memory --recompute    # with and without --recompute=blocks, about 20 minutes
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import ARTICLE, ROOT, anonymous_bytes, print_table, write_result
from research.data.built_in.sketches import sketch_jpeg

IMAGE_SIZE = 96
PHOTOS = (500, 2000, 8000)
SETTINGS = {
    "decoded photos": ("--unfreeze_from=0", "--trunk_cache=off"),
    "cached activations": ("--unfreeze_from=stage2", "--trunk_cache=memory"),
    "cached activations on disk": ("--unfreeze_from=stage2", "--trunk_cache=disk"),
}

RECOMPUTED = tuple(
    (backbone, unfreeze_from)
    for backbone in ("EfficientNetV2B0", "ResNet101V2")
    for unfreeze_from in ("0", "100")
)
ROUNDS = 2
# Of 32 photos of 160 x 160 pixels. The steps of the first epoch compile the network.
STEPS = (
    *("--dataset=sketches", "--trunk_cache=off", "--precision=float32"),
    *("--epochs=2", "--steps_per_epoch=2"),
)


def draw_photos(folder: Path, photos: int) -> None:
    """Draws this many photos, alternately into the subfolders cat and dog."""
    for index in range(photos):
        name = ("cat", "dog")[index % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{index:06}.jpg").write_bytes(sketch_jpeg(index % 2, index % 500))


def train(run: Path, *flags: str) -> int:
    """Trains a run in a new process; returns its peak anonymous memory in bytes (Linux)."""
    command = [sys.executable, "run_train.py", *ARTICLE, f"--ckpt_dir={run}", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return peak


def measure_recompute() -> list[dict[str, Any]]:
    """Measures runs with and without `--recompute=blocks`, in turns; see `RECOMPUTED`.

    Returns:
      A row per backbone and first trained layer: the median peaks in bytes, the medians of the
      seconds per step in the second epoch, and the ratios of both in each turn.
    """
    rows = []
    for backbone, unfreeze_from in RECOMPUTED:
        peaks: dict[str, list[int]] = {"none": [], "blocks": []}
        seconds: dict[str, list[float]] = {"none": [], "blocks": []}
        for _ in range(ROUNDS):
            for recompute in peaks:
                with tempfile.TemporaryDirectory() as folder:
                    run = Path(folder) / "run"
                    flags = [f"--backbone={backbone}", f"--unfreeze_from={unfreeze_from}"]
                    flags += [*STEPS, f"--recompute={recompute}"]
                    peaks[recompute].append(train(run, *flags))
                    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
                    seconds[recompute].append(32 / last["photos_per_second"])
        row: dict[str, Any] = {"backbone": backbone, "unfreeze_from": unfreeze_from}
        for name, found in (("peak_bytes", peaks), ("seconds_per_step", seconds)):
            row |= {f"{name}_{key}": statistics.median(values) for key, values in found.items()}
            pairs = zip(found["none"], found["blocks"], strict=True)
            row[f"{name}_ratios"] = [round(blocks / none, 3) for none, blocks in pairs]
        rows.append(row)
        print_table([row])
    return rows


def measure_photos() -> list[dict[str, Any]]:
    """Measures runs with different numbers of photos; see `PHOTOS` and `SETTINGS`."""
    rows: list[dict[str, Any]] = []
    first: dict[str, tuple[int, int]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in PHOTOS:
            photos = folder / f"photos{count}"
            draw_photos(photos, count)
            decoded = int(0.9 * count) * IMAGE_SIZE**2 * 3  # the test split is not read
            for setting, flags in SETTINGS.items():
                own = ["--backbone=SmallResNet", f"--image_size={IMAGE_SIZE}", "--epochs=1"]
                own += ["--steps_per_epoch=20", f"--image_folder={photos}"]
                own += [f"--cache_dir={folder / 'cache'}", *flags]
                peak = train(Path(tempfile.mkdtemp(dir=folder)), *own)
                first_decoded, first_peak = first.setdefault(setting, (decoded, peak))
                growth = (peak - first_peak) / max(decoded - first_decoded, 1)
                row = {"photos": count, "setting": setting, "decoded_bytes": decoded}
                rows.append(row | {"peak_bytes": peak, "growth_per_decoded_byte": growth})
    print_table(rows)
    return rows


def main() -> None:
    """Measures, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recompute", action="store_true", help="compare --recompute=blocks")
    if parser.parse_args().recompute:
        write_result("recompute", {"runs": measure_recompute()})
    else:
        write_result("memory", {"runs": measure_photos()})


if __name__ == "__main__":
    main()
