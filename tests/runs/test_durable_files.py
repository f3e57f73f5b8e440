"""What is renamed is on the disk before, in the order in which it must survive a power failure."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tensorflow as tf

from research.runs.checkpoints import Checkpoints
from research.runs.durable_files import append_line, write_atomically


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, str]]:
    """Names of files and folders as they are synced to the disk and get their final name."""
    made: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        made.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        made.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return made


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_its_name_after(calls, tmp_path):
    write_atomically(tmp_path / "figures.json", "{}")
    assert calls == [
        ("sync", "figures.json.partial"),
        ("rename", "figures.json"),
        ("sync", tmp_path.name),
    ]


def test_an_added_line_is_on_the_disk(calls, tmp_path):
    append_line(tmp_path / "metrics.jsonl", "{}")
    assert calls == [("sync", "metrics.jsonl")]


def test_a_checkpoint_is_on_the_disk_before_its_checksums_and_these_before_the_pointer(
    calls, tmp_path
):
    state = tf.train.Checkpoint(value=tf.Variable(1.0))
    Checkpoints(state, tmp_path).save(7, best=True)
    parts = ["step-7.index", "step-7.data-00000-of-00001"]
    sealed = calls.index(("rename", "step-7.sha256"))
    assert all(calls.index(("sync", part)) < sealed for part in parts)
    # In the folder `latest`, which comes last: the parts, the checksums, the folder, the pointer.
    assert calls[-7:] == [
        *(("rename", name) for name in (*parts, "step-7.sha256")),
        ("sync", "latest"),
        ("sync", "checkpoint.partial"),
        ("rename", "checkpoint"),
        ("sync", "latest"),
    ]
