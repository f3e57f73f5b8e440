"""Checks against a prepared cats_vs_dogs and real weights, where they lie beside the project."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import tensorflow as tf

from research.data.loader import DataLoader
from research.data.tfds_source import TfdsSource
from research.runs.console import damage_report
from tests.helpers import ROOT, run_script

SHARED = ROOT.parent / "shared"
WEIGHTS = SHARED / "weights" / "mobilenet_v2_160_dogs_notop.weights.h5"

pytestmark = pytest.mark.skipif(
    not (SHARED / "data" / "cats_vs_dogs").is_dir() or not WEIGHTS.is_file(),
    reason="no prepared cats_vs_dogs and weights in ../shared",
)


def open_source() -> TfdsSource:
    return TfdsSource("cats_vs_dogs", str(SHARED / "data"))


def test_splits_hold_each_photo_once():
    loader = DataLoader(64, 32, source=open_source())
    names = [loader.examples(split).names for split in ("train", "validation", "test")]
    assert [len(part) for part in names] == [1600, 200, 200]
    assert len(set().union(*names)) == 2000
    assert loader.class_names == ("cat", "dog")
    for name, label in zip(names[0], loader.examples("train").labels, strict=True):
        assert loader.get_label_name(label) in name.lower()
    assert damage_report(loader) is None


def test_a_head_on_frozen_features_tells_cats_from_dogs(tmp_path):
    flags = [f"--data_dir={SHARED / 'data'}", f"--weights={WEIGHTS}", "--backbone=MobileNetV2"]
    flags += ["--unfreeze_from=none", "--epochs=3", "--head_optimizer=adam", "--ckpt_dir=run"]
    flags += ["--image_size=128", "--nohorizontal_flip"]  # quicker
    flags += ["--evaluation_scale=1", "--nomirror_averaging"]
    process = run_script(tmp_path, "run_train.py", *flags, "--head_learning_rate=1e-2")
    assert process.returncode == 0, process.stderr
    assert "loaded 260 of 260 variables" in process.stdout
    process = run_script(tmp_path, "run_eval.py", "--ckpt_dir=run", "--nopictures")
    assert process.returncode == 0, process.stderr
    (file,) = (tmp_path / "run" / "checkpoints" / "latest").glob("*.test.json")
    figures = json.loads(file.read_text())
    assert figures["photos"] == 200
    assert figures["accuracy"]["value"] >= 0.95
    check_export(tmp_path)


def check_export(folder):
    """Exported, the run says of the bytes of photos what its checkpoint says of the photos."""
    photos = [bytes(one.image) for one in itertools.islice(open_source().examples("test"), 20)]
    (folder / "photos").mkdir()
    for index, photo in enumerate(photos):
        (folder / "photos" / f"{index:02}.jpg").write_bytes(photo)
    process = run_script(folder, "run_predict.py", "--ckpt_dir=run", "--format=jsonl", "photos")
    assert process.returncode == 0, process.stderr
    said = [json.loads(line)["probabilities"] for line in process.stdout.splitlines()]
    process = run_script(folder, "run_export.py", "--ckpt_dir=run", "--out=exported")
    assert process.returncode == 0, process.stderr
    ask = tf.saved_model.load(str(folder / "exported")).signatures["serving_default"]
    answers = ask(image_bytes=tf.constant(photos))["probabilities"].numpy()
    deviations = np.abs(answers - [[one["cat"], one["dog"]] for one in said])
    assert deviations.max() < 0.05
    assert deviations.mean() < 0.002
