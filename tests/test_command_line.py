"""The flags of the programs: immediate help, one line per error, no file written."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time

import pytest

from research.settings.program_configs import EvalConfig
from research.settings.train_config import TrainConfig
from tests.helpers import ROOT, SMALL_RUN, run_fresh, run_script


@pytest.mark.parametrize(
    ("script", "config_class"), [("run_train.py", TrainConfig), ("run_eval.py", EvalConfig)]
)
def test_help_lists_every_setting_immediately(tmp_path, script, config_class):
    begin = time.perf_counter()
    process = run_fresh(tmp_path, script, "--help")
    assert time.perf_counter() - begin < 5  # TensorFlow alone takes longer on a slow machine
    assert process.returncode == 0
    assert process.stderr == ""
    for field in dataclasses.fields(config_class):
        assert f"{field.name}:" in process.stdout, field.name
    assert max(map(len, process.stdout.splitlines())) <= 80


def test_flags_and_configs_import_no_tensorflow():
    code = (
        "import sys, flags.command_line, research.settings.train_config; "
        "sys.exit(bool({'tensorflow', 'keras', 'numpy', 'tensorflow_datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--epoch=3",), "Unknown command line flag 'epoch'. Did you mean: epochs"),
        (("--epochs=three",), "flag --epochs=three: expected an integer"),
        (("--head_learning_rate=fast",), "expected a number"),
        (("--deterministic=maybe",), "expected true or false"),
        (("--bn_mode=thawed",), "<frozen|train|sync>"),
        (("--backbone=ResNet101V3",), "nearest: ResNet101V2"),
        (("--batch_size=0",), "batch_size is 0; expected an integer of at least 1"),
        (("--epochs",), "Missing value for flag --epochs"),
        (("epochs=3",), "'epochs=3' is not a flag; write flags as --name=value"),
        (("--flagfile=gone.flags",), "gone.flags"),
        (("--flagfile=marked.flags",), "a flagfile begins with a byte-order mark; save it"),
        (("--split=80/20",), "split is '80/20'; expected three percentages that sum to 100"),
        (("--split=0/50/50",), "split is '0/50/50'; expected three percentages"),
        (("--label_pattern=(a",), "which is no regular expression: missing ), unterminated"),
        (("--label_pattern=a",), "expected a group in parentheses, which matches the class"),
        (("--label_pattern=(a)", "--labels=a_file"), "labels and label_pattern are both given"),
        (("--label_columns=file=a",), "label_columns is 'file=a', but no --labels is given"),
        (("--dataset=digits", "--label_pattern=(a)"), "but no --image_folder is given"),
        # These errors are found after TensorFlow is imported.
        (
            ("--labels=gone.csv",),
            "gone.csv': cannot be read: No such file or directory",
        ),
        (("--labels=a_file",), "has the columns 'not weights'; expected a column for the file"),
        (("--folder_layout=splits",), "no folder of image_folder"),
        (
            ("--image_folder=held_out",),
            "has no photos for training (train 0, validation 0, test",
        ),
        (("--image_folder=gone",), "expected a folder that exists"),
        ((f"--image_folder={'a' * 300}",), "image_folder"),
        (("--dataset=cats_vs_dog",), "nearest: cats_vs_dogs"),
        (("--dataset=mnist:9.9.9",), "cannot be opened"),
        ((f"--ckpt_dir={'a' * 300}",), "which cannot be written"),
        (("--ckpt_dir=a_file/run",), "which cannot be written"),
        (("--ckpt_dir=occupied",), "is not empty and holds no run"),
        ((*SMALL_RUN, "--unfreeze_from=99"), "SmallResNet has 28 layers: expected 0 to 28"),
        ((*SMALL_RUN, "--unfreeze_from=stage9"), "nearest: stage"),
        ((*SMALL_RUN, "--weights=gone.h5"), "gone.h5"),
        ((*SMALL_RUN, "--weights=a_file"), "a_file"),
        (("--backbone=VGG16", "--unfreeze_from=none"), "could not download the ImageNet weights"),
    ],
)
def test_an_error_is_one_line_and_writes_no_file(tmp_path, photo_folder, flags, expected):
    (tmp_path / "a_file").write_text("not weights")
    (tmp_path / "marked.flags").write_text("\ufeff--epochs=3\n", encoding="utf-8")
    (tmp_path / "occupied").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "held_out" / "test" / name).mkdir(parents=True)
        (tmp_path / "held_out" / "test" / name / "1.jpg").write_text(name)
    (tmp_path / "occupied" / "thesis.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    if not any(flag.startswith(("--image_folder", "--dataset")) for flag in flags):
        flags = (f"--image_folder={photo_folder}", *flags)
    process = run_script(tmp_path, "run_train.py", *flags)
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith("run_train.py: ")
    assert expected in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_download_is_one_line_with_alternatives(tmp_path):
    process = run_script(tmp_path, "run_train.py", *SMALL_RUN, "--dataset=cats_vs_dogs")
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    for way_out in ("--data_dir=DIR", "--image_folder=DIR", "--dataset=sketches"):
        assert way_out in line
    assert list(tmp_path.iterdir()) == []
