"""`run_train.py` as its user meets it: a process, its output and what it leaves on disk."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import signal
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as PluginEventAccumulator,
)
from tensorboard.compat.proto import event_pb2

from research.data.folder.folder_source import FolderSource
from research.models.residual import build_small_resnet
from tests.helpers import (
    SMALL_RUN,
    draw_photos,
    read_checkpoint,
    read_metrics,
    run_fresh,
    run_script,
    signal_at,
)


@pytest.fixture(scope="module")
def finished(photo_folder, tmp_path_factory):
    """A finished run of three epochs with a damaged photo, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "photos").mkdir()
    photos = draw_photos(folder / "photos", 40)
    damaged = next(FolderSource(str(photos)).examples("train")).name
    (photos / damaged).write_bytes(b"no photo")
    flags = [
        *SMALL_RUN,
        f"--image_folder={photos}",
        "--epochs=2",
        "--head_epochs=1",
        "--ckpt_dir=a run",
    ]
    process = run_script(folder, "run_train.py", *flags)
    assert process.returncode == 0, process.stderr
    return folder, flags, process


def test_a_run_leaves_what_the_contract_names(finished):
    folder, _, _ = finished
    run = folder / "a run"
    config = json.loads((run / "config.json").read_text())
    assert config["backbone"] == "SmallResNet"
    assert config["epochs"] == 2
    assert (run / "labels.txt").read_text() == "cat\ndog\n"
    for name in ("photos", "history"):
        with Image.open(run / "pictures" / f"{name}.png") as picture:
            assert min(picture.size) > 300
    rows = read_metrics(run)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert all(0 <= row["validation_accuracy"] <= 1 for row in rows)
    assert all(0 <= row["share_of_step_waiting_for_input"] <= 1 for row in rows)
    best = min(rows, key=lambda row: row["validation_loss"])
    for kind, row in (("latest", rows[-1]), ("best", best)):
        path = tf.train.latest_checkpoint(str(run / "checkpoints" / kind))
        assert path.endswith(f"step-{row['step']}")


def test_what_a_run_prints_fits_80_columns_and_says_how_to_go_on(finished):
    _folder, _, process = finished
    lines = process.stdout.splitlines()
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    assert any("SmallResNet" in line for line in lines)
    assert "skipped 1 photo:" in lines
    for part in ("frozen", "backbone", "head"):
        assert any(line.startswith(part) for line in lines), part
    (command,) = [line for line in lines if line.startswith("evaluate:")]
    assert "run_eval.py --ckpt_dir='a run'" in command
    assert any("tensorboard --logdir='a run'" in line for line in lines)


def test_an_uninterrupted_run_writes_nothing_on_standard_error(finished):
    _, _, process = finished
    assert process.stderr == ""


def test_tensorboard_finds_what_the_contract_names(finished):
    folder, _, _ = finished
    found = {}
    for run in ("train", "validation"):
        accumulator = EventAccumulator(str(folder / "a run" / "events" / run))
        accumulator.Reload()
        found[run] = accumulator
    shared = {"loss", "accuracy"}
    assert shared <= set(found["train"].Tags()["tensors"])
    assert shared <= set(found["validation"].Tags()["tensors"])
    assert {
        "learning_rate/head",
        "learning_rate/backbone",
        "gradient_norm/head",
        "gradient_norm/backbone",
        "photos_per_second",
        "share_of_step_waiting_for_input",
        "photos",
        "history",
    } <= set(found["train"].Tags()["tensors"])
    (settings,) = found["train"].Tensors("settings")
    assert b"| backbone | `SmallResNet` |" in settings.tensor_proto.string_val[0]
    for name in ("photos", "history"):
        (event,) = found["train"].Tensors(name)
        width, height, png = event.tensor_proto.string_val
        assert png == (folder / "a run" / "pictures" / f"{name}.png").read_bytes()
        with Image.open(io.BytesIO(png)) as picture:
            assert picture.size == (int(width), int(height))
        plugin = found["train"].SummaryMetadata(name).plugin_data.plugin_name
        assert plugin == "images"
    losses = found["validation"].Tensors("loss")
    steps = [row["step"] for row in read_metrics(folder / "a run")]
    assert [event.step for event in losses] == steps


def test_a_finished_run_is_not_trained_again(finished):
    folder, flags, _ = finished
    before = read_checkpoint(folder / "a run")
    process = run_script(folder, "run_train.py", *flags)
    assert process.returncode == 0, process.stderr
    assert "note: nothing is left to train; to train longer, increase --epochs" in process.stdout
    after = read_checkpoint(folder / "a run")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert len(read_metrics(folder / "a run")) == 3


def test_other_settings_are_refused_by_name_with_both_values(finished):
    folder, flags, _ = finished
    before = snapshot(folder / "a run")
    process = run_script(folder, "run_train.py", *flags, "--epochs=5", "--head_optimizer=adam")
    assert process.returncode == 2
    assert "epochs was 2 and is now 5" in process.stderr
    assert "head_optimizer was 'rmsprop' and is now 'adam'" in process.stderr
    assert len(process.stderr.splitlines()) == 1
    assert snapshot(folder / "a run") == before


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns size and time of change of every file below a folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("settings", "killed_at", "step", "resume"),
    [
        # A loop on the device trains the head from features; then activations. Both from files.
        (
            [
                *("--unfreeze_from=stage3", "--head_epochs=2", "--epochs=1", "--horizontal_flip"),
                *("--trunk_cache=disk", "--cache_dir=kept"),
            ],
            # All of the second epoch is recorded, but not its checkpoint.
            ("research.runs.logbook:Logbook.epoch", 2),
            15,
            run_script,
        ),
        # Stage after stage, mixed crops, averaged weights; by a Python with another hash seed.
        (
            [
                *("--bn_mode=frozen", "--unfreeze_from=stage2", "--head_epochs=1", "--epochs=2"),
                *("--gradual_unfreezing=1", "--stage_decay=0.5", "--weight_averaging=0.9"),
                *("--mirror_averaging", "--label_smoothing=0.1", "--class_weights=balanced"),
                *("--mixup=0.4", "--cutmix=1", "--rand_augment=5", "--random_crop_area=0.5"),
                "--head_schedule=one_cycle",
            ],
            # Steps are made until 3, 6, 8 and 9, each followed by a checkpoint, and further.
            ("research.loop.learner:Learner.train_steps", 5),
            9,
            run_fresh,
        ),
    ],
    ids=["cached", "stages"],
)
def test_a_killed_run_resumes_to_bit_identical_weights(
    photo_folder, tmp_path, settings, killed_at, step, resume, whole_small_resnet
):
    """Killed within its second epoch, some steps after a checkpoint."""
    flags = [
        *SMALL_RUN,
        f"--image_folder={photo_folder}",
        "--checkpoint_every=3",
        "--bn_mode=train",
        "--backbone_optimizer=adam",
        "--head_schedule=cosine",
        *settings,
    ]
    whole = run_script(tmp_path, "run_train.py", *flags, "--ckpt_dir=whole")
    assert whole.returncode == 0, whole.stderr
    rows = read_metrics(tmp_path / "whole")
    assert [row["step"] for row in rows[:2]] == [8, 16]
    at = signal_at("run_train.py", *killed_at, signal.SIGKILL)
    killed = run_script(tmp_path, "tests/signalled.py", at, *flags, "--ckpt_dir=killed")
    assert killed.returncode == -signal.SIGKILL
    latest = tf.train.latest_checkpoint(str(tmp_path / "killed" / "checkpoints" / "latest"))
    assert latest.endswith(f"step-{step}")

    resumed = resume(tmp_path, "run_train.py", *flags, "--ckpt_dir=killed")
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming after step {step} of {rows[-1]['step']}" in resumed.stdout
    expected, found = read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "killed")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    if "--trunk_cache=disk" in settings:
        assert "trunk cache  features on disk, 0.1 MB, 2 views" in whole.stdout
        assert "trunk cache  features on disk, found there" in killed.stdout
        assert "trunk cache  features on disk, found there" in resumed.stdout
    compared = ("epoch", "step", "train_loss", "train_accuracy", "validation_loss")
    for row, other in zip(rows, read_metrics(tmp_path / "killed"), strict=True):
        assert [row[key] for key in compared] == [other[key] for key in compared]
    for split in ("train", "validation"):
        one, other = (scalars(tmp_path / name / "events" / split) for name in ("whole", "killed"))
        assert one == other
        events = raw_events(tmp_path / "killed" / "events" / split)
        tags = [(event.step, value.tag) for event in events for value in event.summary.value]
        assert len(set(tags)) == len(tags)
        assert [at for at, tag in tags if tag == "loss"] == [at for at, _ in one["loss"]]
        # A TensorBoard that has read the lost events forgets them.
        restarts = [event.step for event in events if event.session_log.status]
        assert restarts == [1, step + 1]


def raw_events(folder: Path) -> list[event_pb2.Event]:
    """Returns the events of all files, as they stand there."""
    return [
        event_pb2.Event.FromString(record)
        for file in sorted(folder.glob("*tfevents*"))
        for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator()
    ]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns steps and values by tag, as TensorBoard reads them with --load_fast=false."""
    accumulator = PluginEventAccumulator(str(folder), tensor_size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [
            (event.step, float(tf.make_ndarray(event.tensor_proto)))
            for event in accumulator.Tensors(tag)
        ]
        for tag in ("loss", "accuracy")
    }


def test_a_run_killed_before_its_first_checkpoint_begins_its_records_again(finished):
    folder, flags, _ = finished
    shutil.copytree(folder / "a run", folder / "copy")
    shutil.rmtree(folder / "copy" / "checkpoints")
    process = run_script(folder, "run_train.py", *flags, "--ckpt_dir=copy")
    assert process.returncode == 2
    assert "has the records of a run and no checkpoint; put its folder" in process.stderr
    (folder / "copy" / "result.json").unlink()
    first, *_ = (folder / "copy" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "copy" / "metrics.jsonl").write_text(first)
    process = run_script(folder, "run_train.py", *flags, "--ckpt_dir=copy")
    assert process.returncode == 0, process.stderr
    rows = read_metrics(folder / "a run")
    assert len(rows) == 3
    losses = [row["validation_loss"] for row in rows]
    assert [row["validation_loss"] for row in read_metrics(folder / "copy")] == losses


def test_photos_of_other_classes_are_refused_on_resuming(finished, tmp_path):
    folder, flags, _ = finished
    (folder / "photos" / "dog").rename(folder / "photos" / "wolf")
    try:
        process = run_script(folder, "run_train.py", *flags)
    finally:
        (folder / "photos" / "wolf").rename(folder / "photos" / "dog")
    assert process.returncode == 2
    assert "cat, wolf" in process.stderr
    assert "cat, dog" in process.stderr


def test_photos_that_changed_are_refused_on_resuming(finished):
    folder, flags, _ = finished
    added = [folder / "photos" / "cat" / f"new{index}.jpg" for index in range(20)]
    for path in added:
        path.write_bytes((folder / "photos" / "dog" / "dog001.jpg").read_bytes())
    try:
        process = run_script(folder, "run_train.py", *flags)
    finally:
        for path in added:
            path.unlink()
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    before = json.loads((folder / "a run" / "data.json").read_text())["train_photos"]
    assert f"train_photos was {before} and is now" in line
    assert "photo 'cat/new" in line
    assert "is new; restore them" in line


def test_a_photo_with_another_content_is_named_on_resuming(finished):
    folder, flags, _ = finished
    names = [example.name for example in FolderSource(str(folder / "photos")).examples("train")]
    changed = folder / "photos" / names[5]
    before = changed.read_bytes()
    changed.write_bytes((folder / "photos" / names[6]).read_bytes())
    try:
        process = run_script(folder, "run_train.py", *flags)
    finally:
        changed.write_bytes(before)
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert f"for example, the train photo {names[5]!r} has different content" in line


def test_a_cache_folder_that_cannot_be_written_is_told_before_anything_is_made(
    photo_folder, tmp_path
):
    flags = [*SMALL_RUN, f"--image_folder={photo_folder}", "--ckpt_dir=run", "--trunk_cache=disk"]
    process = run_script(tmp_path, "run_train.py", *flags, "--cache_dir=/dev/null/cache")
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert "give another --cache_dir, or --trunk_cache=off" in line
    assert not (tmp_path / "run").exists()


def test_a_run_of_fewer_steps_with_some_of_them_traced(photo_folder, tmp_path):
    """In the folder that it gets where none is given."""
    flags = [*SMALL_RUN, f"--image_folder={photo_folder}", "--epochs=2", "--steps_per_epoch=3"]
    late = run_script(tmp_path, "run_train.py", *flags, "--profile_steps=3:7")
    assert late.returncode == 2
    assert "profile_steps is '3:7', but the run has 6 steps" in late.stderr
    assert not (tmp_path / "runs").exists()
    process = run_script(tmp_path, "run_train.py", *flags, "--profile_steps=3:4")
    assert process.returncode == 0, process.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("SmallResNet-")
    assert [row["step"] for row in read_metrics(run)] == [3, 6]
    assert "profile      steps 3 to 4" in process.stdout
    (trace,) = (run / "events" / "train" / "plugins" / "profile").glob("*/*.xplane.pb")
    steps = set(re.findall(rb"step_num.{0,40}", trace.read_bytes(), re.DOTALL))
    assert steps, "the trace names no step"


def test_a_run_goes_on_without_what_its_checkpoint_holds_and_for_more_epochs(tmp_path):
    """The weights are gone, the photos are elsewhere, and the run gets one more epoch."""
    (tmp_path / "photos").mkdir()
    draw_photos(tmp_path / "photos", 40)
    keras.utils.set_random_seed(7)
    build_small_resnet((32, 32, 3), None).save_weights(tmp_path / "initial.weights.h5")
    flags = [*SMALL_RUN, "--weights=initial.weights.h5", "--head_epochs=0"]
    at = [*flags, "--image_folder=photos"]
    whole = run_script(tmp_path, "run_train.py", *at, "--epochs=2", "--ckpt_dir=whole")
    assert whole.returncode == 0, whole.stderr
    short = run_script(tmp_path, "run_train.py", *at, "--epochs=1", "--ckpt_dir=run")
    assert short.returncode == 0, short.stderr
    assert "variables from initial.weights.h5" in short.stdout
    (tmp_path / "initial.weights.h5").unlink()
    (tmp_path / "photos").rename(tmp_path / "moved")

    at = [*flags, "--image_folder=moved", "--ckpt_dir=run"]
    longer = run_script(tmp_path, "run_train.py", *at, "--epochs=2")
    assert longer.returncode == 0, longer.stderr
    assert "weights      those of the checkpoint" in longer.stdout
    expected, found = read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "run")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["image_folder"], config["epochs"]) == (str(tmp_path / "moved"), 2)

    (tmp_path / "other").mkdir()
    draw_photos(tmp_path / "other", 30)
    at = [*flags, "--image_folder=other", "--ckpt_dir=run", "--epochs=3"]
    refused = run_script(tmp_path, "run_train.py", *at)
    assert refused.returncode == 2
    assert "the photos changed since the run in" in refused.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == config


def test_two_virtual_devices_train_like_one(photo_folder, tmp_path):
    flags = [*SMALL_RUN, f"--image_folder={photo_folder}", "--epochs=1", "--head_optimizer=sgd"]
    flags += ["--backbone_optimizer=sgd", "--weight_averaging=0.9", "--mirror_averaging"]
    flags += ["--mixup=0.4", "--cutmix=1", "--class_weights=balanced", "--stage_decay=0.5"]
    for name, extra in (("one", []), ("two", ["--virtual_devices=2"])):
        process = run_script(tmp_path, "run_train.py", *flags, f"--ckpt_dir={name}", *extra)
        assert process.returncode == 0, process.stderr
        assert f"{1 if name == 'one' else 2} CPU" in process.stdout
        assert "\nbackbone stage3 " in process.stdout
        assert max(map(len, process.stdout.splitlines())) <= 80
    one, two = read_metrics(tmp_path / "one")[0], read_metrics(tmp_path / "two")[0]
    assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-4)
    assert one["validation_loss"] == pytest.approx(two["validation_loss"], rel=1e-4)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(
    photo_folder, tmp_path
):
    flags = [*SMALL_RUN, f"--image_folder={photo_folder}", "--ckpt_dir=run", "--unfreeze_from=0"]
    flags += ["--head_optimizer=sgd", "--backbone_optimizer=sgd", "--epochs=3"]
    # The first epoch trains the head alone, with a sane rate.
    flags += ["--backbone_learning_rate=1e9", "--head_learning_rate=1e-3", "--head_epochs=1"]
    process = run_script(tmp_path, "run_train.py", *flags)
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert "training stopped, the last good checkpoint is" in line
    assert "lower learning rates" in line
    kept = read_checkpoint(tmp_path / "run")
    assert all(np.isfinite(value).all() for value in kept.values() if value.dtype.kind == "f")
    assert len(read_metrics(tmp_path / "run")) == 1
    assert math.isfinite(read_metrics(tmp_path / "run")[0]["validation_loss"])


def test_a_run_whose_validation_loss_no_longer_falls_ends_early(photo_folder, tmp_path):
    flags = [*SMALL_RUN, f"--image_folder={photo_folder}", "--ckpt_dir=run", "--epochs=9"]
    flags += ["--unfreeze_from=none", "--head_optimizer=sgd", "--early_stopping=2"]
    flags += ["--head_learning_rate=1000"]  # so that the loss jumps
    process = run_script(tmp_path, "run_train.py", *flags)
    assert process.returncode == 0, process.stderr
    rows = read_metrics(tmp_path / "run")
    losses = [row["validation_loss"] for row in rows]
    assert len(rows) < 9
    best = losses.index(min(losses))
    assert len(rows) == best + 1 + 2
    assert f"{len(rows)} epochs in" in process.stdout
    assert "the validation loss did not fall for 2 epochs" in process.stdout
    assert "run_eval.py --ckpt_dir=run --checkpoint=best" in process.stdout
    assert "trunk cache" in process.stdout
    again = run_script(tmp_path, "run_train.py", *flags)
    assert again.returncode == 0, again.stderr
    assert "trunk cache" not in again.stdout  # nothing is computed for a run that has ended
    assert len(read_metrics(tmp_path / "run")) == len(rows)


def test_finding_learning_rates_leaves_one_picture(photo_folder, tmp_path):
    flags = [*SMALL_RUN, f"--image_folder={photo_folder}", "--find_learning_rate"]
    process = run_script(tmp_path, "run_train.py", *flags, "--ckpt_dir=found/run")
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[0] == (
        "splits       train 64, validation 8, test 8; by a hash of each photo's name"
    )
    assert lines[1].split() == ["group", "learning", "rate"]
    assert [line.split()[0] for line in lines[2:4]] == ["head", "backbone"]
    assert lines[-1] == "picture: found/run-learning-rates.png"
    files = [path for path in (tmp_path / "found").rglob("*") if path.is_file()]
    assert files == [tmp_path / "found" / "run-learning-rates.png"]
    with Image.open(files[0]) as picture:
        assert min(picture.size) > 300


def test_the_hyperrule_decides_on_the_length_of_a_run(photo_folder, tmp_path):
    """The run is stopped after the first epoch."""
    flags = [*SMALL_RUN, f"--image_folder={photo_folder}", "--hyperrule", "--batch_size=1"]
    flags += ["--unfreeze_from=none", "--ckpt_dir=run"]
    # What it chooses is as by default, which here is not the article's.
    flags += ["--warmup=1epoch", "--head_schedule=cosine", "--backbone_schedule=cosine"]
    at = signal_at("run_train.py", "research.loop.learner:Learner.train_steps", 1, signal.SIGTERM)
    process = run_script(tmp_path, "tests/signalled.py", at, *flags)
    assert process.returncode == 143
    # As near to 500 updates as eight epochs of the same length allow, which show 62 of 64 photos.
    assert f"step 62 of {8 * 62} is saved" in process.stderr
    assert "staircase" in process.stdout


def test_a_run_in_float16_shows_its_loss_scale(photo_folder, tmp_path):
    flags = [*SMALL_RUN, f"--image_folder={photo_folder}", "--epochs=1", "--ckpt_dir=run"]
    flags += ["--precision=float16", "--accumulate_steps=2", "--clip_norm=1", "--l2_penalty=1e-4"]
    process = run_script(tmp_path, "run_train.py", *flags)
    assert process.returncode == 0, process.stderr
    assert "1 CPU, float16" in process.stdout
    (row,) = read_metrics(tmp_path / "run")
    photos = json.loads((tmp_path / "run" / "data.json").read_text())["train_photos"]
    assert row["step"] == math.ceil(photos / 16)
    assert math.isfinite(row["train_loss"])
    accumulator = EventAccumulator(str(tmp_path / "run" / "events" / "train"))
    accumulator.Reload()
    assert {"loss_scale", "skipped_steps", "penalty"} <= set(accumulator.Tags()["tensors"])
    skipped = tf.make_ndarray(accumulator.Tensors("skipped_steps")[-1].tensor_proto)
    loss_scale = tf.make_ndarray(accumulator.Tensors("loss_scale")[-1].tensor_proto)
    assert loss_scale == 2.0 ** (15 - skipped)
    assert (f"{skipped:.0f} step" in process.stdout) == (skipped > 0)
    evaluated = run_script(tmp_path, "run_eval.py", "--ckpt_dir=run", "--split=validation")
    assert evaluated.returncode == 0, evaluated.stderr
