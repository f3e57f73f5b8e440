"""A run that `--watch` evaluates while it trains, and its TensorBoard events."""

from __future__ import annotations

import json
import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.util import tensor_util

from research.settings.train_config import TrainConfig
from tests.helpers import SMALL_RUN, Started, read_checkpoint, read_metrics, run_script

LAST_STEP = 16  # 2 epochs of 8 batches


@pytest.fixture(scope="module")
def watched(photo_folder, tmp_path_factory):
    """A run that was killed and resumed during `--watch`, and the output of `--watch`."""
    folder = tmp_path_factory.mktemp("watched")
    flags = [*SMALL_RUN, f"--image_folder={photo_folder}", "--epochs=2", "--ckpt_dir=run"]
    flags += ["--histogram_every=4", "--clip_norm=2"]
    watching = ["--ckpt_dir=run", "--watch", "--resamples=20"]
    with Started(folder, "run_eval.py", watching) as watcher:
        with Started(folder, "run_train.py", flags) as first:
            first.wait_until(lambda: re.search(r"^ *1/2", first.stdout, re.MULTILINE))
        assert not (folder / "run" / "result.json").exists()
        process = run_script(folder, "run_train.py", *flags)
        assert process.returncode == 0, process.stderr
        returncode, out, error = watcher.end()
    return folder / "run", out, error, returncode


def events(folder) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0, "histograms": 0})
    return accumulator.Reload()


def tags_of(file) -> set[str]:
    return set(events(file).Tags()["tensors"])


def test_watch_waits_for_the_run_and_ends_after_the_last_checkpoint(watched):
    run, out, error, returncode = watched
    assert (returncode, error) == (0, "")
    assert out.startswith("waiting for a run to begin in run\n")
    assert f"checkpoint after step {LAST_STEP}:" in out
    file = run / "checkpoints" / "latest" / f"step-{LAST_STEP}.test.json"
    assert json.loads(file.read_text())["step"] == LAST_STEP
    accuracies = events(run / "events" / "evaluation_test").Tensors("accuracy")
    steps = [event.step for event in accuracies]
    assert steps[-1] == LAST_STEP
    assert len(steps) == out.count("checkpoint after step")
    assert set(steps) <= {8, LAST_STEP}


def test_watch_of_a_killed_run_ends_after_the_timeout(watched, tmp_path):
    run, *_ = watched
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text((run / "config.json").read_text())
    (tmp_path / "run" / "labels.txt").write_text((run / "labels.txt").read_text())
    process = run_script(tmp_path, "run_eval.py", "--ckpt_dir=run", "--watch", "--watch_timeout=1")
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert "within 1 seconds, and the training has not ended" in line


def test_a_finished_run_has_a_result(watched):
    run, *_ = watched
    result = json.loads((run / "result.json").read_text())
    rows = read_metrics(run)
    assert result["step"] == LAST_STEP
    assert result["validation_loss"] == rows[-1]["validation_loss"]
    assert result["best_validation_loss"] == min(row["validation_loss"] for row in rows)


def test_histograms_of_weights_and_gradients_have_the_requested_steps(watched):
    run, *_ = watched
    before, after = sorted((run / "events" / "train").glob("*.histograms"))
    assert tags_of(before) <= tags_of(after)  # the kill may precede the first checkpoint
    assert {tag.partition("/")[0] for tag in tags_of(after)} == {"weights", "gradients"}
    found = events(run / "events" / "train")
    tags = [tag for tag in found.Tags()["tensors"] if tag.startswith(("weights/", "gradients/"))]
    weights = {tag.partition("/")[2] for tag in tags if tag.startswith("weights/")}
    assert weights == {tag.partition("/")[2] for tag in tags if tag.startswith("gradients/")}
    assert "head/kernel" in weights
    assert any(name.startswith("stage3") for name in weights)
    assert not any(name.startswith(("stem", "stage1")) for name in weights)  # frozen
    for tag in ("weights/head/kernel", "gradients/head/kernel"):
        assert found.SummaryMetadata(tag).plugin_data.plugin_name == "histograms"
        steps = {event.step for event in found.Tensors(tag)}
        assert {12, 16} <= steps <= {4, 8, 12, 16}
    last = tensor_util.make_ndarray(found.Tensors("weights/head/kernel")[-1].tensor_proto)
    optimizer_variable = "head_optimizer/_trainable_variables/0/.ATTRIBUTES/VARIABLE_VALUE"
    kernel = read_checkpoint(run)[optimizer_variable]
    assert last[:, 2].sum() == kernel.size  # each weight is in a bucket
    assert (last[0, 0], last[-1, 1]) == pytest.approx((kernel.min(), kernel.max()))


def test_hparams_contain_the_settings_and_the_metrics_to_compare(watched):
    run, *_ = watched
    found = events(run / "events")

    def content(tag):
        data = found.SummaryMetadata(tag).plugin_data.content
        return plugin_data_pb2.HParamsPluginData.FromString(data)

    session = content("_hparams_/session_start_info").session_start_info
    assert session.group_name == f"run ({run.parent.name})"
    settings = session.hparams
    config = TrainConfig.from_json((run / "config.json").read_text())
    assert settings["batch_size"].number_value == config.batch_size
    assert settings["head_learning_rate"].number_value == config.head_learning_rate
    assert settings["horizontal_flip"].bool_value is config.horizontal_flip
    assert settings["backbone"].string_value == "SmallResNet"
    assert settings["clip_norm"].number_value == 2
    assert not {"ckpt_dir", "data_dir", "histogram_every"} & set(settings)
    for folder in ("validation", "evaluation_test"):  # subfolders of the run's events
        assert {"accuracy", "loss"} <= set(events(run / "events" / folder).Tags()["tensors"])
    assert content("_hparams_/session_end_info").session_end_info.status == 1  # success


def test_the_layout_groups_existing_scalars(watched):
    run, *_ = watched
    event = events(run / "events").Tensors("custom_scalars__config__")[-1]
    layout = layout_pb2.Layout.FromString(tensor_util.make_ndarray(event.tensor_proto).item())
    assert [category.title for category in layout.category] == ["Learning", "Optimizers", "Speed"]
    tags = events(run / "events" / "train").Tags()["tensors"]
    for category in layout.category:
        for chart in category.chart:
            (pattern,) = chart.multiline.tag
            assert any(re.search(pattern, tag) for tag in tags), chart.title
