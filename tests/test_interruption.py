"""SIGTERM and Ctrl-C: the exit code, the printed line and the files on disk."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from research.system import interruption
from tests.helpers import (
    FINISHED_RUN,
    ROOT,
    Started,
    read_checkpoint,
    read_metrics,
    run_script,
    script_environment,
    signal_at,
)

TRAIN_STEP = "research.loop.learner:Learner.train_step"


def run_with_signal(
    folder: Path, script: str, place: str, call: int, signals: list[int], *flags: str
) -> subprocess.CompletedProcess[str]:
    """Runs a script that receives signals at the end of a call of one of its functions."""
    place_and_signals = signal_at(script, place, call, *signals)
    return run_script(folder, "tests/signalled.py", place_and_signals, *flags)


@pytest.fixture(scope="module")
def flags(photo_folder):
    """The flags of the finished run."""
    return [*FINISHED_RUN, f"--image_folder={photo_folder}"]


@pytest.fixture(scope="module")
def whole(finished_run, tmp_path_factory):
    """A copy of the finished run."""
    return shutil.copytree(finished_run, tmp_path_factory.mktemp("whole") / "run")


def test_a_run_interrupted_in_steps_and_validation_ends_bit_identical(whole, flags, tmp_path):
    """The folder's name has spaces and non-ASCII letters; the printed commands are executed."""
    rows = read_metrics(whole)
    steps = rows[0]["step"]
    where = "Läufe mit Abstand/ü 猫"
    run = tmp_path / where
    first, second = (signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C (SIGINT)")
    for (number, code, name), place, call, saved in (
        (first, TRAIN_STEP, 3, "step-3"),
        (second, "research.tasks.metrics:Tally.reset", 1, f"step-{steps}-unvalidated"),
    ):
        process = run_with_signal(
            tmp_path, "run_train.py", place, call, [number], *flags, f"--ckpt_dir={where}"
        )
        assert process.returncode == code, process.stderr
        (line,) = process.stderr.splitlines()
        assert line.startswith(f"run_train.py: interrupted by {name}; step ")
        # The printed flag is the one to repeat.
        (flag,) = (word for word in shlex.split(line) if word.startswith("--ckpt_dir="))
        assert flag == f"--ckpt_dir={where}"
        assert (run / "checkpoints" / "latest" / f"{saved}.index").exists()
        assert not (run / "run.lock").exists()
    process = run_script(tmp_path, "run_train.py", *flags, f"--ckpt_dir={where}")
    assert process.returncode == 0, process.stderr
    expected, found = read_checkpoint(whole), read_checkpoint(run)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    resumed = read_metrics(run)
    for key in ("epoch", "step", "photos", "train_loss", "train_accuracy", "validation_loss"):
        assert [row[key] for row in rows] == [row[key] for row in resumed]
    assert resumed[0]["seconds"] < resumed[1]["seconds"]

    command = re.search(r"^evaluate: +python (.*)$", process.stdout, re.MULTILINE)
    assert command
    script, *flags = shlex.split(command[1])
    evaluated = run_script(tmp_path, script, *flags, "--nopictures")
    assert evaluated.returncode == 0, evaluated.stderr
    assert evaluated.stdout.startswith("SmallResNet\n")
    assert evaluated.stderr == ""


def test_a_second_signal_ends_the_process_immediately(flags, tmp_path):
    signals = [signal.SIGTERM, signal.SIGINT]
    process = run_with_signal(tmp_path, "run_train.py", TRAIN_STEP, 2, signals, *flags)
    assert process.returncode == -signal.SIGINT  # shells show 130
    assert process.stderr == ""
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists()


def test_a_signal_while_the_frozen_layers_run_leaves_no_files(flags, tmp_path):
    flags = [*flags, "--trunk_cache=disk", "--cache_dir=kept"]
    place = "research.data.rows:Rows.append"
    process = run_with_signal(tmp_path, "run_train.py", place, 1, [signal.SIGINT], *flags)
    assert process.returncode == 130
    assert process.stderr == "run_train.py: interrupted by Ctrl-C (SIGINT)\n"
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "kept").glob("*.partial"))


def test_a_signal_while_training(flags, tmp_path):
    flags = [*flags, "--epochs=1000", "--unfreeze_from=none"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with Started(tmp_path, "run_train.py", flags) as process:
        process.wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 2)
        process.program.send_signal(signal.SIGTERM)
        code, _, error = process.end(60)
    assert code == 143, error
    (line,) = error.splitlines()
    assert line.startswith("run_train.py: interrupted by SIGTERM")
    step = int(re.search(r"step ([\d,]+) of", line)[1].replace(",", ""))
    assert read_metrics(tmp_path / "run")[-1]["step"] <= step
    assert list((tmp_path / "run" / "checkpoints" / "latest").glob(f"step-{step}*.index"))


def test_a_signal_while_importing(flags, tmp_path):
    """A new process, which still has to import TensorFlow."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run_train.py"), *flags],
        cwd=tmp_path,
        env=script_environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "_pywrap_tensorflow" not in maps.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert error == "run_train.py: interrupted by SIGTERM\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "place", "flags"),
    [
        ("run_eval.py", "research.evaluation.classifier:Classifier.logits", ("--ckpt_dir=RUN",)),
        ("run_export.py", "tensorflow.saved_model:save", ("--ckpt_dir=RUN",)),
        ("run_predict.py", "research.serving.predict:load_split", ("--ckpt_dir=RUN", "PHOTOS")),
        (
            "research/inspect_data/__main__.py",
            "research.inspect_data.inspect:inspect",
            ("--image_folder=PHOTOS", "--out=RUN/inspection"),
        ),
    ],
)
def test_the_other_programs_end_with_one_line_and_leave_no_files(
    whole, photo_folder, tmp_path, script, place, flags
):
    before = {path for path in whole.rglob("*") if path.is_file()}
    flags = [flag.replace("PHOTOS", str(photo_folder)).replace("RUN", str(whole)) for flag in flags]
    process = run_with_signal(tmp_path, script, place, 1, [signal.SIGINT], *flags)
    assert process.returncode == 130
    name = script.removesuffix("/__main__.py").rpartition("/")[2]
    assert process.stderr == f"{name}: interrupted by Ctrl-C (SIGINT)\n"
    assert {path for path in whole.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("in_a_program", [False, True])
def test_handlers_are_restored_after_a_signal_unless_the_program_ends(in_a_program):
    with contextlib.ExitStack() as stack:
        if in_a_program:
            stack.enter_context(interruption.raised())
        before = signal.getsignal(signal.SIGTERM)
        with interruption.deferred() as request:
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.number == signal.SIGTERM
        found = signal.getsignal(signal.SIGTERM)
        assert found == (signal.SIG_DFL if in_a_program else before)
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
