"""Kills workers of one run, each in a loop that starts it again, and compares the finished run.

python -m tests.reliability.hosts               # one of four workers is killed: two to five minutes
python -m tests.reliability.hosts --kills=10 --workers=3
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import write_result
from tests.helpers import SMALL_RUN, draw_photos, free_ports, script_environment
from tests.launcher import ROOT, THIN_NETWORKS
from tests.reliability.consistency import Witness, pointed

PHOTOS_PER_CLASS = 40
EPOCHS = 6
FLAGS = (
    *SMALL_RUN,
    "--head_epochs=0",
    f"--epochs={EPOCHS}",
    "--checkpoint_every=3",
    "--weight_averaging=0.9",
    "--backbone_optimizer=adam",
    "--bn_mode=sync",
    "--horizontal_flip",
    "--trunk_cache=memory",
    "--deterministic",
    "--ckpt_dir=run",
)
MAX_SECONDS = 300.0  # for all workers to connect and reach a step, or to finish
SECONDS_BETWEEN_POLLS = 0.01


class Workers:
    """The workers of a run on this machine, each in a loop of examples/restart.sh.

    Args:
      folder: contains the working directory and the output of each worker.
      photos: the photo folder.
      count: number of workers.
    """

    def __init__(self, folder: Path, photos: Path, count: int) -> None:
        self.run = folder / "host0" / "run"
        self._folder = folder
        addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
        command = ["bash", str(ROOT / "examples" / "restart.sh")]
        command += [sys.executable, str(ROOT / "run_train.py"), f"--image_folder={photos}", *FLAGS]
        self._loops = []
        for index in range(count):
            host = folder / f"host{index}"
            host.mkdir(parents=True)
            task = {"type": "worker", "index": index}
            environment = {
                **script_environment(folder),
                THIN_NETWORKS: "1",
                "TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": task}),
            }
            with (folder / f"log{index}.txt").open("wb") as log:
                self._loops.append(
                    subprocess.Popen(
                        command, cwd=host, env=environment, stdout=log, stderr=subprocess.STDOUT
                    )
                )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for loop in self._loops:
            if loop.poll() is None:
                children = psutil.Process(loop.pid).children(recursive=True)
                loop.kill()
                for child in children:
                    child.kill()
            loop.wait()

    @property
    def step(self) -> int:
        """The step of the newest checkpoint; 0 if there is none."""
        return max((int(Path(path).name.split("-")[1]) for path in pointed(self.run)), default=0)

    def kill_after(self, step: int, seconds: float, index: int) -> int:
        """Kills a worker with SIGKILL some time after a checkpoint; returns the newest step.

        Raises:
          RuntimeError: the step is not reached, or the worker is not running.
        """
        self._wait_until(lambda: self.step >= step)
        time.sleep(seconds)
        newest = self.step
        programs = psutil.Process(self._loops[index].pid).children()
        if not programs:
            raise RuntimeError(f"worker {index} is not running: {self.logs}")
        os.kill(programs[0].pid, signal.SIGKILL)
        return newest

    def finish(self) -> list[int]:
        """Waits for the end of all loops; returns their exit codes."""
        self._wait_until(lambda: all(loop.poll() is not None for loop in self._loops))
        return [loop.wait() for loop in self._loops]

    @property
    def logs(self) -> str:
        """The end of the output of all workers."""
        files = sorted(self._folder.glob("log*.txt"))
        return "\n".join(file.read_text(errors="replace")[-2000:] for file in files)

    @property
    def starts(self) -> int:
        """The number of times that the loops started a worker again."""
        files = self._folder.glob("log*.txt")
        return sum(file.read_text(errors="replace").count("restart.sh: exit") for file in files)

    def _wait_until(self, is_reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + MAX_SECONDS
        while not is_reached():
            if time.monotonic() > deadline:
                raise RuntimeError(f"not reached within {MAX_SECONDS} s: {self.logs}")
            time.sleep(SECONDS_BETWEEN_POLLS)


def disturb(folder: Path, workers: int, kills: int, seed: int) -> dict[str, Any]:
    """Trains undisturbed, and again with kills at random moments; returns counts and violations.

    Args:
      folder: an empty folder for all files.
      workers: number of workers.
      kills: number of kills. Each worker is killed as often as the others, in a random order.
      seed: of the random moments.
    """
    chance = random.Random(seed)
    (folder / "photos").mkdir()
    photos = draw_photos(folder / "photos", PHOTOS_PER_CLASS)
    begin = time.monotonic()
    with Workers(folder / "whole", photos, workers) as whole:
        if any(whole.finish()):
            raise RuntimeError(whole.logs)
        steps = whole.step
    undisturbed = time.monotonic() - begin
    witness = Witness(whole.run, folder / "cache")
    order = [index % workers for index in range(kills)]
    chance.shuffle(order)
    with Workers(folder / "killed", photos, workers) as killed:
        for number, index in enumerate(order):
            aim = 1 + int(0.9 * steps * (number + chance.random()) / kills)
            step = killed.kill_after(aim, chance.uniform(0, 0.3), index)
            print(f"killed worker {index} of {workers} after step {step} of {steps}", flush=True)
        codes = killed.finish()
    violations = witness.differences(killed.run, folder / "cache")
    if any(codes):
        violations.append(f"exit codes {codes}: {killed.logs}")
    return {
        "seed": seed,
        "workers": workers,
        "kills": kills,
        "starts_again": killed.starts,
        "violations": violations,
        "seconds_undisturbed": round(undisturbed),
        "seconds": round(time.monotonic() - begin - undisturbed),
    }


def main() -> None:
    """Kills workers, prints and writes the counts; exit code 1 for a violation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    figures = disturb(folder, arguments.workers, arguments.kills, arguments.seed)
    print(json.dumps(figures, indent=2))
    write_result("hosts", figures)
    if figures["violations"]:
        sys.exit(f"{len(figures['violations'])} violations; the files are in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
