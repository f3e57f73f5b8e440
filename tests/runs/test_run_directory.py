from __future__ import annotations

import dataclasses
import json
import platform
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from research.runs.durable_files import write_file
from research.runs.find_run import default_path, find_run, length_is_fixed
from research.runs.logbook import Logbook
from research.runs.profiler import StepProfiler
from research.runs.run_directory import FIGURES, PhotoEntry, RunDirectory
from research.settings.train_config import TrainConfig
from research.system.errors import UserError
from tests.helpers import ROOT


def config(path, **settings) -> TrainConfig:
    return TrainConfig(backbone="SmallResNet", ckpt_dir=str(path), **settings)


def test_a_new_run_writes_no_files_until_it_is_created(tmp_path):
    directory, resuming = find_run(config(tmp_path / "a" / "b"))
    assert not resuming
    assert list(tmp_path.iterdir()) == []
    directory.create(config(tmp_path / "a" / "b"), ("cat", "dog"), {})
    assert directory.read_config() == config(tmp_path / "a" / "b")
    assert directory.read_class_names() == ("cat", "dog")


def test_a_run_is_resumed_with_the_same_settings_only(tmp_path):
    RunDirectory(tmp_path / "run").create(config(tmp_path / "run"), ("cat", "dog"), {})
    assert find_run(config(tmp_path / "run", virtual_devices=2))[1]
    with pytest.raises(UserError) as error:
        find_run(config(tmp_path / "run", seed=1, batch_size=8))
    assert "batch_size was 32 and is now 8; seed was 0 and is now 1" in str(error.value)


def test_a_folder_of_a_run_killed_during_its_creation_is_accepted(tmp_path):
    RunDirectory(tmp_path).create(config(tmp_path), ("cat", "dog"), {})
    (tmp_path / "config.json").unlink()
    assert find_run(config(tmp_path))[1] is False
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        find_run(config(tmp_path))


@pytest.mark.parametrize("chosen", [["epochs"], {"unknown": "a reason"}])
def test_choices_of_unknown_settings_are_refused(tmp_path, chosen):
    directory = RunDirectory(tmp_path)
    settings = {**json.loads(TrainConfig().to_json()), "chosen_automatically": chosen}
    directory.config_file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"has chosen_automatically = .*; expected a reason for"):
        directory.read_choices()


def test_binary_files_are_refused(tmp_path):
    (tmp_path / "config.json").write_bytes(bytes(range(128, 256)))
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        find_run(config(tmp_path))


def test_an_empty_folder_is_accepted(tmp_path):
    assert find_run(config(tmp_path))[1] is False


PHOTOS = (PhotoEntry("train", "aa", "cat/1.jpg"), PhotoEntry("validation", "bb", "dog/2.jpg"))


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ((PHOTOS[0]._replace(digest="cc"), PHOTOS[1]), "'cat/1.jpg' has different content"),
        ((PHOTOS[0],), "the validation photo 'dog/2.jpg' is missing"),
        ((*PHOTOS, PHOTOS[0]._replace(name="cat/3.jpg")), "the train photo 'cat/3.jpg' is new"),
    ],
)
def test_a_changed_photo_is_named(tmp_path, now, expected):
    directory = RunDirectory(tmp_path)
    directory.create(config(tmp_path), ("cat", "dog"), {"photos_sha256": "before"}, PHOTOS)
    directory.check_data({"photos_sha256": "before"}, PHOTOS)
    with pytest.raises(UserError) as error:
        directory.check_data({"photos_sha256": "now"}, now)
    assert expected in str(error.value)
    assert "sha256" not in str(error.value)


def test_a_run_without_digests_of_its_photos_is_resumed(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.create(config(tmp_path), ("cat", "dog"), {"train_photos": 1})
    directory.photos_file.unlink()
    directory.check_data({"train_photos": 1, "train_contents_sha256": "now"}, PHOTOS)
    with pytest.raises(UserError, match="train_photos was 1 and is now 2; restore"):
        directory.check_data({"train_photos": 2, "train_contents_sha256": "now"}, PHOTOS)


def test_rows_after_the_resumed_step_are_removed(tmp_path):
    directory = RunDirectory(tmp_path)
    assert directory.read_metrics() == []
    rows = [{**dict.fromkeys(FIGURES, 0.5), "step": step} for step in (10, 20, 30)]
    for row in rows:
        directory.append_metrics(row)
    with directory.metrics_file.open("a") as file:
        file.write('{"step": 4')  # truncated by a crash
    directory.keep_metrics_until(20)
    assert directory.read_metrics() == rows[:2]


def test_the_default_folder_is_named_by_backbone_and_data():
    assert default_path(TrainConfig()).parts[0] == "runs"
    assert default_path(TrainConfig()).name.startswith("ResNet101V2-cats_vs_dogs-")
    own_photos = default_path(TrainConfig(image_folder="my/photos"))
    assert own_photos.name.startswith("ResNet101V2-photos-")


def test_a_resumed_run_is_not_finished(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write_result({"epoch": 2})
    plan = SimpleNamespace(steps=4, validates=True)
    Logbook(directory, plan, None).resume(TrainConfig(), ["loss"], 2)
    assert not directory.result_file.exists()


def test_a_file_that_cannot_be_written_leaves_no_partial_file(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match=r"cannot be written \(Is a directory\)"):
        write_file(tmp_path / "taken", "text")
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]


CONSTANT = {"head_schedule": "constant", "backbone_schedule": "constant"}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (CONSTANT, None),
        ({"head_schedule": "constant", "unfreeze_from": "none"}, None),
        ({**CONSTANT, "head_schedule": "cosine"}, "head_schedule 'cosine' depends on their number"),
        ({**CONSTANT, "backbone_schedule": "f.py:own"}, "backbone_schedule .*f.py:own' depends"),
    ],
)
def test_epochs_can_be_added_where_no_learning_rate_depends_on_them(tmp_path, settings, reason):
    (tmp_path / "f.py").write_text("def own(share):\n    return 1.0\n")
    if "backbone_schedule" in settings:
        own = settings["backbone_schedule"].replace("f.py", str(tmp_path / "f.py"))
        settings = {**settings, "backbone_schedule": own}
    made = config(tmp_path / "run", epochs=2, **settings)
    RunDirectory(tmp_path / "run").create(made, ("cat", "dog"), {})
    longer = dataclasses.replace(made, epochs=3)
    if reason is None:
        assert find_run(longer)[1]
        RunDirectory(tmp_path / "run").update_config(longer)
        assert RunDirectory(tmp_path / "run").read_config().epochs == 3
        reason = "only more can be trained"
    else:
        assert re.search(reason, length_is_fixed(longer))
        with pytest.raises(UserError, match=f"cannot be changed, because {reason}"):
            find_run(longer)
        reason = "cannot be changed"
    with pytest.raises(UserError, match=reason):
        find_run(dataclasses.replace(made, epochs=1))


def test_the_hyperrule_decides_on_the_epochs(tmp_path):
    reason = length_is_fixed(config(tmp_path, hyperrule=True))
    assert reason == "the HyperRule chooses them"


def test_a_file_of_code_may_move_and_a_class_may_not_be_replaced(tmp_path):
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text("class A: ...\nclass B: ...\n")
    made = config(tmp_path / "run", augmentation=(f"{tmp_path / 'one.py'}:A",))
    RunDirectory(tmp_path / "run").create(made, ("cat", "dog"), {})
    moved = dataclasses.replace(made, augmentation=(f"{tmp_path / 'two.py'}:A",))
    assert find_run(moved)[1]
    with pytest.raises(UserError, match="augmentation was"):
        find_run(dataclasses.replace(made, augmentation=(f"{tmp_path / 'two.py'}:B",)))
    (tmp_path / "two.py").write_text("class A: 'changed'\n")
    with pytest.raises(UserError, match="augmentation was"):
        find_run(moved)


def test_a_folder_from_which_tensorflow_cannot_restore_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"contains the character '\['.*rename the folder"):
        find_run(config(tmp_path / "lr[1e-3]"))
    assert list(tmp_path.iterdir()) == []


def test_a_run_among_its_photos_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "link").symlink_to("photos")
    for folder in ("photos", "link"):
        with pytest.raises(UserError, match=r"which is in image_folder .*outside of it"):
            find_run(config(tmp_path / folder / "run", image_folder=str(tmp_path / "photos")))
    assert not find_run(config(tmp_path / "run", image_folder=str(tmp_path / "photos")))[1]


def test_a_link_to_nothing_is_told_before_the_set_up(tmp_path):
    (tmp_path / "run").symlink_to("gone")
    with pytest.raises(UserError, match="a link to 'gone', which does not exist"):
        find_run(config(tmp_path / "run"))


def test_marks_and_empty_lines_of_editors_are_ignored(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.create(config(tmp_path / "run"), ("cat", "dog"), {})
    directory.labels_file.write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\n\r\n")
    directory.config_file.write_bytes(b"\xef\xbb\xbf" + directory.config_file.read_bytes())
    assert directory.read_class_names() == ("cat", "dog")
    assert directory.read_config() == config(tmp_path / "run")


def test_several_processes_write_the_same_file(tmp_path):
    """One of them is killed while it writes; the next one removes what it left."""
    file = tmp_path / "file.json"
    code = (
        "import sys, pathlib; from research.runs.durable_files import write_atomically\n"
        "for n in range(40): write_atomically(pathlib.Path(sys.argv[1]), sys.argv[2] * 5000)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(file), x], cwd=ROOT) for x in "ab"]
    while any(writer.poll() is None for writer in writers):
        if file.exists():
            assert file.read_text() in ("a" * 5000, "b" * 5000)
    assert [writer.returncode for writer in writers] == [0, 0]
    left = tmp_path / f"file.json.{platform.node()}-{2**22 + 1}.partial"  # no such process
    left.write_text("half")
    write_file(file, "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_numbers_that_json_lacks_are_null(tmp_path):
    directory = RunDirectory(tmp_path)
    row = {"epoch": 1, "a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 0.5}
    directory.append_metrics(row)
    directory.write_result(row)
    for file in (directory.metrics_file, directory.result_file):
        found = json.loads(file.read_text(), parse_constant=pytest.fail)
        assert found == {"epoch": 1, "a": None, "b": None, "c": None, "d": 0.5}


def test_class_names_may_be_a_list(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.labels_file.write_text("cat\ndog\n")
    directory.check_class_names(["cat", "dog"])
    with pytest.raises(UserError, match="the photos have the classes dog, cat"):
        directory.check_class_names(["dog", "cat"])


def test_a_worker_without_a_folder_runs_the_same_steps_per_call_as_the_chief(tmp_path, capsys):
    chief, other = (StepProfiler(range(3, 5), folder) for folder in (tmp_path / "x", None))
    limits = [(step, planned) for step in range(6) for planned in (step + 1, 10)]
    assert [chief.limit(*one) for one in limits] == [other.limit(*one) for one in limits]
    with other.traced(3), other.traced(4):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_trace_that_cannot_be_written_is_told_and_one_that_is_interrupted_is_closed(
    tmp_path, capsys
):
    (tmp_path / "plugins").write_text("a file")
    profiler = StepProfiler(range(1, 2), tmp_path)
    with profiler.traced(1):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: the trace of the profiler cannot be written (")
    with pytest.raises(KeyError), StepProfiler(range(1, 3), tmp_path / "x").traced(1):
        raise KeyError
    with StepProfiler(range(1, 2), tmp_path / "y").traced(1):
        pass
    assert "profile      steps 1 to 1" in capsys.readouterr().out
