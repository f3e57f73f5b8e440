from __future__ import annotations

from types import SimpleNamespace

import pytest

from research.config import TrainConfig
from research.errors import UserError
from research.logbook import Logbook
from research.run_directory import RunDirectory, default_path, find_run, write_file


def config(path, **settings) -> TrainConfig:
    return TrainConfig(backbone="SmallResNet", ckpt_dir=str(path), **settings)


def test_a_new_run_touches_nothing_until_it_is_created(tmp_path):
    directory, resuming = find_run(config(tmp_path / "a" / "b"))
    assert not resuming
    assert list(tmp_path.iterdir()) == []
    directory.create(config(tmp_path / "a" / "b"), ("cat", "dog"), {})
    assert directory.read_config() == config(tmp_path / "a" / "b")
    assert directory.read_class_names() == ("cat", "dog")


def test_the_same_settings_resume_and_others_are_refused(tmp_path):
    RunDirectory(tmp_path / "run").create(config(tmp_path / "run"), ("cat", "dog"), {})
    assert find_run(config(tmp_path / "run", virtual_devices=2))[1]
    with pytest.raises(UserError) as error:
        find_run(config(tmp_path / "run", seed=1, batch_size=8))
    assert "batch_size was 32 and is now 8; seed was 0 and is now 1" in str(error.value)


def test_a_folder_left_by_a_run_killed_while_making_it_is_taken(tmp_path):
    RunDirectory(tmp_path).create(config(tmp_path), ("cat", "dog"), {})
    (tmp_path / "config.json").unlink()
    assert find_run(config(tmp_path))[1] is False
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        find_run(config(tmp_path))


def test_files_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "config.json").write_bytes(bytes(range(128, 256)))
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        find_run(config(tmp_path))


def test_an_empty_folder_is_taken(tmp_path):
    assert find_run(config(tmp_path))[1] is False


def test_metrics_after_the_step_resumed_from_are_dropped(tmp_path):
    directory = RunDirectory(tmp_path)
    assert directory.read_metrics() == []
    for step in (10, 20, 30):
        directory.append_metrics({"step": step})
    with directory.metrics_file.open("a") as file:
        file.write('{"step": 4')  # cut short by a crash
    directory.keep_metrics_until(20)
    assert directory.read_metrics() == [{"step": 10}, {"step": 20}]


def test_the_default_folder_is_named_by_backbone_and_data():
    assert default_path(TrainConfig()).parts[0] == "runs"
    assert default_path(TrainConfig()).name.startswith("ResNet101V2-cats_vs_dogs-")
    assert default_path(TrainConfig(image_folder="my/photos")).name.startswith(
        "ResNet101V2-photos-"
    )


def test_a_run_that_goes_on_does_not_say_that_it_is_finished(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write_result({"epoch": 2})
    Logbook(directory, SimpleNamespace(steps=4), None).resume(2)
    assert not directory.result_file.exists()


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        write_file(tmp_path / "taken", "text")
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]
