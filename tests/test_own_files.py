"""Tasks, augmentations, sources, optimizers and trackers in files of the user's own, as flags."""

from __future__ import annotations

import json
import shutil
import signal

import keras
import numpy as np
import pytest

from tests.helpers import (
    SMALL_RUN,
    read_checkpoint,
    read_metrics,
    run_script,
    signal_at,
)
from tests.launcher import ROOT

FLAGS = (*SMALL_RUN, "--head_epochs=1", "--epochs=1", "--ckpt_dir=run")

TRACKER = """
from research.runs.tracker import Tracker
class Lines(Tracker):
    def begin(self, settings, folder):
        self._write("begin", settings["backbone"], folder)
    def interval(self, step, figures):
        self._write("interval", step, sorted(figures)[:2])
    def epoch(self, row):
        self._write("epoch", row["epoch"], row["validation_loss"])
        if row["epoch"] == 1:
            raise OSError("no route to host")
    def end(self, result):
        self._write("end")
    def _write(self, *words):
        with open("tracked.txt", "a") as file:
            print(*words, file=file)
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory, photo_folder):
    """A folder with a run whose task, augmentation, optimizer and tracker are files of its own."""
    folder = tmp_path_factory.mktemp("own")
    for name in ("dropout_head", "random_erasing", "lars"):
        shutil.copy(ROOT / "examples" / f"{name}.py", folder)
    (folder / "lines.py").write_text(TRACKER)
    return folder


@pytest.fixture(scope="module")
def flags(photo_folder):
    return [
        *FLAGS,
        f"--image_folder={photo_folder}",
        "--task=dropout_head.py:DropoutHead",
        "--augmentation=random_erasing.py:RandomErasing",
        "--backbone_optimizer=lars.py:Lars",
        "--tracker=lines.py:Lines",
    ]


@pytest.fixture(scope="module")
def trained(own, flags):
    process = run_script(own, "run_train.py", *flags)
    assert process.returncode == 0, process.stderr
    return process


def test_a_run_is_trained_by_files_of_one_s_own_and_says_so(own, trained):
    assert f"task         {'dropout_head.py:DropoutHead'}\n" in trained.stdout
    assert "trunk cache  off: RandomErasing shows photos differently every time" in trained.stdout
    assert "Lars 0.0001" in trained.stdout
    config = json.loads((own / "run" / "config.json").read_text())
    assert config["task"] == f"{own / 'dropout_head.py'}:DropoutHead"
    assert set(config["sha256_of_python_files"]) == {"task", "augmentation", "backbone_optimizer"}
    assert len(read_metrics(own / "run")) == 2


def test_a_failing_tracker_is_told_once_and_training_goes_on(own, trained):
    (line,) = trained.stderr.splitlines()
    assert line == (
        "note: the tracker Lines failed in epoch() (OSError: no route to host); training continues "
        "without it"
    )
    tracked = (own / "tracked.txt").read_text().splitlines()
    assert tracked[0].startswith("begin SmallResNet ")
    assert tracked[1].startswith("interval ")
    assert tracked[-1].startswith("epoch 1 ")


@pytest.mark.parametrize("script", ["run_eval.py", "run_predict.py", "run_export.py"])
def test_code_is_not_imported_because_a_run_names_it(own, trained, script):
    process = run_script(own, script, "--ckpt_dir=run")
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert "is only imported if you name it" in line or script == "run_predict.py"


@pytest.fixture
def files_not_named(own):
    """Makes the files that only config.json names fail if they are imported."""
    files = [own / f"{name}.py" for name in ("random_erasing", "lars", "lines")]
    contents = [file.read_text() for file in files]
    for file in files:
        file.write_text("raise RuntimeError('imported although no flag names it')")
    yield
    for file, content in zip(files, contents, strict=True):
        file.write_text(content)


@pytest.mark.usefixtures("files_not_named")
def test_a_run_with_a_head_of_its_own_is_evaluated_used_and_exported(own, trained, photo_folder):
    task = "--task=dropout_head.py:DropoutHead"
    evaluation = run_script(own, "run_eval.py", "--ckpt_dir=run", task, "--nopictures")
    assert evaluation.returncode == 0, evaluation.stderr
    assert "task loss" in evaluation.stdout
    (file,) = (own / "run" / "checkpoints" / "latest").glob("*.test.json")
    figures = json.loads(file.read_text())
    assert figures["task_loss"]["value"] == pytest.approx(figures["loss"]["value"], rel=1e-4)
    photo = next(iter(sorted((photo_folder / "cat").iterdir())))
    said = run_script(own, "run_predict.py", "--ckpt_dir=run", task, "--format=jsonl", str(photo))
    assert said.returncode == 0, said.stderr
    export = run_script(own, "run_export.py", "--ckpt_dir=run", task, "--format=keras")
    assert export.returncode == 0, export.stderr

    from research.data.decode import decode_image

    model = keras.saving.load_model(own / "run" / "export" / "model.keras")
    pixels = decode_image(photo.read_bytes(), model.input_shape[1]).astype(np.float32)
    expected = list(json.loads(said.stdout)["probabilities"].values())
    np.testing.assert_allclose(model(pixels[np.newaxis])[0], expected, atol=1e-4)


def test_a_file_that_changed_is_refused_and_told(own, trained, flags):
    file = own / "dropout_head.py"
    content = file.read_text()
    file.write_text(content.replace("0.5", "0.4"))
    try:
        process = run_script(own, "run_train.py", *flags)
        assert process.returncode == 2
        assert "whose content changed since the run in" in process.stderr
        evaluation = run_script(
            own,
            "run_eval.py",
            "--ckpt_dir=run",
            "--task=dropout_head.py:DropoutHead",
            "--nopictures",
        )
        assert evaluation.returncode == 0
        assert "differs from the file that the run was trained with" in evaluation.stderr
    finally:
        file.write_text(content)


def test_a_run_that_was_killed_ends_as_the_whole_one(own, trained, flags, tmp_path):
    killed = [flag for flag in flags if not flag.startswith(("--ckpt_dir", "--tracker"))]
    killed += [f"--ckpt_dir={tmp_path / 'run'}", "--checkpoint_every=2"]
    step = "research.loop.learner:Learner.train_steps"
    at = signal_at("run_train.py", step, 5, signal.SIGKILL)
    assert run_script(own, "tests/signalled.py", at, *killed).returncode == -signal.SIGKILL
    process = run_script(own, "run_train.py", *killed)
    assert process.returncode == 0, process.stderr
    expected, found = read_checkpoint(own / "run"), read_checkpoint(tmp_path / "run")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(value, found[name], err_msg=name)


def test_a_run_on_a_source_of_its_own_is_evaluated_on_nothing_else_unasked(tmp_path):
    source = f"--source={ROOT / 'examples' / 'array_source.py'}:Shapes"
    process = run_script(tmp_path, "run_train.py", *FLAGS, "--head_epochs=0", source)
    assert process.returncode == 0, process.stderr
    assert f"python run_eval.py --ckpt_dir=run {source}\n" in process.stdout
    refused = run_script(tmp_path, "run_eval.py", "--ckpt_dir=run")
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert f"give {source}, or other photos with --dataset or --image_folder" in line
    evaluation = run_script(tmp_path, "run_eval.py", "--ckpt_dir=run", source, "--nopictures")
    assert evaluation.returncode == 0, evaluation.stderr
    assert "50 photos of" in evaluation.stdout
    assert "loss at temperature" in evaluation.stdout  # its own photos: chosen on validation
