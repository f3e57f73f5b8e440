"""Kills training, evaluation and export at random moments, and checks the files that are left.

python -m tests.reliability.faults              # 100 kills, about 20 minutes on two cores
python -m tests.reliability.faults --kills=6
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import write_result
from tests.helpers import SMALL_RUN, draw_photos, script_environment
from tests.launcher import ROOT, Launcher, Program
from tests.reliability.consistency import Witness, entries, event_bytes, unfinished
from tests.reliability.moments import AIMS, IMPORTS, Moments
from tests.reliability.phases import Phases

PHOTOS_PER_CLASS = 30
COMMON = (
    "--batch_size=4",
    "--checkpoint_every=3",
    "--weight_averaging=0.9",
    "--backbone_optimizer=adam",
    "--head_schedule=cosine",
    "--head_epochs=1",
    "--epochs=2",
    "--horizontal_flip",
)
SETTINGS = {
    "short": ("--head_epochs=0", "--trunk_cache=disk", "--photo_cache=disk", "--cache_dir=kept"),
    "cached": ("--trunk_cache=disk", "--cache_dir=kept"),
    "photos": (
        *(
            "--trunk_cache=off",
            "--photo_cache=none",
            "--bn_mode=train",
            "--random_crop_area=0.5",
            "--mixup=0.4",
        ),
        *("--rand_augment=5", "--colour_jitter=0.2"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Kill:
    """A kill: the program, the intended phase, the actual phase, and the unfinished files left."""

    program: str
    aim: str
    hit: str
    unfinished: tuple[str, ...]


@dataclasses.dataclass
class Round:
    """One run of all programs, killed several times, in its own folder."""

    folder: Path
    flags: tuple[str, ...]
    entries: int = 0  # of the complete trunk cache
    starts: int = 0

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / "run"

    @property
    def cache(self) -> Path:
        """The folder of the trunk cache."""
        return self.folder / "kept"

    @property
    def makes_cache(self) -> bool:
        """Whether the trunk cache is incomplete."""
        return len(entries(self.cache)) < self.entries

    @property
    def export(self) -> Path:
        """The folder that `run_export.py` writes."""
        return self.run / "export" / "saved_model"

    def flags_of(self, program: str) -> tuple[str, ...]:
        """Returns a program's flags, which are the same after each kill."""
        return ("--ckpt_dir=run", *(self.flags if program == "run_train.py" else ()))


class Faults:
    """Starts the programs, kills them and counts the kills.

    Args:
      folder: an empty folder for all files.
      seed: of the random moments.
      launcher: starts the programs.
    """

    def __init__(self, folder: Path, seed: int, launcher: Launcher) -> None:
        self._folder = folder
        self._launcher = launcher
        self._random = random.Random(seed)
        (folder / "photos").mkdir()
        self._photos = draw_photos(folder / "photos", PHOTOS_PER_CLASS)
        (folder / "temporary").mkdir()  # for files that TensorFlow leaves when it is killed
        self._environment = {**script_environment(folder), "TMPDIR": str(folder / "temporary")}
        self._phases = folder / "phases"
        self._moments = Moments(self._random, Phases(self._phases))
        self._rounds = 0
        self.kills: list[Kill] = []
        self.violations: list[str] = []
        self.finished = 0

    def reference(self, setting: str) -> tuple[Round, Witness]:
        """Runs all programs undisturbed; raises RuntimeError if one fails."""
        whole = self._round(setting)
        for program in AIMS:
            begin = time.monotonic()
            if self._start(whole, program).wait():
                raise RuntimeError(self._log(whole))
            self._moments.learn(program, time.monotonic() - begin)
        self._predict(whole)
        return whole, Witness(whole.run, whole.cache)

    def fresh(self, setting: str, witness: Witness) -> None:
        """Trains in a new Python process, as users do, and compares with the forked run."""
        this = self._round(setting)
        if self._start(this, "run_train.py", fresh_start=True).wait():
            raise RuntimeError(self._log(this))
        self._report(this, witness.inconsistencies(this.run, this.cache))

    def disturbed(self, setting: str, whole: Round, witness: Witness, kills: int) -> None:
        """Runs all programs to their end with at most `kills` kills, and compares the results."""
        this = self._round(setting)
        this.entries = len(witness.entries)
        most = {"run_train.py": self._random.randint(4, 8), "run_eval.py": 1, "run_export.py": 1}
        if kills <= 8:  # all in this round
            most = {program: kills - later for program, later in zip(AIMS, (2, 1, 0), strict=True)}
        for program in AIMS:
            for _ in range(min(most[program], kills)):
                if not self._kill(this, program):
                    break
                kills -= 1
                self._report(this, witness.inconsistencies(this.run, this.cache))
                if this.export.exists():  # complete, since it has its final name
                    self._predict(this)
                    break
            else:
                if code := self._start(this, program).wait():
                    self._report(this, [f"{program} ended with {code}: {self._log(this)[-2000:]}"])
                    return
        self._predict(this)
        found = witness.differences(this.run, this.cache)
        if not np.array_equal(*(np.load(one.folder / "predicted.npy") for one in (this, whole))):
            found.append("the exported model's predictions differ from the undisturbed run")
        (files, size), (usual_files, usual_size) = event_bytes(this.run), event_bytes(whole.run)
        if files > usual_files * this.starts or size > usual_size * this.starts:
            found.append(f"{files} event files of {size} bytes after {this.starts} starts")
        self._report(this, found)
        self.finished += 1
        if not found:
            shutil.rmtree(this.folder)

    def _round(self, setting: str) -> Round:
        self._rounds += 1
        folder = self._folder / f"{setting}{self._rounds}"
        folder.mkdir()
        flags = (*SMALL_RUN, *COMMON, *SETTINGS[setting], f"--image_folder={self._photos}")
        return Round(folder, flags)

    def _start(
        self, this: Round, program: str, fresh_start: bool = False
    ) -> Program | subprocess.Popen[bytes]:
        self._moments.phases.reset()
        this.starts += 1
        arguments = [str(ROOT / program), *this.flags_of(program)]
        with (this.folder / "log.txt").open("ab") as log:
            if fresh_start:
                command = [sys.executable, *arguments]
                return subprocess.Popen(
                    command, cwd=this.folder, env=self._environment, stdout=log, stderr=log
                )
            watched = ["-m", "tests.reliability.phases", str(self._phases), *arguments]
            return self._launcher.start(watched, this.folder, self._environment, log, log)

    def _kill(self, this: Round, program: str) -> bool:
        """Starts a program and kills it; returns False if the program ended first."""
        aim, moments = self._moments.draw(program, this.makes_cache)
        process = self._start(this, program, fresh_start=aim == IMPORTS)
        try:
            for is_reached in moments:
                while process.poll() is None and not is_reached():
                    time.sleep(0.0005)
            process.kill()
            code = process.wait()
        finally:
            process.kill()
        if code != -signal.SIGKILL:
            if code:
                self._report(this, [f"{program} ended with {code}: {self._log(this)[-2000:]}"])
            return False
        left = tuple(unfinished(this.run, this.cache))
        hit = IMPORTS if aim == IMPORTS else self._moments.phases.current
        self.kills.append(Kill(program, aim, hit, left))
        print(f"{len(self.kills):>4}  {program:<14} {hit:<18}{' '.join(left)}", flush=True)
        return True

    def _predict(self, this: Round) -> None:
        """Loads an export and stores its prediction for a photo."""
        import tensorflow as tf  # already imported, by `consistency`, without its log

        photo = next(self._photos.rglob("*.jpg")).read_bytes()
        try:
            serve = tf.saved_model.load(str(this.export)).signatures["serving_default"]
        except (OSError, ValueError, tf.errors.OpError) as error:
            self._report(this, [f"the export cannot be loaded: {error}"])
        else:
            outputs = serve(image_bytes=tf.constant([photo]))
            np.save(this.folder / "predicted.npy", outputs["probabilities"].numpy())

    def _log(self, this: Round) -> str:
        return (this.folder / "log.txt").read_text(encoding="utf-8", errors="replace")

    def _report(self, this: Round, errors: list[str]) -> None:
        for line in errors:
            self.violations.append(f"{this.folder.name}, kill {len(self.kills)}: {line}")
            print(f"VIOLATION {self.violations[-1]}", flush=True)


def table(kills: list[Kill]) -> str:
    """Returns a table of the kills by phase, with the number that left unfinished files."""
    hits = collections.Counter((kill.program, kill.hit) for kill in kills)
    left = collections.Counter((kill.program, kill.hit) for kill in kills if kill.unfinished)
    lines = [f"{'killed':<16}{'in phase':<20}{'kills':>6}{'unfinished files left':>23}"]
    for (program, hit), count in sorted(hits.items(), key=lambda item: (item[0][0], -item[1])):
        lines.append(f"{program:<16}{hit:<20}{count:>6}{left[program, hit]:>23}")
    return "\n".join([*lines, f"{'all':<36}{len(kills):>6}{sum(left.values()):>23}"])


def disturb(faults: Faults, kills: int) -> dict[str, Any]:
    """Kills programs until the number of kills or a violation is reached; returns the counts."""
    begin = time.monotonic()
    # The short version has time for only one undisturbed run.
    settings = ["cached", "photos"] if kills >= 20 else ["short"]
    references = {setting: faults.reference(setting) for setting in settings}
    if kills >= 20:
        for setting, (_, witness) in references.items():
            faults.fresh(setting, witness)
    while len(faults.kills) < kills and not faults.violations:
        setting = settings[faults.finished % len(settings)]
        faults.disturbed(setting, *references[setting], kills - len(faults.kills))
    hits = collections.Counter(f"{kill.program}: {kill.hit}" for kill in faults.kills)
    return {
        "kills": len(faults.kills),
        "violations": faults.violations,
        "runs_finished_like_the_undisturbed_one": faults.finished,
        "states_compared": sum(witness.checked_states for _, witness in references.values()),
        "kills_that_left_unfinished_files": sum(bool(kill.unfinished) for kill in faults.kills),
        "kills_by_phase": dict(sorted(hits.items())),
        "minutes": round((time.monotonic() - begin) / 60, 1),
    }


def main() -> None:
    """Kills programs, prints and writes the counts; exit code 1 for a violation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="number of kills")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    faults = Faults(folder, arguments.seed, Launcher(folder))
    figures = {"seed": arguments.seed, **disturb(faults, arguments.kills)}
    print(table(faults.kills))
    write_result("faults", figures)
    if faults.violations:
        sys.exit(f"{len(faults.violations)} violations; the files are in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
