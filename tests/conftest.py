"""Photos that the tests draw for themselves, and the logical devices that they share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from research.system.environment import import_tensorflow

SESSION_FOLDER = "TEST_SESSION_FOLDER"  # environment variable: what the workers of pytest share


def pytest_configure(config: pytest.Config) -> None:
    """Makes the session's folder, and hides GPUs: the tests expect what CPU devices compute.

    To see them, set `CUDA_VISIBLE_DEVICES`.
    """
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    if SESSION_FOLDER not in os.environ:
        folder = os.environ[SESSION_FOLDER] = tempfile.mkdtemp(prefix="tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives each worker tests that follow each other, which share what their module makes."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Imports TensorFlow where tests are run, and not where they are shared out to workers."""
    if session.config.getoption("numprocesses", None) and not hasattr(
        session.config, "workerinput"
    ):
        return
    import_tensorflow()
    import tensorflow as tf

    from research.models import residual
    from tests.launcher import THIN_NETWORKS

    os.environ[THIN_NETWORKS] = "1"
    residual.BLOCKS_PER_STAGE = 1
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
    )


@pytest.fixture
def whole_small_resnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives SmallResNet its two blocks in each stage, in this process and in programs."""
    from research.models import residual
    from tests.launcher import THIN_NETWORKS

    monkeypatch.setattr(residual, "BLOCKS_PER_STAGE", 2)
    monkeypatch.delenv(THIN_NETWORKS)


@pytest.fixture(scope="session")
def photo_folder() -> Path:
    """A folder of 40 drawn cats and 40 drawn dogs, which no test may change."""
    from tests.helpers import draw_photos, make_once

    return make_once("photos", lambda folder: draw_photos(folder, 40))


@pytest.fixture(scope="session")
def finished_run(photo_folder: Path) -> Path:
    """A run of two epochs on `photo_folder`, which no test may change."""
    from tests.helpers import FINISHED_RUN, make_once, run_script

    def make(folder: Path) -> None:
        flags = [*FINISHED_RUN, f"--image_folder={photo_folder}"]
        process = run_script(folder, "run_train.py", *flags)
        assert process.returncode == 0, process.stderr

    return make_once("finished", make) / "run"


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """Trained runs are restored on the first of the logical devices, which is quicker."""
    import tensorflow as tf

    from research.system import devices as runtime

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "make_strategy", lambda distribution: tf.distribute.get_strategy())
        yield
