"""Files reach the disk in an order that survives a power failure."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
import tensorflow as tf

from research.runs.checkpoints import Checkpoints
from research.runs.durable_files import append_line, write_atomically


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, str]]:
    """The calls of `os.fsync` and `os.replace`, with the name of each file or folder."""
    made: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        made.append(("sync", name.replace(f".{platform.node()}-{os.getpid()}.", ".")))
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        made.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return made


def test_a_file_is_synced_before_it_is_renamed_and_its_folder_afterwards(calls, tmp_path):
    write_atomically(tmp_path / "figures.json", "{}")
    assert calls == [
        ("sync", "figures.json.partial"),
        ("rename", "figures.json"),
        ("sync", tmp_path.name),
    ]


def test_an_appended_line_is_synced(calls, tmp_path):
    append_line(tmp_path / "metrics.jsonl", "{}")
    assert calls == [("sync", "metrics.jsonl")]


def test_a_checkpoint_is_synced_before_its_checksums_and_these_before_the_pointer(calls, tmp_path):
    state = tf.train.Checkpoint(value=tf.Variable(1.0))
    Checkpoints(state, tmp_path).save(7, best=True)
    parts = ["step-7.index", "step-7.data-00000-of-00001"]
    sealed = calls.index(("rename", "step-7.sha256"))
    assert all(calls.index(("sync", part)) < sealed for part in parts)
    # The folder `latest` comes last: the parts, the checksums, the folder, the pointer.
    assert calls[-7:] == [
        *(("rename", name) for name in (*parts, "step-7.sha256")),
        ("sync", "latest"),
        ("sync", "checkpoint.partial"),
        ("rename", "checkpoint"),
        ("sync", "latest"),
    ]
