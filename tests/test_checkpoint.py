from __future__ import annotations

import os
from pathlib import Path

import pytest
import tensorflow as tf

from research.runs import checkpoints as checkpoints_module
from research.runs.checkpoints import Checkpoints
from research.runs.restore import find_checkpoint


@pytest.fixture
def state():
    return tf.train.Checkpoint(value=tf.Variable(0.0))


def saved_value(folder: Path, which: str) -> float:
    value = tf.Variable(-1.0)
    path = find_checkpoint(folder, which)
    tf.train.Checkpoint(value=value).read(path).assert_existing_objects_matched()
    return float(value.numpy())


def save(checkpoints, state, step, best=False):
    state.value.assign(step)
    checkpoints.save(step, best)


def test_the_best_checkpoint_is_kept_while_older_ones_are_removed(state, tmp_path):
    checkpoints = Checkpoints(state, tmp_path)
    save(checkpoints, state, 1, best=True)
    for step in (2, 3, 4):
        save(checkpoints, state, step)
    assert saved_value(tmp_path, "best") == 1
    assert saved_value(tmp_path, "latest") == 4
    assert {path.name for path in (tmp_path / "latest").glob("*.index")} == {
        "step-3.index",
        "step-4.index",
    }
    save(checkpoints, state, 5, best=True)
    assert saved_value(tmp_path, "best") == 5
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == [
        "checkpoint",
        "step-5.data-00000-of-00001",
        "step-5.index",
        "step-5.sha256",
    ]


def test_a_run_killed_before_the_pointer_of_latest_repeats_the_epoch(state, tmp_path, monkeypatch):
    checkpoints = Checkpoints(state, tmp_path)
    save(checkpoints, state, 1, best=True)
    point = checkpoints_module.point

    def killed(folder, names):
        if folder.name == "latest":
            raise KeyboardInterrupt
        point(folder, names)

    monkeypatch.setattr(checkpoints_module, "point", killed)
    with pytest.raises(KeyboardInterrupt):
        save(checkpoints, state, 2, best=True)
    monkeypatch.undo()
    assert saved_value(tmp_path, "latest") == 1
    assert saved_value(tmp_path, "best") == 2
    save(Checkpoints(state, tmp_path), state, 2, best=True)
    assert saved_value(tmp_path, "latest") == saved_value(tmp_path, "best") == 2


def test_files_of_other_programs_beside_a_checkpoint_are_kept(state, tmp_path):
    checkpoints = Checkpoints(state, tmp_path)
    save(checkpoints, state, 1, best=True)
    (tmp_path / "best" / "folder").mkdir()
    files = [tmp_path / which / "step-1.test.json.partial" for which in ("latest", "best")]
    files.append(tmp_path / "best" / "step-1.test.json")
    for file in files:
        file.write_text("{")
    save(checkpoints, state, 2, best=True)
    assert all(file.read_text() == "{" for file in files)
    assert (tmp_path / "best" / "folder").exists()


def test_the_best_checkpoint_is_a_hard_link(state, tmp_path):
    save(Checkpoints(state, tmp_path), state, 1, best=True)
    (best,) = (tmp_path / "best").glob("*.index")
    assert best.samefile(tmp_path / "latest" / best.name)


def test_the_best_checkpoint_is_copied_without_hard_links(state, tmp_path, monkeypatch):
    def no_link(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_link)
    save(Checkpoints(state, tmp_path), state, 1, best=True)
    assert saved_value(tmp_path, "best") == 1


def test_a_resumed_run_replaces_the_checkpoint_of_the_same_step(state, tmp_path):
    save(Checkpoints(state, tmp_path), state, 1, best=True)
    (tmp_path / "best" / "step-2.index.partial").write_text("left by a killed run")
    again = Checkpoints(state, tmp_path)
    assert again.restore_latest()
    state.value.assign(7)
    again.save(1, best=True)
    assert saved_value(tmp_path, "best") == 7
    assert not list((tmp_path / "best").glob("*.partial"))


def test_a_run_can_be_moved(state, tmp_path):
    save(Checkpoints(state, tmp_path / "here"), state, 1, best=True)
    (tmp_path / "here").rename(tmp_path / "there")
    for which in ("best", "latest"):
        assert find_checkpoint(tmp_path / "there", which).startswith(str(tmp_path / "there"))
        assert saved_value(tmp_path / "there", which) == 1
