"""Peak memory of a run, and its growth with the number of photos.

python -m benchmarks.memory            # about 3 minutes on two cores
"""

from __future__ import annotations

import argparse
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


def draw_photos(folder: Path, photos: int) -> None:
    """Draws this many photos, alternately into the subfolders cat and dog."""
    for index in range(photos):
        name = ("cat", "dog")[index % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{index:06}.jpg").write_bytes(sketch_jpeg(index % 2, index % 500))


def peak_bytes(folder: Path, photos: Path, flags: tuple[str, ...]) -> int:
    """Returns the peak anonymous memory of a run of one epoch (Linux)."""
    command = [sys.executable, "run_train.py", *ARTICLE, "--backbone=SmallResNet"]
    command += [f"--image_size={IMAGE_SIZE}", "--epochs=1", "--steps_per_epoch=20", *flags]
    command += [f"--image_folder={photos}", f"--cache_dir={folder / 'cache'}"]
    command += [f"--ckpt_dir={tempfile.mkdtemp(dir=folder)}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return peak


def main() -> None:
    """Measures, prints and writes the figures."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rows: list[dict[str, Any]] = []
    first: dict[str, tuple[int, int]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in PHOTOS:
            photos = folder / f"photos{count}"
            draw_photos(photos, count)
            decoded = int(0.9 * count) * IMAGE_SIZE**2 * 3  # the test split is not read
            for setting, flags in SETTINGS.items():
                peak = peak_bytes(folder, photos, flags)
                first_decoded, first_peak = first.setdefault(setting, (decoded, peak))
                growth = (peak - first_peak) / max(decoded - first_decoded, 1)
                row = {"photos": count, "setting": setting, "decoded_bytes": decoded}
                rows.append(row | {"peak_bytes": peak, "growth_per_decoded_byte": growth})
    print_table(rows)
    write_result("memory", {"runs": rows})


if __name__ == "__main__":
    main()
