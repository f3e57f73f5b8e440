from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest

from research.runs import pictures
from research.system import devices, environment
from research.system.errors import UserError
from tests.helpers import ROOT, SMALL_RUN, read_checkpoint, run_script, script_environment


@pytest.mark.parametrize("name", ["TF_ENABLE_ONEDNN_OPTS", "TF_NUM_INTRAOP_THREADS"])
def test_variables_of_the_user_are_kept(monkeypatch, name):
    monkeypatch.setenv(name, "7")
    environment.prepare()
    assert os.environ[name] == "7"


def test_onednn_is_enabled_and_threads_match_the_processors(monkeypatch):
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    monkeypatch.delenv("TF_NUM_INTRAOP_THREADS", raising=False)
    monkeypatch.setattr(environment, "processors", lambda: 3)
    environment.prepare()
    assert os.environ["TF_ENABLE_ONEDNN_OPTS"] == "1"
    assert os.environ["TF_NUM_INTRAOP_THREADS"] == "3"


def test_another_keras_is_overruled_and_told(monkeypatch, capsys):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "1")
    environment.prepare()
    assert os.environ["KERAS_BACKEND"] == "tensorflow"
    assert "TF_USE_LEGACY_KERAS" not in os.environ
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["KERAS_BACKEND", "TF_USE_LEGACY_KERAS"]
    environment.prepare()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"floatx": "bfloat16"}', "has floatx 'bfloat16'; remove the file"),
        ('{"epsilon": 1}', "has epsilon 1; remove the file"),
        ('{"image_data_format": "nchw", "floatx": 3}', "has floatx 3 and image_data_format 'nchw'"),
        ("[]", "has no object in braces"),
        ("nonsense", None),  # Keras ignores it
        ('{"floatx": "float64", "epsilon": 0.5, "backend": "torch"}', None),  # overruled
    ],
)
def test_a_file_that_keras_cannot_read_is_one_line(monkeypatch, tmp_path, content, expected):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    (tmp_path / "keras.json").write_text(content)
    if expected is None:
        environment.check_keras_file()
    else:
        with pytest.raises(UserError, match=re.escape(expected)):
            environment.check_keras_file()


@pytest.mark.usefixtures("whole_small_resnet")
def test_settings_in_the_home_folder_do_not_change_a_run(photo_folder, tmp_path):
    """A new process reads them at import. The run is the one without them, bit for bit."""
    flags = [*SMALL_RUN, f"--image_folder={photo_folder}", "--unfreeze_from=none", "--epochs=1"]
    flags += ["--head_optimizer=adam"]
    assert run_script(tmp_path, "run_train.py", *flags, "--ckpt_dir=one").returncode == 0
    (tmp_path / ".keras").mkdir()
    (tmp_path / ".keras" / "keras.json").write_text(
        '{"floatx": "float16", "epsilon": 0.01, "backend": "torch", '
        '"image_data_format": "channels_first"}'
    )
    process = subprocess.run(
        [sys.executable, str(ROOT / "run_train.py"), *flags, "--ckpt_dir=other"],
        cwd=tmp_path,
        env={**script_environment(tmp_path), "HOME": str(tmp_path), "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    told = [line.partition(", but this project needs")[0] for line in process.stderr.splitlines()]
    assert told == [
        "note: KERAS_BACKEND is 'jax'",
        "note: Keras is configured with floatx 'float16'",
        "note: Keras is configured with epsilon 0.01",
        "note: Keras is configured with image_data_format 'channels_first'",
    ]
    one, other = read_checkpoint(tmp_path / "one"), read_checkpoint(tmp_path / "other")
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_keras_with_another_backend_is_refused(monkeypatch):
    monkeypatch.setattr("keras.config.backend", lambda: "torch")
    with pytest.raises(UserError, match="imported with the backend 'torch' before this project"):
        devices.set_up_keras()


def test_tensorflow_is_imported_without_a_folder_for_temporary_files(monkeypatch):
    def refuse() -> None:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(environment.tempfile, "TemporaryFile", refuse)
    environment.import_tensorflow()


def test_training_starts_without_scikit_learn_and_matplotlib_and_others_find_them():
    """A process that imported TensorFlow as the programs do, and one that has all already."""
    code = (
        "from research.system.environment import import_tensorflow; import_tensorflow()\n"
        "import gc, sys, keras, research.train; print({'sklearn', 'matplotlib'} & {*sys.modules})\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 0)\n"
        "from sklearn.metrics import accuracy_score; print(accuracy_score([1, 0], [1, 1]))\n"
        "from research.runs import pictures; print(pictures.png(pictures.history([]))[1:4])"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert process.stdout == "set()\nTrue True\n0.5\nb'PNG'\n", process.stderr

    import sklearn

    gc.disable()
    try:
        environment.import_tensorflow()
        assert not gc.isenabled()  # as the caller left it
    finally:
        gc.enable()
    assert sys.modules["sklearn"] is sklearn


def test_pictures_do_not_depend_on_the_user_s_matplotlib(monkeypatch):
    """With `text.usetex`, drawing would need LaTeX."""
    rows = [{"epoch": 1, "step": 1, "train_loss": 1.0, "validation_loss": 1.0}]
    expected = pictures.png(pictures.history(rows))
    with matplotlib.rc_context({"text.usetex": True, "figure.dpi": 20, "lines.linewidth": 9}):
        assert pictures.png(pictures.history(rows)) == expected
        assert matplotlib.rcParams["lines.linewidth"] == 9
    monkeypatch.setenv("MPLBACKEND", "nonsense")
    environment.prepare()
    assert os.environ["MPLBACKEND"] == "nonsense"  # a notebook keeps its own
    environment.import_tensorflow()
    assert os.environ["MPLBACKEND"] == "agg"


def test_a_flag_that_tensorflow_does_not_know_is_shown(monkeypatch, capfd):
    """TensorFlow writes its message and ends the process while it lists the devices."""

    def list_physical_devices() -> None:
        os.write(2, b"Unknown flag")
        raise SystemExit(1)

    tensorflow = SimpleNamespace(
        config=SimpleNamespace(list_physical_devices=list_physical_devices)
    )
    monkeypatch.setattr(environment.importlib, "import_module", lambda name: tensorflow)
    monkeypatch.setenv("TF_XLA_FLAGS", "--nonsense")
    with pytest.raises(SystemExit):
        environment.import_tensorflow()
    assert capfd.readouterr().err == "Unknown flag"
