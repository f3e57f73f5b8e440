"""What several test modules need: drawn photos, and the settings of a small, quick run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np
import tensorflow as tf
from filelock import FileLock

from research.data.built_in.sketches import sketch_jpeg
from research.data.folder_source import FolderSource
from research.data.split_arrays import load_split
from research.runs.checkpoints import Checkpoints
from research.runs.run_directory import RunDirectory
from research.settings.train_config import TrainConfig
from research.training.builder import build_network
from tests.launcher import ROOT, Launcher

# Environment variable: the folder of a test session, which its processes share.
SESSION_FOLDER = "TEST_SESSION_FOLDER"

SMALL_RUN = (
    f"--flagfile={ROOT / 'recipes' / 'article.flags'}",  # which no better default changes
    "--bn_mode=frozen",
    "--backbone=SmallResNet",
    "--weights=none",
    "--unfreeze_from=stage3",
    "--image_size=32",
    "--batch_size=8",
    "--precision=float32",  # whatever the machine is fast in
)

SMALL_CONFIG = TrainConfig(
    backbone="SmallResNet",
    weights="none",
    unfreeze_from="stage3",
    image_size=32,
    batch_size=8,
    precision="float32",
    weight_averaging=0.0,
    mirror_averaging=False,
    evaluation_scale=1.0,
)


# Of the run that the fixture `finished_run` gives.
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


def make_run(folder: Path, photos: Path, steps: Sequence[int] = (4,), **settings: Any) -> Path:
    """Makes a run of random weights without training it, with a checkpoint for each of its steps.

    Each checkpoint has other weights in its head, which tell photos apart; the first one is the
    best. The classes are those of a folder of photos.
    """
    config = dataclasses.replace(SMALL_CONFIG, image_folder=str(photos), ckpt_dir=str(folder))
    config = dataclasses.replace(config, **settings)
    class_names = tuple(sorted(child.name for child in photos.iterdir()))
    directory = RunDirectory(folder)
    directory.create(config, class_names, {})
    built = build_network(config, class_names)
    model, source = built.network.model, FolderSource(str(photos))
    pixels = load_split(source, "train", config.image_size).inputs[0][:16].astype(np.float32)
    features = model.pooling(model.backbone(built.backbone.preprocessing(tf.constant(pixels))))
    step = tf.Variable(0, dtype=tf.int64)
    saved = tf.train.Checkpoint(model=model, step=step, averages=[])
    checkpoints = Checkpoints(saved, directory.checkpoints)
    for seed, number in enumerate(steps):
        kernel = np.random.default_rng(seed).normal(size=model.head.kernel.shape)
        logits = features.numpy() @ kernel
        deviation = logits.std(axis=0)
        scale = 2 / np.where(deviation > 0, deviation, 1)  # 0 where there is but one photo
        model.head.set_weights([kernel * scale, -logits.mean(axis=0) * scale])
        step.assign(number)
        checkpoints.save(number, best=number == steps[0])
    return folder


def draw_photos(folder: Path, count: int) -> Path:
    """Draws `count` photos a class into cat/ and dog/ below a folder."""
    for label, name in enumerate(("cat", "dog")):
        (folder / name).mkdir()
        for index in range(count):
            (folder / name / f"{name}{index:03}.jpg").write_bytes(sketch_jpeg(label, index))
    return folder


def script_environment(folder: Path) -> dict[str, str]:
    """Returns an environment where downloads fail at once, and TFDS prepares sets in `folder`."""
    nowhere = "http://127.0.0.1:9"
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TFDS_DATA_DIR": str(folder / "tfds"),
        "http_proxy": nowhere,
        "https_proxy": nowhere,
        "no_proxy": "",
    }


@functools.cache
def launcher() -> Launcher:
    """The launcher of this process; its server is shared by the processes of a test session."""
    return Launcher(Path(os.environ[SESSION_FOLDER]))


def run_script(
    folder: Path, name: str, *flags: str, file_size_limit: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a script of the project in a folder and returns what it printed."""
    arguments = [str(ROOT / name), *flags]
    return launcher().run(arguments, folder, script_environment(folder), file_size_limit)


def signal_at(script: str, place: str, call: int, *signals: int) -> str:
    """Returns the argument with which signalled.py runs a script that gets signals.

    Args:
      script: name of the script.
      place: a module and a function in it, as `module:function` or `module:Class.method`.
      call: the call of that function, counted from 1, at whose end the signals come.
      *signals: their numbers.
    """
    return ":".join([str(ROOT / script), place, str(call), *(str(int(one)) for one in signals)])


def run_fresh(folder: Path, name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Like `run_script`, in a Python that was not forked from another one."""
    return subprocess.run(
        [sys.executable, str(ROOT / name), *flags],
        cwd=folder,
        env=script_environment(folder),
        capture_output=True,
        text=True,
        timeout=240,
    )


class Started:
    """A script that was started in a folder and can be looked at; it is killed at the end.

    Args:
      folder: the working directory.
      name: of the script.
      flags: of the script.
      environment: variables beside those of `script_environment`.
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
        """Waits for an event; fails if the script ends before it, or if it does not come."""
        deadline = time.monotonic() + seconds
        while not is_there():
            if self.program.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{self.program.args} ended or hangs: {self.stderr}")
            time.sleep(0.002)

    def end(self, seconds: float = 240) -> tuple[int, str, str]:
        """Returns the exit code, standard output and standard error."""
        return self.program.wait(seconds), self.stdout, self.stderr

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return _content(self._stdout)

    @property
    def stderr(self) -> str:
        """What it has printed on standard error so far."""
        return _content(self._stderr)


def _content(file: IO[str]) -> str:
    # Not by seeking: the program writes at the same offset.
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()


def make_once(name: str, make: Callable[[Path], object]) -> Path:
    """Returns a folder of the test session, filled by the process that is the first to need it.

    Its processes share it: no test may change what is in it.
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
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (ckpt_dir / "metrics.jsonl").read_text().splitlines()]


def read_checkpoint(ckpt_dir: Path) -> dict[str, np.ndarray]:
    """Every tensor of the last checkpoint but the time that the run took."""
    return read_tensors(str(ckpt_dir / "checkpoints" / "latest"))


def read_tensors(checkpoint: str) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, or of a folder's last one, but the time that the run took."""
    reader = tf.train.load_checkpoint(checkpoint)
    names = reader.get_variable_to_shape_map()
    return {
        name: reader.get_tensor(name)
        for name in names
        if not name.startswith(("seconds", "save_counter", "_CHECKPOINTABLE"))
    }
