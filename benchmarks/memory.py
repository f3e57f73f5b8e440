"""The most memory that a run takes, against the size of its photos, and how it grows with them.

python -m benchmarks.memory            # about 3 minutes on two cores
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.record import write_result
from research.data.built_in.sketches import sketch_jpeg

ROOT = Path(__file__).resolve().parents[1]
IMAGE_SIZE = 96
PHOTOS = (500, 2000, 8000)
SETTINGS = {
    "decoded photos": ("--unfreeze_from=0", "--trunk_cache=off"),
    "cached activations": ("--unfreeze_from=stage2", "--trunk_cache=memory"),
    "cached activations on disk": ("--unfreeze_from=stage2", "--trunk_cache=disk"),
}

# Pages of a file that is read are counted apart from memory: the system takes them back at will.
CHILD = """
import threading, time
from flags.command_line import run
import run_train
from research.settings.train_config import TrainConfig

peak = 0

def watch():
    global peak
    while True:
        with open("/proc/self/status") as status:
            found = next(line for line in status if line.startswith("RssAnon"))
        peak = max(peak, int(found.split()[1]))
        time.sleep(0.02)

def main(config):
    threading.Thread(target=watch, daemon=True).start()
    run_train.main(config)
    print("peak", peak)

run(TrainConfig, main)
"""


def draw_photos(folder: Path, photos: int) -> None:
    """Draws so many photos into subfolders cat and dog."""
    for index in range(photos):
        name = ("cat", "dog")[index % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{index:06}.jpg").write_bytes(sketch_jpeg(index % 2, index % 500))


def peak_bytes(folder: Path, photos: Path, *flags: str) -> int:
    """Returns the most anonymous memory of a run of one epoch (Linux)."""
    command = [sys.executable, "-c", CHILD, f"--image_folder={photos}", "--backbone=SmallResNet"]
    command += ["--flagfile=recipes/article.flags", "--bn_mode=frozen"]
    command += ["--weights=none", f"--image_size={IMAGE_SIZE}", "--epochs=1"]
    command += ["--steps_per_epoch=20", f"--cache_dir={folder / 'cache'}", *flags]
    command += [f"--ckpt_dir={tempfile.mkdtemp(dir=folder)}"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return 1024 * int(done.stdout.split()[-1])


@dataclasses.dataclass(frozen=True)
class Row:
    """A run: its photos, the bytes of those decoded, and the most bytes that it took."""

    photos: int
    setting: str
    data: int
    peak: int


def main() -> None:
    """Measures, prints and writes the figures."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in PHOTOS:
            photos = folder / f"photos{count}"
            draw_photos(photos, count)
            data = int(0.9 * count) * IMAGE_SIZE**2 * 3  # the test split is not read
            for setting, flags in SETTINGS.items():
                rows.append(Row(count, setting, data, peak_bytes(folder, photos, *flags)))
    first = {row.setting: row for row in rows[: len(SETTINGS)]}
    growths = []
    for row in rows:
        before = first[row.setting]
        growth = (row.peak - before.peak) / max(row.data - before.data, 1)
        growths.append(growth)
        print(
            f"{row.photos:>6,} photos, {row.data / 1e6:>6.0f} MB decoded, {row.setting:<28}"
            f"{row.peak / 1e6:>7.0f} MB{growth:>7.2f} grown a byte of photos"
        )
    figures = [
        {**dataclasses.asdict(row), "growth_a_byte_of_photos": growth}
        for row, growth in zip(rows, growths, strict=True)
    ]
    print(f"written to {write_result('memory', {'runs': figures})}")


if __name__ == "__main__":
    main()
