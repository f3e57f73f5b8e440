"""Output that cannot be written does not stop a program. Each test starts a Python process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, SMALL_RUN, launcher, read_metrics, script_environment

# Prints on both streams until its work is done. It imports no TensorFlow.
PROGRAM = """
import sys
from pathlib import Path
from flags.command_line import run
from research.settings.program_configs import ExportConfig

def main(config):
    for number in range(3):
        print("Stra\\u00dfe \\u732b", number, flush=True)
        print("note", number, file=sys.stderr, flush=True)
    print("not flushed")
    Path("done").touch()

run(ExportConfig, main, stop_at_output_error=config_stops)
"""


def execute(
    folder: Path, command: str, stops: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs `PROGRAM` by a shell command, in which it is called PROGRAM."""
    script = folder / "program.py"
    script.write_text(PROGRAM.replace("config_stops", str(stops)))
    called = f"{sys.executable} {script} --ckpt_dir=run"
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command.replace('PROGRAM', called)}"],
        cwd=folder,
        env={**script_environment(folder), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


NOTES = ["note 0", "note 1", "note 2"]


@pytest.mark.parametrize(
    ("command", "code", "reason"),
    [
        ("PROGRAM > /dev/full", 1, "No space left on device"),
        ("PROGRAM >&-", 1, "Bad file descriptor"),
        ("PROGRAM | true", 141, ""),
    ],
)
def test_the_work_is_done_without_standard_output(tmp_path, command, code, reason):
    process = execute(tmp_path, command)
    assert process.returncode == code, process.stderr
    assert (tmp_path / "done").exists()
    lines = process.stderr.splitlines()
    told = [line for line in lines if line not in NOTES]
    assert [line for line in lines if line in NOTES] == NOTES
    expected = f"program.py: standard output cannot be written ({reason}); continuing without it"
    assert told == ([expected] if reason else [])


@pytest.mark.parametrize(
    ("command", "code"),
    [("PROGRAM 2> /dev/full", 1), ("PROGRAM 2>&-", 1), ("PROGRAM <&-", 0), ("PROGRAM", 0)],
)
def test_the_work_is_done_without_standard_error(tmp_path, command, code):
    process = execute(tmp_path, command)
    assert process.returncode == code
    assert (tmp_path / "done").exists()
    assert process.stdout.splitlines() == [*(f"Straße 猫 {n}" for n in range(3)), "not flushed"]


@pytest.mark.parametrize(
    ("command", "code", "error"),
    [
        ("PROGRAM > /dev/full", 2, "program.py: standard output cannot be written (No space left"),
        ("PROGRAM >&-", 2, "program.py: standard output cannot be written (Bad file"),
        ("PROGRAM | true", 141, ""),
    ],
)
def test_a_program_whose_result_is_its_output_ends(tmp_path, command, code, error):
    process = execute(tmp_path, command, stops=True)
    assert process.returncode == code
    assert not (tmp_path / "done").exists()
    lines = [line for line in process.stderr.splitlines() if line not in NOTES]
    assert len(lines) == bool(error)
    assert all(line.startswith(error) for line in lines)


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", "Stra\\xdfe \\u732b"), ("latin-1", "Stra\\xdfe \\u732b")]
)
def test_characters_that_the_terminal_does_not_have_are_escaped(tmp_path, encoding, shown):
    process = execute(tmp_path, "PROGRAM | iconv -f latin1", PYTHONIOENCODING=encoding)
    assert process.returncode == 0, process.stderr
    wanted = shown.replace("\\xdf", "ß") if encoding == "latin-1" else shown
    assert process.stdout.splitlines()[0] == f"{wanted} 0"


def test_a_run_is_trained_without_standard_output(photo_folder, tmp_path):
    flags = [*SMALL_RUN, f"--image_folder={photo_folder}", "--unfreeze_from=none", "--epochs=2"]
    with open("/dev/full", "w") as full, open(tmp_path / "errors", "w+") as errors:
        program = launcher().start(
            [str(ROOT / "run_train.py"), *flags, "--ckpt_dir=run"],
            tmp_path,
            script_environment(tmp_path),
            full,
            errors,
        )
        assert program.wait(120) == 1
        assert os.pread(errors.fileno(), 1000, 0).decode().splitlines() == [
            "run_train.py: standard output cannot be written (No space left on device); "
            "continuing without it"
        ]
    assert len(read_metrics(tmp_path / "run")) >= 2
    assert (tmp_path / "run" / "result.json").exists()
