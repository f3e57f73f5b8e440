"""`run_eval.py` as a process."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from research.data.folder.folder_source import FolderSource
from research.data.loader import DataLoader
from research.loop.builder import build_network
from research.models.wrapper import Wrapper
from research.optimization.averages import WeightAverages
from research.runs.restore import restore_model
from research.settings.train_config import TrainConfig
from tests.helpers import draw_photos, read_metrics, run_script


@pytest.fixture(scope="module")
def trained(finished_run, tmp_path_factory):
    """A folder with a copy of the finished run."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(finished_run, folder / "run")
    return folder


def test_the_output_of_the_article_and_the_json_file(trained, photo_folder):
    process = run_script(trained, "run_eval.py", "--ckpt_dir=run")
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    lines = process.stdout.splitlines()
    assert lines[0] == "SmallResNet"
    assert lines[1] == lines[4] == "-" * len(lines[1])
    (file,) = (trained / "run" / "checkpoints" / "latest").glob("*.test.json")
    figures = json.loads(file.read_text())
    assert lines[2] == f"Loss: {figures['loss']['value']:.2f}"
    assert lines[3] == f"Accuracy: {figures['accuracy']['value']:.2f}"
    assert max(map(len, lines)) <= 80
    assert figures["photos"] == FolderSource(str(photo_folder)).count("test")
    assert figures["split"] == "test"
    assert figures["checkpoint"] == str(file).removesuffix(".test.json")
    assert figures["calibration_error"]["interval"] is None
    for name in ("loss", "accuracy", "roc_auc", "average_precision"):
        low, high = figures[name]["interval"]
        assert low <= figures[name]["value"] <= high
    low, high = figures["accuracy"]["interval"]
    assert low < figures["accuracy"]["value"] <= high
    assert [one["name"] for one in figures["classes"]] == ["cat", "dog"]
    assert sum(one["photos"] for one in figures["confusion"]) == figures["photos"]


def averaged_model(config: TrainConfig, checkpoint: str) -> Wrapper:
    """Returns a model with the averaged weights of a checkpoint."""
    model = build_network(config, ("a", "b"), with_weights=False).network.model
    averages = WeightAverages(model.trainable_variables, config.weight_averaging)
    restore_model(model, checkpoint, averages)
    averages.swap()
    return model


def test_the_metrics_match_a_direct_call_of_the_model(trained, photo_folder):
    run_script(trained, "run_eval.py", "--ckpt_dir=run", "--nopictures", "--split=train")
    (file,) = (trained / "run" / "checkpoints" / "latest").glob("*.train.json")
    figures = json.loads(file.read_text())
    config = TrainConfig.from_json((trained / "run" / "config.json").read_text())
    model = averaged_model(config, figures["checkpoint"])
    loader = DataLoader(32, 8, source=FolderSource(str(photo_folder)))
    images = loader.examples("train").inputs[0].astype("f4") / 127.5 - 1
    labels = loader.examples("train").labels
    logits = model(images).numpy()[:, 0].astype(float)
    losses = np.log1p(np.exp(-logits)) + (1 - labels) * logits
    assert figures["photos"] == len(labels)
    assert figures["accuracy"]["value"] == pytest.approx(np.mean((logits > 0) == labels))
    assert figures["loss"]["value"] == pytest.approx(losses.mean(), rel=1e-4)


def test_another_size_with_mirror_averaging_matches_a_direct_call(trained, photo_folder):
    flags = ["--ckpt_dir=run", "--checkpoint=latest", "--split=validation"]
    flags += ["--image_size=64", "--mirror_averaging=on", "--nopictures"]
    process = run_script(trained, "run_eval.py", *flags)
    assert process.returncode == 0, process.stderr
    assert "64 x 64 pixels, mean of photo and mirror image" in process.stdout
    (file,) = (trained / "run" / "checkpoints" / "latest").glob("*.validation.64px.mirrored.json")
    figures = json.loads(file.read_text())
    assert (figures["image_size"], figures["mirror_averaging"]) == (64, True)
    config = TrainConfig.from_json((trained / "run" / "config.json").read_text())
    model = averaged_model(dataclasses.replace(config, image_size=64), figures["checkpoint"])
    loader = DataLoader(64, 8, source=FolderSource(str(photo_folder)))
    images = loader.examples("validation").inputs[0].astype("f4") / 127.5 - 1
    labels = loader.examples("validation").labels
    both = [model(view).numpy()[:, 0] for view in (images, images[:, :, ::-1])]
    logits = np.mean(both, axis=0).astype(float)
    losses = np.log1p(np.exp(-logits)) + (1 - labels) * logits
    assert figures["loss"]["value"] == pytest.approx(losses.mean(), rel=1e-4)


def test_averaged_weights_are_evaluated(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    assert config["weight_averaging"] > 0
    file.write_text(json.dumps({**config, "evaluation_scale": 2.0}))
    # At the size of the training, the loss is the validation loss of the training.
    same = [
        "--ckpt_dir=run",
        "--checkpoint=latest",
        "--split=validation",
        "--image_size=32",
        "--nopictures",
    ]
    assert run_script(tmp_path, "run_eval.py", *same).returncode == 0
    (figures,) = (tmp_path / "run" / "checkpoints" / "latest").glob("*.validation.32px.json")
    last = read_metrics(tmp_path / "run")[-1]
    assert json.loads(figures.read_text())["loss"]["value"] == pytest.approx(
        last["validation_loss"], rel=1e-4
    )
    file.write_text(json.dumps({**config, "evaluation_scale": 2.0, "mirror_averaging": True}))
    process = run_script(tmp_path, "run_eval.py", "--ckpt_dir=run", "--nopictures")
    assert process.returncode == 0, process.stderr
    assert "64 x 64 pixels, mean of photo and mirror image" in process.stdout


def test_the_batch_size_does_not_change_the_metrics(trained):
    found = []
    for size in (1, 7):
        run_script(trained, "run_eval.py", "--ckpt_dir=run", f"--batch_size={size}", "--nopictures")
        (file,) = (trained / "run" / "checkpoints" / "latest").glob("*.test.json")
        found.append(json.loads(file.read_text()))
    assert found[0]["loss"]["value"] == pytest.approx(found[1]["loss"]["value"], rel=1e-5)
    assert found[0]["accuracy"] == found[1]["accuracy"]


def test_other_photos_with_the_path_of_a_checkpoint(trained, tmp_path):
    (tmp_path / "other").mkdir()
    draw_photos(tmp_path / "other", 20)
    path = tf.train.latest_checkpoint(str(trained / "run" / "checkpoints" / "latest"))
    process = run_script(
        tmp_path,
        "run_eval.py",
        f"--ckpt_dir={trained / 'run'}",
        f"--checkpoint={path}",
        "--nopictures",
        f"--image_folder={tmp_path / 'other'}",
    )
    assert process.returncode == 0, process.stderr
    (file,) = Path(path).parent.glob(f"{Path(path).name}.other-??????.test.json")
    figures = json.loads(file.read_text())
    assert figures["photos"] == FolderSource(str(tmp_path / "other")).count("test")


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), "ckpt_dir is not given"),
        (("--ckpt_dir=run", "--ckpt_dir=nowhere"), "expected the folder of a training run"),
        (("--ckpt_dir=run", "--checkpoint=worst"), "expected best, latest, or the path"),
        (("--ckpt_dir=run", "--image_folder=gone"), "expected a folder that exists"),
        (("--ckpt_dir=run", "--batch_size=0"), "batch_size is 0"),
        (
            ("--ckpt_dir=run", "--split=test", "--split=tests"),
            "split is 'tests'; expected train",
        ),
        (("--ckpt_dir=run", "--predictions=."), "cannot be written"),
        (("--ckpt_dir=gone", "--watch", "--watch_timeout=1"), "no run began in"),
    ],
)
def test_an_error_is_one_line_and_writes_no_file(trained, flags, expected):
    before = files(trained)
    process = run_script(trained, "run_eval.py", *flags)
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert expected in line
    assert files(trained) == before


def test_photos_of_other_classes_are_refused(trained, tmp_path):
    draw_photos(tmp_path, 10)
    (tmp_path / "dog").rename(tmp_path / "wolf")
    process = run_script(trained, "run_eval.py", "--ckpt_dir=run", f"--image_folder={tmp_path}")
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert "cat, wolf" in line
    assert "cat, dog" in line


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"backbone": "MobileNetV2"}, "does not fit the model of config.json"),
        ({"unknown": 1}, "does not know"),
    ],
)
def test_a_ckpt_dir_of_another_model_is_refused(trained, tmp_path, change, expected):
    shutil.copytree(trained / "run", tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    process = run_script(tmp_path, "run_eval.py", "--ckpt_dir=run")
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert expected in line


def test_a_run_without_a_checkpoint_is_refused(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    process = run_script(tmp_path, "run_eval.py", "--ckpt_dir=run")
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert "has no latest checkpoint yet" in line


def test_a_damaged_checkpoint_is_refused(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints" / "latest").glob("*.data*"):
        file.write_bytes(file.read_bytes()[:1000])
    process = run_script(tmp_path, "run_eval.py", "--ckpt_dir=run")
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1
