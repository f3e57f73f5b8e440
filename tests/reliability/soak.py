"""Trains under random signals for half an hour, with `run_eval.py --watch` and TensorBoard.

python -m tests.reliability.soak                # 30 minutes, plus the undisturbed run
python -m tests.reliability.soak --minutes=5
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import write_result
from tests.helpers import SMALL_RUN, draw_photos, script_environment
from tests.launcher import ROOT
from tests.reliability.consistency import Witness, event_bytes, read_rows

Program = subprocess.Popen[bytes]

PHOTOS_PER_CLASS = 40
SETTINGS = (
    "--batch_size=4",
    "--checkpoint_every=5",
    "--weight_averaging=0.9",
    "--backbone_optimizer=adam",
    "--head_schedule=cosine",
    "--head_epochs=2",
    "--horizontal_flip",
    "--trunk_cache=memory",
)
# The allowed exit codes of each signal. Negative codes occur before the handlers are installed.
SIGNALS = {
    signal.SIGKILL: (-signal.SIGKILL,),
    signal.SIGTERM: (128 + signal.SIGTERM, -signal.SIGTERM),
    signal.SIGINT: (128 + signal.SIGINT, -signal.SIGINT),
}
MAX_SECONDS_TO_SIGNAL = 60.0  # the first step needs 8 or more
SECONDS_BETWEEN_POLLS = 1.0


class TensorBoard:
    """A TensorBoard server on a free port of this machine.

    Args:
      process: of the server.
      log: file of its output, which contains the port.
    """

    def __init__(self, process: Program, log: Path) -> None:
        self.process = process
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + 120
        while not (found := re.search(r"http://[^/\s]+:\d+/", log.read_text("utf-8"))):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"TensorBoard did not start: {log.read_text('utf-8')}")
            time.sleep(0.1)
        self._address = found[0]

    def get(self, route: str, **query: str) -> Any:
        """Returns the response of the scalars plugin; raises OSError or ValueError."""
        address = f"{self._address}data/plugin/scalars/{route}?{urllib.parse.urlencode(query)}"
        with self._opener.open(address, timeout=60) as answer:
            return json.load(answer)

    def scalars(self, run: str, tag: str) -> list[tuple[int, float]]:
        """Returns the steps and values of a tag; an empty list if it does not exist yet."""
        if tag not in self.get("tags").get(run, {}):
            return []
        return [(step, value) for _, step, value in self.get("scalars", run=run, tag=tag)]


class Soak:
    """Starts the programs, sends signals to training, and counts.

    Args:
      folder: an empty folder for all files.
      seed: of the random moments and signals.
      epochs: of each run.
    """

    def __init__(self, folder: Path, seed: int, epochs: int) -> None:
        self._folder = folder
        self._random = random.Random(seed)
        (folder / "temporary").mkdir()  # for files that TensorFlow leaves when it is killed
        self._environment = {**script_environment(folder), "TMPDIR": str(folder / "temporary")}
        (folder / "photos").mkdir()
        photos = draw_photos(folder / "photos", PHOTOS_PER_CLASS)
        (folder / "runs").mkdir()
        self._flags = (*SMALL_RUN, *SETTINGS, f"--epochs={epochs}", f"--image_folder={photos}")
        self.signals: collections.Counter[str] = collections.Counter()
        self.counts: collections.Counter[str] = collections.Counter()
        self.event_ratios: list[float] = []
        self.violations: list[str] = []

    def start(self, name: str, *arguments: str) -> Program:
        """Starts Python with arguments; its output goes to the log with this name."""
        # TensorBoard connects to its data server on this machine.
        environment = {**self._environment, "no_proxy": "localhost,127.0.0.1"}
        with self.log(name).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self._folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log(self, name: str) -> Path:
        """The file of a program's output."""
        return self._folder / f"{name}.txt"

    def train(self, name: str) -> Program:
        """Starts or resumes training in runs/NAME."""
        script = str(ROOT / "run_train.py")
        return self.start(name, script, *self._flags, f"--ckpt_dir={self.run(name)}")

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self._folder / "runs" / name

    def evaluate(self, name: str, *flags: str) -> Program:
        """Starts an evaluation of runs/NAME."""
        script = str(ROOT / "run_eval.py")
        flags = (f"--ckpt_dir={self.run(name)}", "--nopictures", *flags)
        return self.start(f"{name}-evaluation", script, *flags)

    def reference(self) -> Path:
        """Trains without signals; returns the run's folder."""
        if self.train("undisturbed").wait():
            raise RuntimeError(self.log("undisturbed").read_text("utf-8")[-2000:])
        return self.run("undisturbed")

    def disturbed(self, name: str, board: TensorBoard, witness: Witness, until: float) -> Path:
        """Trains with signals until the time `until`, then to the end; returns the run's folder."""
        run = self.run(name)
        watcher: Program | None = None
        while True:
            process = self.train(name)
            self.counts["starts of training"] += 1
            seconds = (
                self._random.uniform(0, MAX_SECONDS_TO_SIGNAL)
                if time.monotonic() < until
                else float("inf")
            )
            deadline = time.monotonic() + seconds
            while process.poll() is None and time.monotonic() < deadline:
                if watcher is None and (run / "config.json").exists():
                    watcher = self.evaluate(name, "--watch")
                self._poll(board)
                time.sleep(min(SECONDS_BETWEEN_POLLS, max(0, deadline - time.monotonic())))
            if process.poll() is None:
                number = self._random.choice(list(SIGNALS))
                process.send_signal(number)
                code = process.wait(60)
                self.signals[f"{number.name}, exit code {code}"] += 1
                if code and code not in SIGNALS[number]:  # 0 if it had just ended
                    self.violations.append(f"after {number.name} training ended with {code}")
            elif process.wait():
                self.violations.append(self.log(name).read_text("utf-8")[-2000:])
            self._check_ended(process)
            self.violations += witness.inconsistencies(run, run / "none")
            if watcher and watcher.poll():
                self.violations.append("run_eval.py --watch ended early")
            if (run / "result.json").exists() or self.violations:
                break
        if watcher and watcher.wait(120):
            self.violations.append(self.log(f"{name}-evaluation").read_text("utf-8")[-2000:])
        return run

    def _poll(self, board: TensorBoard) -> None:
        try:
            for run, tags in board.get("tags").items():
                if "loss" in tags:
                    board.scalars(run, "loss")
            self.counts["polls of TensorBoard"] += 1
        except (OSError, ValueError) as error:
            self.violations.append(f"TensorBoard does not respond: {error}")

    def _check_ended(self, process: Program) -> None:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        self.violations.append(f"a process of group {process.pid} is still running")
        os.killpg(process.pid, signal.SIGKILL)

    def compare(self, run: Path, whole: Path, board: TensorBoard, witness: Witness) -> None:
        """Compares a finished run with the undisturbed run, its evaluations and TensorBoard."""
        self.violations += witness.differences(run, run / "none", ".test.json")
        self.counts["runs finished like the undisturbed one"] += 1
        evaluations = list((run / "checkpoints" / "latest").glob("*.test.json"))
        self.counts["evaluations watched"] += len(evaluations)
        for file in evaluations:
            checkpoint = str(file).removesuffix(".test.json")
            if not Path(f"{checkpoint}.index").exists():
                continue
            watched = json.loads(file.read_bytes())
            file.unlink()
            if self.evaluate(run.name, f"--checkpoint={checkpoint}").wait():
                self.violations.append(f"{checkpoint} cannot be evaluated")
            elif json.loads(file.read_bytes()) != watched:
                self.violations.append(f"{file} differs from the watched evaluation")
            self.counts["evaluations repeated"] += 1
        self.compare_shown(run, board)
        size, usual = (event_bytes(one)[1] for one in (run, whole))
        self.event_ratios.append(round(size / usual, 2))

    def compare_shown(self, run: Path, board: TensorBoard) -> None:
        """Compares a run's validation figures in TensorBoard with its metrics.jsonl."""
        for tag in ("loss", "accuracy"):
            rows = {row["step"]: row[f"validation_{tag}"] for row in read_rows(run)[0]}
            name = f"{run.name}/events/validation"
            deadline = time.monotonic() + 120  # it reloads events only periodically
            while dict(shown := board.scalars(name, tag)).keys() != rows.keys():
                if time.monotonic() > deadline:
                    steps = [step for step, _ in shown]
                    self.violations.append(f"TensorBoard shows {tag} of {name} at steps {steps}")
                    return
                time.sleep(1)
            self.counts["points of TensorBoard compared"] += len(shown)
            self.counts["points of TensorBoard shown twice"] += len(shown) - len(rows)
            if any(value != np.float32(rows[step]) for step, value in shown):
                self.violations.append(f"TensorBoard shows a different {tag} of {name}")


def main() -> None:
    """Runs the soak test, prints and writes the counts; exit code 1 for a violation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    soak = Soak(folder, arguments.seed, arguments.epochs)
    begin = time.monotonic()
    whole = soak.reference()
    witness = Witness(whole, whole / "none")
    undisturbed = time.monotonic() - begin
    server = soak.start(
        *("TensorBoard", "-m", "tensorboard.main", "--logdir=runs", "--host=127.0.0.1"),
        *("--port=0", "--reload_interval=1"),
    )
    try:
        board = TensorBoard(server, soak.log("TensorBoard"))
        soak.compare_shown(whole, board)
        begin = time.monotonic()
        until = begin + 60 * arguments.minutes
        while time.monotonic() < until and not soak.violations:
            name = f"run{soak.counts['runs finished like the undisturbed one'] + 1}"
            run = soak.disturbed(name, board, witness, until)
            if not soak.violations:
                soak.compare(run, whole, board, witness)
        if server.poll() is not None:
            soak.violations.append("TensorBoard ended")
    finally:
        server.kill()
        server.wait()
    figures = {
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "minutes_of_an_undisturbed_run": round(undisturbed / 60, 1),
        "epochs_of_a_run": arguments.epochs + 2,
        "seed": arguments.seed,
        "violations": soak.violations,
        "signals": dict(sorted(soak.signals.items())),
        **{name.replace(" ", "_"): count for name, count in soak.counts.items()},
        "states_compared": witness.checked_states,
        "event_bytes_against_the_undisturbed_run": soak.event_ratios,
    }
    print(json.dumps(figures, indent=2))
    write_result("soak", figures)
    if soak.violations:
        sys.exit(f"{len(soak.violations)} violations; the files are in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
