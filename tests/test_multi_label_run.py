"""A run with several labels per photo: training, evaluation, prediction and export as programs."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from research.evaluation.evaluate import evaluate
from research.settings.program_configs import EvalConfig
from research.system.errors import UserError
from tests.helpers import SMALL_RUN, make_once, make_run, read_metrics, run_script

SOURCE = '''
import numpy as np

from research.data.source import Example, Source


class Patches(Source):
    """The left half is red or not, the right half is green or not; one training photo is blue."""

    class_names = ("red", "green", "blue")

    def count(self, split):
        return 64 if split == "train" else 24

    def examples(self, split):
        generator = np.random.default_rng(len(split))
        for index in range(self.count(split)):
            image = generator.integers(90, 110, size=(32, 32, 3)).astype(np.uint8)
            red, green = generator.random(2) < 0.5
            image[:, :16, 0] += np.uint8(140 * red)
            image[:, 16:, 1] += np.uint8(140 * green)
            blue = split == "train" and index == 0
            yield Example(image, np.array([red, green, blue], np.uint8), f"{split}/{index}.png")

'''
RUN = (
    *SMALL_RUN,
    "--unfreeze_from=0",
    "--bn_mode=train",
    "--head_epochs=0",
    "--epochs=3",
    "--backbone_learning_rate=3e-3",
    "--head_learning_rate=3e-3",
    "--evaluation_scale=1",
    "--nohorizontal_flip",
    "--nomirror_averaging",
)
SEVERAL = ("--task=multi_label", "--source=patches.py:Patches")


def succeeded(folder: Path, name: str, *flags: str):
    process = run_script(folder, name, *flags)
    assert process.returncode == 0, process.stderr
    return process


@pytest.fixture(scope="module")
def trained() -> Path:
    """A folder with a run, its evaluation, and photos to predict."""

    def make(folder: Path) -> None:
        (folder / "patches.py").write_text(SOURCE)
        options = ("--mixup=0.1", "--label_smoothing=0.02")
        flags = (*RUN, *SEVERAL, *options, "--ckpt_dir=run")
        process = succeeded(folder, "run_train.py", *flags)
        (folder / "training.txt").write_text(process.stdout)
        early = succeeded(folder, "run_predict.py", "--ckpt_dir=run", "run/pictures")
        (folder / "early.txt").write_text(early.stderr)
        flags = ("--ckpt_dir=run", "--source=patches.py:Patches", "--predictions=said.csv")
        process = succeeded(folder, "run_eval.py", *flags, "--resamples=20")
        (folder / "evaluation.txt").write_text(process.stdout)
        (folder / "photos").mkdir()
        generator = np.random.default_rng(0)
        for name, channels in (("none", ()), ("red", (0,)), ("both", (0, 1))):
            image = generator.integers(90, 110, size=(32, 32, 3)).astype(np.uint8)
            for channel in channels:
                image[:, 16 * channel : 16 * channel + 16, channel] += 140
            Image.fromarray(image).save(folder / "photos" / f"{name}.png")

    return make_once("multi_label", make)


def test_training_records_metrics_of_each_class_and_averaged(trained):
    first, *_, last = read_metrics(trained / "run")
    assert last["validation_average_precision"] > 0.9
    assert last["validation_loss"] < first["validation_loss"]
    assert last["validation_average_precision/red"] > 0.9
    assert last["validation_average_precision/blue"] is None  # no validation photo is blue
    assert {"validation_exact_match", "validation_cross_entropy/blue"} <= set(last)
    printed = (trained / "training.txt").read_text()
    assert "val. mAP" in printed
    assert "/blue" not in printed
    events = EventAccumulator(str(trained / "run" / "events" / "validation"))
    events.Reload()
    assert {"average_precision", "average_precision/green"} <= set(events.Tags()["tensors"])


def test_the_evaluation_has_thresholds_tables_pictures_and_events(trained):
    printed = (trained / "evaluation.txt").read_text()
    assert max(len(line) for line in printed.splitlines() if "photos of" not in line) <= 80
    assert "note: no photo has the label blue" in printed
    (file,) = (trained / "run" / "checkpoints" / "latest").glob("*.test.json")
    found = json.loads(file.read_text())
    thresholds = found["decisions"]["thresholds"]
    assert thresholds["blue"] == 0.5
    assert [one["threshold"] for one in found["classes"]] == list(thresholds.values())
    assert found["classes"][2]["f1"] is None
    assert found["classes"][0]["average_precision"]["value"] > 0.9
    for name in ("average_precision", "micro_f1", "f1_at_thresholds", "loss"):
        low, high = found[name]["interval"]
        assert low <= found[name]["value"] <= high
    folder = next((trained / "run" / "pictures").glob("*.test"))
    drawn = {file.stem for file in folder.iterdir()}
    assert {"classes", "reliability", "roc_curve", "precision_recall_curve"} <= drawn
    events = EventAccumulator(str(next((trained / "run" / "events").glob("evaluation_*"))))
    events.Reload()
    tags = set(events.Tags()["tensors"])
    assert {"average_precision", "classes", "precision_recall/red/pr_curves"} <= tags
    with (trained / "said.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == found["photos"] == 24
    right = [row["label"] == row["predicted"] for row in rows]
    assert found["exact_match_at_thresholds"]["value"] == pytest.approx(np.mean(right))
    assert {row["label"] for row in rows} == {"", "red", "green", "red;green"}


def test_prediction_uses_the_thresholds_and_says_which(trained):
    assert "note: 0.5 is the threshold of each label" in (trained / "early.txt").read_text()
    process = succeeded(trained, "run_predict.py", "--ckpt_dir=run", "--format=csv", "photos")
    (note,) = process.stderr.splitlines()
    assert ".thresholds-32px.json are used" in note
    rows = list(csv.DictReader(io.StringIO(process.stdout)))
    assert list(rows[0]) == ["file", "label", *(f"probability {name}" for name in
                             ("red", "green", "blue"))]  # fmt: skip
    labels = {Path(row["file"]).stem: row["label"] for row in rows}
    assert labels == {"both": "red;green", "none": "", "red": "red"}
    process = succeeded(trained, "run_predict.py", "--ckpt_dir=run", "--format=jsonl", "photos")
    one = json.loads(process.stdout.splitlines()[0])
    assert set(one) == {"file", "label", "probabilities"}
    process = succeeded(trained, "run_predict.py", "--ckpt_dir=run", "photos")
    table = [line.split("  ", 1)[1].strip() for line in process.stdout.splitlines()]
    assert table[0] == "labels and probabilities"
    assert table[2] == "-"
    assert table[1].startswith("red 0.")


def test_an_exported_model_says_the_same_as_run_predict(trained, tmp_path):
    (tmp_path / "run").symlink_to(trained / "run")
    process = succeeded(tmp_path, "run_export.py", "--ckpt_dir=run", f"--out={tmp_path / 'model'}")
    assert "thresholds: " in process.stdout
    (file,) = (trained / "run" / "checkpoints" / "latest").glob("*.thresholds-*.json")
    extra = json.loads((tmp_path / "model" / "assets.extra" / "thresholds.json").read_text())
    assert extra == json.loads(file.read_text())["thresholds"]
    process = succeeded(trained, "run_predict.py", "--ckpt_dir=run", "--format=csv", "photos")
    rows = list(csv.DictReader(io.StringIO(process.stdout)))
    encoded = tf.constant([(trained / row["file"]).read_bytes() for row in rows])
    signature = tf.saved_model.load(str(tmp_path / "model")).signatures["serving_default"]
    answer = signature(image_bytes=encoded)
    assert [text.decode() for text in answer["label"].numpy()] == [row["label"] for row in rows]
    numbers = [[float(row[f"probability {name}"]) for name in extra] for row in rows]
    assert answer["probabilities"].numpy() == pytest.approx(np.array(numbers), abs=1e-4)


def test_labels_that_are_not_those_of_the_task_are_refused_before_training(trained, tmp_path):
    (tmp_path / "patches.py").write_text(SOURCE)
    flags = (*RUN, "--source=patches.py:Patches", "--ckpt_dir=run")
    process = run_script(tmp_path, "run_train.py", *flags)
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert "in the train split, labels are int32 of shape (3,) per photo" in line
    assert "--task=multi_label" in line
    assert not (tmp_path / "run").exists()


def test_runs_of_different_kinds_are_not_compared(trained, photo_folder, tmp_path):
    one = make_run(tmp_path / "one", photo_folder)
    config = EvalConfig(ckpt_dir=(str(trained / "run"), str(one)))
    with pytest.raises(UserError, match="expected runs of the same kind: evaluate them one by one"):
        evaluate(config)
