"""Shared by test modules: drawn photos, settings of a small run, and functions to run scripts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import keras
import numpy as np
import tensorflow as tf
from filelock import FileLock

from research.data.built_in.sketches import sketch_jpeg
from research.data.folder.folder_source import FolderSource
from research.loop.agreement import list_photos
from research.loop.builder import build_network, make_loader
from research.models.wrapper import Wrapper
from research.runs.checkpoints import Checkpoints
from research.runs.run_directory import RunDirectory
from research.settings.train_config import TrainConfig
from tests.launcher import ROOT, Launcher

# Environment variable with the folder that the processes of a test session share.
SESSION_FOLDER = "TEST_SESSION_FOLDER"

SMALL_RUN = (
    f"--flagfile={ROOT / 'recipes' / 'article.flags'}",  # independent of the defaults
    "--bn_mode=frozen",
    "--backbone=SmallResNet",
    "--weights=none",
    "--unfreeze_from=stage3",
    "--image_size=32",
    "--batch_size=8",
    "--precision=float32",  # on every machine
)

SMALL_CONFIG = TrainConfig(
    backbone="SmallResNet",
    weights="none",
    unfreeze_from="stage3",
    image_size=32,
    batch_size=8,
    precision="float32",
    steps_per_epoch=0,
    head_epochs=3,
    horizontal_flip=True,
    random_crop_area=1.0,
    backbone_learning_rate=3e-5,
    weight_averaging=0.0,
    mirror_averaging=False,
    evaluation_scale=1.0,
)


# Flags of the fixture `finished_run`.
FINISHED_RUN = (
    *SMALL_RUN,
    "--head_epochs=0",
    "--epochs=2",
    "--bn_mode=train",
    "--horizontal_flip",
    "--weight_averaging=0.9",
    "--backbone_optimizer=adam",
    "--trunk_cache=memory",
    "--ckpt_dir=run",
)


def randomize_head(model: Wrapper, seed: int = 0) -> Wrapper:
    """Gives the head random weights, with which logits differ and the backbone has gradients."""
    initial = keras.initializers.GlorotUniform(seed=seed)
    for variable in model.head.trainable_variables:
        if len(variable.shape) > 1:
            variable.assign(initial(variable.shape))
    return model


def make_run(folder: Path, photos: Path, steps: Sequence[int] = (4,), **settings: Any) -> Path:
    """Writes a run with random weights, without training, with a checkpoint for each of `steps`.

    The head of each checkpoint has different weights, with predictions that differ between photos.
    The first checkpoint is the best.
    """
    config = dataclasses.replace(SMALL_CONFIG, image_folder=str(photos), ckpt_dir=str(folder))
    config = dataclasses.replace(config, **settings)
    loader = make_loader(config, FolderSource(str(photos)))
    directory = RunDirectory(folder)
    directory.create(config, loader.class_names, {}, list_photos(loader))
    built = build_network(config, loader.class_names)
    model = built.network.model
    pixels = loader.examples("train").inputs[0][:16].astype(np.float32)
    features = model.pooling(model.backbone(built.backbone.preprocessing(tf.constant(pixels))))
    step = tf.Variable(0, dtype=tf.int64)
    saved = tf.train.Checkpoint(model=model, step=step, averages=[])
    checkpoints = Checkpoints(saved, directory.checkpoints)
    for seed, number in enumerate(steps):
        kernel = np.random.default_rng(seed).normal(size=model.head.kernel.shape)
        logits = features.numpy() @ kernel
        deviation = logits.std(axis=0)
        scale = 2 / np.where(deviation > 0, deviation, 1)  # 0 for a single photo
        model.head.set_weights([kernel * scale, -logits.mean(axis=0) * scale])
        step.assign(number)
        checkpoints.save(number, best=number == steps[0])
    return folder


def draw_photos(folder: Path, count: int) -> Path:
    """Draws `count` photos per class into the subfolders cat/ and dog/."""
    for label, name in enumerate(("cat", "dog")):
        (folder / name).mkdir()
        for index in range(count):
            (folder / name / f"{name}{index:03}.jpg").write_bytes(sketch_jpeg(label, index))
    return folder


def free_ports(count: int) -> list[int]:
    """Returns different ports of the loopback interface that no process uses."""
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [server.getsockname()[1] for server in servers]


def script_environment(folder: Path) -> dict[str, str]:
    """Returns an environment where downloads fail at once and TFDS stores data in `folder`."""
    closed_port = "http://127.0.0.1:9"
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TFDS_DATA_DIR": str(folder / "tfds"),
        "http_proxy": closed_port,
        "https_proxy": closed_port,
        "no_proxy": "",
    }


@functools.cache
def launcher() -> Launcher:
    """Returns the launcher of this process; all processes of a test session share its server."""
    return Launcher(Path(os.environ[SESSION_FOLDER]))


def run_script(
    folder: Path, name: str, *flags: str, file_size_limit: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a script of the project in a folder; returns its exit code and output."""
    arguments = [str(ROOT / name), *flags]
    return launcher().run(arguments, folder, script_environment(folder), file_size_limit)


def signal_at(script: str, place: str, call: int, *signals: int) -> str:
    """Returns the first argument of signalled.py, which sends signals to a script.

    Args:
      script: name of the script.
      place: a module and a function in it, as `module:function` or `module:Class.method`.
      call: the number of the call, from 1, at whose end the signals are sent.
      *signals: signal numbers.
    """
    return ":".join([str(ROOT / script), place, str(call), *(str(int(one)) for one in signals)])


def run_fresh(folder: Path, name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Does the same as `run_script` in a new Python process, without the launcher."""
    return subprocess.run(
        [sys.executable, str(ROOT / name), *flags],
        cwd=folder,
        env=script_environment(folder),
        capture_output=True,
        text=True,
        timeout=240,
    )


class Started:
    """A script running in a folder, whose output can be read; the context manager kills it.

    Args:
      folder: the working directory.
      name: of the script.
      flags: of the script.
      environment: variables added to `script_environment`.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        flags: Sequence[str],
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        with contextlib.ExitStack() as files:
            self._stdout = files.enter_context(tempfile.TemporaryFile("w+"))
            self._stderr = files.enter_context(tempfile.TemporaryFile("w+"))
            self._files = files.pop_all()
        self.program = launcher().start(
            [str(ROOT / name), *flags],
            folder,
            {**script_environment(folder), **environment},
            self._stdout,
            self._stderr,
        )

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.program.kill()
        self.program.wait()
        self._files.close()

    def wait_until(self, is_there: Callable[[], object], seconds: float = 120) -> None:
        """Waits until `is_there()` is true; fails if the script ends first or after `seconds`."""
        deadline = time.monotonic() + seconds
        while not is_there():
            if self.program.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(
                    f"{self.program.args} ended or does not respond: {self.stderr}"
                )
            time.sleep(0.002)

    def end(self, seconds: float = 240) -> tuple[int, str, str]:
        """Returns the exit code, standard output and standard error."""
        return self.program.wait(seconds), self.stdout, self.stderr

    @property
    def stdout(self) -> str:
        """Standard output so far."""
        return _content(self._stdout)

    @property
    def stderr(self) -> str:
        """Standard error so far."""
        return _content(self._stderr)


def _content(file: IO[str]) -> str:
    # Without seek, because the program shares the file offset.
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()


def make_once(name: str, make: Callable[[Path], object]) -> Path:
    """Returns a folder of the test session, filled by the first process that needs it.

    All processes of the session share the folder: tests must not change its content.
    """
    folder = Path(os.environ[SESSION_FOLDER]) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            made = folder.with_name(f"{name}.partial")
            made.mkdir()
            make(made)
            made.rename(folder)
    return folder


def read_metrics(ckpt_dir: Path) -> list[dict]:
    """Returns the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (ckpt_dir / "metrics.jsonl").read_text().splitlines()]


def read_checkpoint(ckpt_dir: Path) -> dict[str, np.ndarray]:
    """Returns all tensors of a run's last checkpoint, except the duration of the run."""
    return read_tensors(str(ckpt_dir / "checkpoints" / "latest"))


def read_tensors(checkpoint: str) -> dict[str, np.ndarray]:
    """Returns all tensors of a checkpoint, or of a folder's last one, except the run's duration."""
    reader = tf.train.load_checkpoint(checkpoint)
    names = reader.get_variable_to_shape_map()
    return {
        name: reader.get_tensor(name)
        for name in names
        if not name.startswith(("seconds", "save_counter", "_CHECKPOINTABLE"))
    }
