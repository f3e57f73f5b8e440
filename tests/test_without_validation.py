"""Runs whose source has no photos for validation, and evaluation of splits without photos."""

from __future__ import annotations

import dataclasses
import json
import signal

import numpy as np
import pytest

from research.data.loader import DataLoader
from research.evaluation.evaluate import evaluate
from research.runs.restore import find_checkpoint
from research.runs.run_directory import RunDirectory
from research.settings.program_configs import EvalConfig
from research.system.errors import UserError
from research.system.python_file import load_from_file
from research.train import train
from tests.helpers import (
    SMALL_CONFIG,
    SMALL_RUN,
    make_once,
    read_checkpoint,
    read_metrics,
    run_script,
    signal_at,
)

SOURCE = """
import numpy as np
from research.data.source import Example, Source

class Few(Source):
    '''Five training photos per class; test photos of two of the three classes.'''
    class_names = ("dark", "grey", "light")
    labels = {"train": [0, 1, 2] * 5, "validation": [], "test": [0, 1, 1]}

    def count(self, split):
        return len(self.labels[split])

    def examples(self, split):
        for index, label in enumerate(self.labels[split]):
            noise = np.random.default_rng(index).integers(0, 60, (32, 40, 3))
            yield Example((80 * label + noise).astype(np.uint8), label, f"{split}/{index}")

class TrainOnly(Few):
    labels = {"train": [0, 1, 2] * 5, "validation": [], "test": []}

class Damaged(Few):
    def count(self, split):
        return 2 if split == "validation" else super().count(split)

    def examples(self, split):
        if split == "validation":
            yield from (Example(b"", 0, name) for name in "ab")
        else:
            yield from super().examples(split)
"""
FLAGS = (
    *SMALL_RUN,
    "--source=few.py:Few",
    "--batch_size=4",
    "--head_epochs=0",
    "--epochs=2",
    "--bn_mode=train",
    "--horizontal_flip",
    "--weight_averaging=0.9",
    "--trunk_cache=memory",
    "--ckpt_dir=run",
)


@pytest.fixture(scope="module")
def folder():
    """A folder with the source, a finished run, and its terminal output."""

    def make(folder):
        (folder / "few.py").write_text(SOURCE)
        process = run_script(folder, "run_train.py", *FLAGS)
        assert process.returncode == 0, process.stderr
        (folder / "output.txt").write_text(process.stdout + process.stderr)

    return make_once("without_validation", make)


def source_of(folder, name):
    return load_from_file("source", f"{folder / 'few.py'}:{name}")()


def test_a_run_has_only_training_figures(folder):
    rows = read_metrics(folder / "run")
    assert [row["epoch"] for row in rows] == [1, 2]
    assert {"train_loss", "train_accuracy"} <= set(rows[0])
    assert not any("validation" in name for name in rows[0])
    assert json.loads((folder / "run" / "result.json").read_text()) == rows[-1]
    assert not (folder / "run" / "checkpoints" / "best").exists()
    assert sorted(path.name for path in (folder / "run" / "events").iterdir() if path.is_dir()) == [
        "train"
    ]
    assert (folder / "run" / "pictures" / "history.png").exists()


def test_the_terminal_output_has_no_column_of_validation(folder):
    output = (folder / "output.txt").read_text()
    assert "15 to train on, 0 to validate: there will be no best checkpoint\n" in output
    lines = output.splitlines()
    header = next(line for line in lines if line.startswith("  epoch"))
    assert header.split() == ["epoch", "loss", "accuracy", "photos/s", "seconds"]
    (first,) = [line for line in lines if line.startswith("    1/2")]
    assert len(first) == len(header)
    row = read_metrics(folder / "run")[-1]
    closing = f"training loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.4f}"
    assert closing in output
    assert "val. loss" not in output
    assert "nan" not in output.lower()


def test_an_interrupted_run_ends_bit_identical(folder, tmp_path):
    (tmp_path / "few.py").write_text(SOURCE)
    place = signal_at("run_train.py", "research.loop.learner:Learner.train_step", 4, signal.SIGTERM)
    process = run_script(tmp_path, "tests/signalled.py", place, *FLAGS)
    assert process.returncode == 143, process.stderr
    process = run_script(tmp_path, "run_train.py", *FLAGS)
    assert process.returncode == 0, process.stderr
    expected, found = read_checkpoint(folder / "run"), read_checkpoint(tmp_path / "run")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    for key in ("epoch", "step", "photos", "train_loss", "train_accuracy"):
        rows = [[row[key] for row in read_metrics(one / "run")] for one in (folder, tmp_path)]
        assert rows[0] == rows[1]


def test_there_is_no_best_checkpoint(folder):
    with pytest.raises(UserError, match="no best checkpoint, because the run has no validation"):
        find_checkpoint(RunDirectory(folder / "run").checkpoints, "best")


@pytest.mark.parametrize("watch", [False, True])
def test_the_test_split_is_evaluated_without_fitted_values(one_device, folder, capsys, watch):
    config = EvalConfig(ckpt_dir=(str(folder / "run"),), resamples=20, pictures=False, watch=watch)
    (evaluation,) = evaluate(config, source_of(folder, "Few"))
    assert evaluation.scores.decisions is None
    assert "loss_at_temperature" not in evaluation.figures
    output = capsys.readouterr().out
    assert (
        "note: there are no validation photos to choose a temperature or thresholds on\n" in output
    )
    assert "note: no photos of light\n" in output
    written = json.loads(evaluation.to_json())["classes"]
    assert [one["photos"] for one in written] == [1, 2, 0]
    assert written[1]["recall"]["value"] is not None
    assert written[2]["precision"] is written[2]["recall"] is written[2]["f1"] is None


@pytest.mark.parametrize(
    ("name", "split", "filled"),
    [("Few", "validation", "train, test"), ("TrainOnly", "test", "train")],
)
def test_a_split_without_photos_is_not_evaluated(folder, name, split, filled):
    config = EvalConfig(ckpt_dir=(str(folder / "run"),), split=("train", split))
    with pytest.raises(UserError) as error:
        evaluate(config, source_of(folder, name))
    assert str(error.value) == (
        f"split is '{split}', which has no photos; expected a split with photos: {filled}"
    )


def test_early_stopping_needs_validation_photos(folder, tmp_path):
    config = dataclasses.replace(SMALL_CONFIG, early_stopping=2, ckpt_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match="early_stopping is 2, but the validation split has no"):
        train(config, source_of(folder, "Few"))
    assert not (tmp_path / "run").exists()


def test_a_split_with_only_damaged_photos_is_an_error(folder):
    loader = DataLoader(16, 4, source=source_of(folder, "Damaged"))
    with pytest.raises(UserError, match=r"validation split has no usable photo \(2 damaged, for"):
        loader.examples("validation")
    assert len(DataLoader(16, 4, source=source_of(folder, "Few")).examples("validation")) == 0


def test_photos_for_validation_cannot_be_added_to_a_run(folder):
    directory = RunDirectory(folder / "run")
    assert not directory.validates()
    with pytest.raises(UserError, match="validation_photos was 0 and is now 3"):
        directory.check_data({**directory.read_data(), "validation_photos": 3})
