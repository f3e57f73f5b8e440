"""Runs on storage that is full, read-only, damaged or shared with another run."""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from research.data.folder.folder_options import FolderOptions
from research.data.folder.folder_source import FolderSource
from research.runs.checkpoints import Checkpoints
from research.runs.event_files import EventFiles
from research.runs.restore import find_checkpoint
from research.runs.run_directory import LOCK, RunLock
from research.runs.sealed_files import fingerprint_of
from research.settings.train_config import TrainConfig
from research.system.errors import UserError
from research.train import train
from tests.helpers import (
    FINISHED_RUN,
    ROOT,
    SMALL_CONFIG,
    read_checkpoint,
    read_metrics,
    run_script,
)


class Unreadable(FolderSource):
    """Photos that can be read for some time."""

    reads = 150  # more than the 120 photos of an epoch

    def read(self, split, index):
        self.reads -= 1
        example = super().read(split, index)
        return example if self.reads >= 0 else example._replace(image=None, problem="is gone")


@pytest.fixture(scope="module")
def flags(photo_folder):
    return [*FINISHED_RUN, f"--image_folder={photo_folder}"]


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of the finished run."""
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def damage(run: Path, step: int) -> Path:
    """Flips a bit in the middle of a checkpoint's data."""
    (data,) = (run / "checkpoints" / "latest").glob(f"step-{step}.data-*")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.unlink()  # the best checkpoint is a hard link to the same file
    data.write_bytes(content)
    return data


def assert_same(run: Path, other: Path) -> None:
    expected, found = read_checkpoint(run), read_checkpoint(other)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    steps = [(row["step"], row["photos"]) for row in read_metrics(run)]
    assert [(row["step"], row["photos"]) for row in read_metrics(other)] == steps


def test_a_damaged_last_checkpoint_is_reported_and_the_one_before_is_used(
    finished_run, run, flags, tmp_path
):
    first, last = (row["step"] for row in read_metrics(finished_run))
    damaged = damage(run, last)
    evaluated = run_script(tmp_path, "run_eval.py", "--ckpt_dir=run", "--nopictures")
    assert evaluated.returncode == 0, evaluated.stderr
    (line,) = evaluated.stderr.splitlines()
    assert f"{damaged.name} does not match its checksum; step-{first} is used" in line
    assert (run / "checkpoints" / "latest" / f"step-{first}.test.json").exists()
    resumed = run_script(tmp_path, "run_train.py", *flags)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr == line + "\n"
    assert f"resuming after step {first} of {last}" in resumed.stdout
    assert_same(finished_run, run)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 32 MB; the test is skipped if it cannot be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no permission to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_earlier_checkpoints_are_kept(
    finished_run, run, flags, tmp_path
):
    """A limit on the file size gives the same kind of error as a full disk."""
    first, last = (row["step"] for row in read_metrics(finished_run))
    damage(run, last).unlink()
    # A checkpoint is larger than the limit.
    process = run_script(tmp_path, "run_train.py", *flags, file_size_limit=150_000)
    assert process.returncode == 2, process.stdout
    note, events, line = process.stderr.splitlines()
    assert f"step-{last}.data is missing; step-{first} is used" in note
    assert events.startswith("note: TensorBoard events cannot be written to")  # larger, too
    assert f"checkpoints/latest/step-{last}' cannot be written (" in line
    assert f"--ckpt_dir={run}, which resumes after step-{first}" in line
    assert find_checkpoint(run / "checkpoints", "latest").endswith(f"step-{first}")
    assert not (run / "checkpoints" / "latest" / "partial").exists()


def test_a_disk_that_fills_up_is_one_line(finished_run, run, flags, small_disk):
    first, last = (row["step"] for row in read_metrics(finished_run))
    shutil.copytree(run, small_disk / "run")
    on_disk = small_disk / "run"
    damage(on_disk, last).unlink()
    filler = small_disk / "filler"
    free = shutil.disk_usage(small_disk).free
    filler.write_bytes(bytes(free - 300_000))  # a checkpoint is larger
    process = run_script(small_disk, "run_train.py", *flags)
    assert process.returncode == 2, process.stdout
    assert re.search(r"cannot be written \(.*No space left on device", process.stderr)
    assert f"which resumes after step-{first}" in process.stderr.splitlines()[-1]
    assert find_checkpoint(on_disk / "checkpoints", "latest").endswith(f"step-{first}")


def test_a_read_only_folder_is_one_line(finished_run, flags, small_disk):
    shutil.copytree(finished_run, small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for ckpt_dir in ("run", "new"):
        process = run_script(small_disk, "run_train.py", *flags, f"--ckpt_dir={ckpt_dir}")
        assert process.returncode == 2
        (line,) = process.stderr.splitlines()
        assert f"{ckpt_dir}', which cannot be written (" in line


def test_a_folder_that_cannot_be_created_is_one_line(flags, tmp_path):
    process = run_script(tmp_path, "run_train.py", *flags, "--ckpt_dir=/proc/run")
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert "'/proc/run', which cannot be written (" in line


def test_training_continues_without_event_files(flags, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events").write_text("no folder")
    process = run_script(tmp_path, "run_train.py", *flags, "--histogram_every=1", "--epochs=1")
    assert process.returncode == 0, process.stderr
    (line,) = process.stderr.splitlines()
    assert line.startswith("note: TensorBoard events cannot be written to")
    assert line.endswith("continuing without them")
    assert len(read_metrics(tmp_path / "run")) == 1


def test_event_files_that_fail_later_are_reported_once(tmp_path, capfd):
    files = EventFiles(tmp_path)
    writer = files.writer("train", ".compiled")

    @tf.function(autograph=False)
    def step(number: tf.Tensor) -> None:
        with writer.as_default(number), tf.summary.record_if(files.writable):
            for index in range(300):
                tf.summary.scalar(f"within/{index}", 1.0)

    step(tf.constant(0, tf.int64))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with files.at(0, "train"):
        tf.summary.scalar("outside", 1.0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        step(tf.constant(1, tf.int64))
        files.flush(writer)
        for subfolder in ("train", "validation"):
            with files.at(1, subfolder):
                tf.summary.scalar("outside", 1.0)
        files.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (line,) = capfd.readouterr().err.splitlines()
    assert "cannot be written" in line
    assert not files.writable


def test_a_second_run_in_a_folder_is_refused(run, flags, tmp_path):
    lock = RunLock(run)
    lock.acquire()
    before = (run / LOCK).read_text()
    process = run_script(tmp_path, "run_train.py", *flags)
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert f"is being trained by process {os.getpid()} on" in line
    assert (run / LOCK).read_text() == before
    evaluated = run_script(tmp_path, "run_eval.py", "--ckpt_dir=run", "--nopictures")
    assert evaluated.returncode == 0, evaluated.stderr
    lock.release()
    assert not (run / LOCK).exists()


def test_the_lock_of_a_dead_process_does_not_block(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from research.runs.run_directory import RunLock"
        "; RunLock(Path(sys.argv[1])).acquire(); os._exit(9)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment)
    assert (tmp_path / LOCK).exists()
    lock = RunLock(tmp_path)
    lock.acquire()
    assert (tmp_path / LOCK).read_text().split()[0] == str(os.getpid())
    with pytest.raises(UserError, match=f"is being trained by process {os.getpid()} "):
        RunLock(tmp_path).acquire()
    lock.release()
    RunLock(tmp_path).acquire()


@pytest.fixture
def folder(tmp_path):
    """A folder with three checkpoints; each contains its step."""
    state = tf.train.Checkpoint(value=tf.Variable(tf.zeros(1000)))
    checkpoints = Checkpoints(state, tmp_path, keep=3)
    for step in (8, 9, 10):
        state.value.assign(tf.fill(1000, float(step)))
        checkpoints.save(step, best=step == 10)
    return tmp_path


def restored(folder: Path) -> float:
    """Returns the restored value, and checks that evaluation uses the same checkpoint."""
    value = tf.Variable(tf.zeros(1000))
    checkpoints = Checkpoints(tf.train.Checkpoint(value=value), folder, keep=3)
    assert checkpoints.restore_latest()
    assert find_checkpoint(folder, "latest") == checkpoints.latest
    return float(value[0].numpy())


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 16
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


DATA = "step-10.data-00000-of-00001"


@pytest.mark.parametrize("change", [truncate, flip, empty, os.remove])
@pytest.mark.parametrize("name", [DATA, "step-10.index", "step-10.sha256"])
def test_every_kind_of_damage_is_found(folder, capfd, name, change):
    change(folder / "latest" / name)
    if (name, change) == ("step-10.sha256", os.remove):
        assert restored(folder) == 10  # like a checkpoint of an earlier version
        return
    assert restored(folder) == 9
    (line,) = capfd.readouterr().err.splitlines()  # printed once
    assert "step-10' is damaged: " in line
    assert line.endswith("; step-9 is used")
    with pytest.raises(UserError, match="is not an intact checkpoint"):
        find_checkpoint(folder, str(folder / "latest" / "step-10"))


@pytest.mark.parametrize(
    "pointer", [b"", b"\xff\xfe garbage", b"no: pointer {", b'model_checkpoint_path: ""', None]
)
def test_checkpoints_are_found_without_a_usable_pointer(folder, capfd, pointer):
    file = folder / "latest" / "checkpoint"
    file.unlink() if pointer is None else file.write_bytes(pointer)
    assert restored(folder) == 10
    if pointer is not None:
        assert "names no checkpoint; step-10 is used" in capfd.readouterr().err


def test_a_pointer_to_a_missing_checkpoint_is_reported(folder, capfd):
    file = folder / "latest" / "checkpoint"
    file.write_text(file.read_text().replace("step-10", "step-11"))
    assert restored(folder) == 9
    assert "step-11.index is missing; step-9 is used" in capfd.readouterr().err


def test_a_damaged_checkpoint_is_removed_when_training_continues(folder):
    truncate(folder / "latest" / DATA)
    checkpoints = Checkpoints(tf.train.Checkpoint(value=tf.Variable(tf.zeros(1000))), folder)
    checkpoints.restore_latest()
    checkpoints.save(11)
    names = sorted(path.name for path in (folder / "latest").glob("*.index"))
    assert names == ["step-11.index", "step-9.index"]


def test_the_message_names_the_way_out_if_all_checkpoints_are_damaged(folder):
    for name in ("latest", "best"):
        for file in (folder / name).glob("step-*.data-*"):
            truncate(file)
    state = tf.train.Checkpoint(value=tf.Variable(tf.zeros(1000)))
    with pytest.raises(UserError, match=r"no intact checkpoint .* remove the folder to start over"):
        Checkpoints(state, folder).restore_latest()
    with pytest.raises(UserError, match=r"no intact checkpoint .* give --checkpoint=latest"):
        find_checkpoint(folder, "best")


@pytest.mark.parametrize("keep", [1, 3])
def test_keep_limits_the_number_of_checkpoints(tmp_path, keep):
    checkpoints = Checkpoints(tf.train.Checkpoint(value=tf.Variable(0.0)), tmp_path, keep)
    for step in range(6):
        checkpoints.save(step)
    assert len(list((tmp_path / "latest").glob("*.index"))) == keep
    assert len(list((tmp_path / "latest").iterdir())) == 3 * keep + 1


def test_sha256sum_verifies_a_checkpoint(folder):
    command = ["sha256sum", "-c", "step-10.sha256"]
    for name in ("latest", "best"):
        assert subprocess.run(command, cwd=folder / name, capture_output=True).returncode == 0


@pytest.mark.parametrize("has_checksums", [True, False])
def test_the_fingerprint_of_a_checkpoint_is_that_of_its_weights(tmp_path, has_checksums):
    value = tf.Variable(1.0)
    checkpoints = Checkpoints(tf.train.Checkpoint(value=value), tmp_path, keep=3)
    prefixes = []
    for step, new in enumerate((1.0, 1.0, 2.0)):
        value.assign(new)
        checkpoints.save(step)
        prefixes.append(tmp_path / "latest" / f"step-{step}")
        if not has_checksums:
            prefixes[-1].with_suffix(".sha256").unlink()
    first, same, other = map(fingerprint_of, prefixes)
    assert first != other
    assert has_checksums or first == same  # the checksums are beside the names of the files
    for file in (tmp_path / "latest").glob("step-0.*"):
        file.unlink()
    with pytest.raises(FileNotFoundError):
        fingerprint_of(prefixes[0])


def on_demand(folder: Path) -> TrainConfig:
    """Settings of a run that reads its photos for each batch."""
    return dataclasses.replace(
        SMALL_CONFIG,
        ckpt_dir=str(folder / "run"),
        unfreeze_from="0",
        head_epochs=0,
        epochs=2,
        photo_cache="none",
        trunk_cache="off",
        distribution="none",
    )


def test_a_run_ends_if_its_photos_cannot_be_read_any_more(photo_folder, tmp_path):
    source = Unreadable(str(photo_folder), FolderOptions(shares=(100, 0, 0)))
    with pytest.raises(UserError, match="is gone; another photo that was read before cannot"):
        train(on_demand(tmp_path), source)
    assert len(read_metrics(tmp_path / "run")) == 1


def test_a_run_on_photos_that_are_all_damaged_ends(photo_folder, tmp_path):
    photos = shutil.copytree(photo_folder, tmp_path / "photos")
    source = FolderSource(str(photos), FolderOptions(shares=(100, 0, 0)))
    for file in photos.rglob("*.jpg"):
        file.write_bytes(b"no photo")
    with pytest.raises(UserError, match=r"the train split has no usable photo \(\d+ damaged, for"):
        train(on_demand(tmp_path), source)
    assert read_metrics(tmp_path / "run") == []
