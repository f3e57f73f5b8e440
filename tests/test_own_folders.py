"""An archive with labels in file names, from training to labels that are corrected by hand."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import pytest

from tests.helpers import SMALL_RUN, draw_photos, run_script

PATTERN = r"--label_pattern=([a-z]+)\.\d+"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run that was trained on an archive like that of Kaggle's Dogs vs Cats."""
    folder = tmp_path_factory.mktemp("kaggle")
    (folder / "photos" / "train").mkdir(parents=True)
    draw_photos(folder / "photos", 24)
    for name in ("cat", "dog"):
        for file in (folder / "photos" / name).iterdir():
            file.rename(folder / "photos" / "train" / f"{name}.{int(file.stem[3:])}.jpg")
        (folder / "photos" / name).rmdir()
    (folder / "photos" / "test1").mkdir()
    for index in range(3):
        name = f"{index}.jpg"
        shutil.copy(folder / "photos" / "train" / f"cat.{name}", folder / "photos" / "test1" / name)
    shutil.make_archive(str(folder / "photos"), "zip", folder / "photos")
    shutil.rmtree(folder / "photos")
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    return run_script(
        folder,
        "run_train.py",
        *SMALL_RUN,
        "--image_folder=photos.zip",
        PATTERN,
        "--split=50/25/25",
        "--head_epochs=0",
        "--epochs=1",
        "--ckpt_dir=run",
    )


def test_the_decision_is_printed_before_the_training(trained, folder):
    assert trained.returncode == 0, trained.stderr
    lines = trained.stdout.splitlines()
    assert lines[1:4] == [
        "photos       24 to train on, 12 to validate",
        "splits       train 24, validation 12, test 12; by a hash of each photo's name",
        "             in train; left out: test1 (no class in the names)",
    ]
    assert "note: 3 images (test1/0.jpg, test1/1.jpg, ...) without a class in the name" in lines
    assert json.loads((folder / "run" / "config.json").read_text())["split"] == "50/25/25"


def test_the_run_is_evaluated_on_the_test_photos_of_its_archive(trained, folder):
    process = run_script(folder, "run_eval.py", "--ckpt_dir=run", "--nopictures")
    assert process.returncode == 0, process.stderr
    (file,) = (folder / "run" / "checkpoints" / "latest").glob("*.test.json")
    assert json.loads(file.read_text())["photos"] == 12


def test_predictions_that_are_corrected_by_hand_are_labels(trained, folder):
    process = run_script(folder, "run_predict.py", "--ckpt_dir=run", "--format=csv", "photos.zip")
    assert process.returncode == 0, process.stderr
    header, *rows = csv.reader(io.StringIO(process.stdout))
    assert header[:2] == ["file", "label"]
    assert {row[0] for row in rows if "test1" in row[0]} == {
        f"photos.zip/test1/{index}.jpg" for index in range(3)
    }
    for row in rows[:17]:  # photos of both classes, also if all predictions are the same
        row[1] = {"cat": "dog", "dog": "cat"}[row[1]]
    with (folder / "labels.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=";").writerows([header, *rows])
    flags = ("--image_folder=photos.zip", "--labels=labels.csv", "--split=train+validation+test")
    process = run_script(folder, "run_eval.py", "--ckpt_dir=run", "--nopictures", *flags)
    assert process.returncode == 0, process.stderr
    (file,) = (folder / "run" / "checkpoints" / "latest").glob("*.photos_zip-??????.*.json")
    found = json.loads(file.read_text())
    assert found["photos"] == 51
    assert found["accuracy"]["value"] == pytest.approx(34 / 51)


def test_another_pattern_is_another_run(trained, folder):
    flags = ("--image_folder=photos.zip", "--split=50/25/25", "--ckpt_dir=run")
    options = ("--head_epochs=0", "--epochs=1", r"--label_pattern=train/([a-z]+)\.\d+")
    process = run_script(folder, "run_train.py", *SMALL_RUN, *flags, *options)
    assert process.returncode == 2
    assert "label_pattern was '([a-z]+)\\\\.\\\\d+' and is now 'train/" in process.stderr
