"""Several evaluations in one call: metrics, comparison, predictions, pictures and events."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from research.data.built_in.sketches import sketch_jpeg
from research.data.folder.folder_source import FolderSource
from research.data.loader import DataLoader
from research.data.split_arrays import SplitArrays, load_split
from research.evaluation import classifier
from research.evaluation import evaluate as evaluating
from research.evaluation.comparison import comparison_table, difference
from research.evaluation.evaluate import evaluate, new_checkpoints
from research.evaluation.one_run import Evaluator, name_of, size_note
from research.evaluation.scores import Predictions
from research.evaluation.single_label import SingleLabel
from research.loop.builder import build_network
from research.runs.restore import restore_model
from research.runs.run_directory import RunDirectory
from research.runs.sealed_files import point as point_at
from research.settings.program_configs import EvalConfig
from research.system.errors import UserError
from research.tasks.task import Task
from tests.helpers import draw_photos, make_run

VARIANT = SingleLabel(("cat", "dog"))


@pytest.fixture(scope="module")
def runs(one_device, photo_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("one", 0), ("two", 1)):
        make_run(folder / name, photo_folder, (4, 8), seed=seed)
        for epoch in (1, 2):
            row = {f"{split}_{metric}": 0.5 for split in ("train", "validation")
                   for metric in ("loss", "accuracy")}  # fmt: skip
            RunDirectory(folder / name).append_metrics(
                {"epoch": epoch, "step": 4 * epoch, "seconds": 1.0, **row}
            )
    return folder


@pytest.fixture(scope="module")
def evaluated(runs):
    """The evaluations of two runs with two checkpoints each."""
    config = EvalConfig(
        ckpt_dir=(str(runs / "one"), str(runs / "two")),
        checkpoint=("latest", "best"),
        resamples=100,
    )
    return evaluate(config)


def test_each_checkpoint_of_each_run_is_evaluated(runs, evaluated):
    found = [
        (Path(one.ckpt_dir).name, Path(one.checkpoint).parent.name, one.step) for one in evaluated
    ]
    assert found == [
        ("one", "latest", 8),
        ("one", "best", 4),
        ("two", "latest", 8),
        ("two", "best", 4),
    ]
    assert len({round(one.loss, 6) for one in evaluated}) == 4  # other weights
    for one in evaluated:
        written = json.loads(Path(f"{one.checkpoint}.{one.split}.json").read_text())
        assert written["accuracy"]["value"] == one.scores.headline_value
        assert written["decisions"]["temperature"] == one.scores.decisions.temperature


def test_the_table_compares_with_the_first_run_in_80_columns(evaluated):
    lines = comparison_table(VARIANT, evaluated, 50).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("accuracy minus the first" in line for line in lines) == 3
    at = next(i for i, line in enumerate(lines) if "best/step-4, test" in line)
    gain = evaluated[1].scores.headline_value - evaluated[0].scores.headline_value
    assert lines[at + 1].startswith(f"  accuracy minus the first: {gain:+.4f} (95 % interval")


def test_runs_with_other_classes_are_not_compared(evaluated):
    first, other = evaluated[0], evaluated[2]
    renamed = [dataclasses.replace(one, name=f"no {one.name}") for one in other.scores.classes]
    other = dataclasses.replace(other, scores=dataclasses.replace(other.scores, classes=renamed))
    lines = comparison_table(VARIANT, [first, other], 50).splitlines()
    assert lines[-1] == "  not compared with the first: the classes are not the same"


def test_learning_curves_of_the_runs_are_drawn_on_shared_axes(runs, evaluated):
    with Image.open(runs / "one" / "pictures" / "learning_curves.png") as picture:
        assert picture.size[0] > 500


def test_a_worse_image_size_gives_a_note():
    note = size_note(0.5241, 192, 0.1327, 160)
    assert "--image_size=160" in note
    assert max(map(len, note.splitlines())) <= 80
    assert size_note(0.5241, 160, 0.1327, 160) is None
    assert size_note(0.04, 192, 0.06, 160) is None
    assert size_note(0.03, 192, 0.02, 160) is None  # too small a difference


def test_pictures_and_events_of_an_evaluation(runs, evaluated):
    expected = {"confusion_matrix", "reliability", "roc_curve", "precision_recall_curve",
                "mistakes", "mistakes_grad_cam"}  # fmt: skip
    for name, one in (("test", evaluated[0]), ("best.test", evaluated[1])):
        files = list((runs / "one" / "pictures" / name).iterdir())
        assert {file.stem for file in files} == expected
        events = EventAccumulator(str(runs / "one" / "events" / f"evaluation_{name}"))
        events.Reload()
        tags = set(events.Tags()["tensors"])
        assert expected | {"loss", "accuracy", "roc_auc", "precision_recall/pr_curves"} <= tags
        (event,) = events.Tensors("accuracy")
        assert event.step == one.step
        assert float(tensor_util.make_ndarray(event.tensor_proto)) == pytest.approx(
            one.scores.headline_value
        )


def test_the_precision_recall_curve_contains_counts(runs, evaluated):
    events = EventAccumulator(str(runs / "one" / "events" / "evaluation_test"))
    events.Reload()
    assert (
        events.SummaryMetadata("precision_recall/pr_curves").plugin_data.plugin_name == "pr_curves"
    )
    (event,) = events.Tensors("precision_recall/pr_curves")
    true_positives, false_positives = tensor_util.make_ndarray(event.tensor_proto)[:2]
    photos = [one.photos for one in evaluated[0].scores.classes]
    assert [false_positives[0], true_positives[0]] == photos


def test_pictures_of_an_earlier_checkpoint_are_removed(runs, photo_folder):
    config = EvalConfig(ckpt_dir=(str(runs / "two"),), image_folder=str(photo_folder), resamples=0)
    folder = runs / "two" / "pictures" / name_of(config, "test")
    folder.mkdir()
    (folder / "earlier_mistakes.png").write_bytes(b"")
    (evaluation,) = evaluate(config)
    assert (folder / "reliability.png").exists()
    assert not (folder / "earlier_mistakes.png").exists()
    assert evaluation.scores.decisions is None  # these are not the run's own photos
    assert evaluation.figures["loss"].interval is None


def test_predictions_contain_each_photo_once_and_match_the_model(runs, photo_folder, tmp_path):
    file = tmp_path / "new" / "predictions.csv"
    config = EvalConfig(
        ckpt_dir=(str(runs / "one"),), predictions=str(file), pictures=False, resamples=0
    )
    (evaluation,) = evaluate(config)
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert list(rows[0]) == ["file", "label", "predicted", "probability", "logit"]
    source = FolderSource(str(photo_folder))
    assert [row["file"] for row in rows] == [one.name for one in source.examples("test")]
    trained = RunDirectory(runs / "one").read_config()
    model = build_network(trained, ("a", "b"), with_weights=False).network.model
    restore_model(model, evaluation.checkpoint)
    examples = DataLoader(32, 8, source=source).examples("test")
    logits = model(examples.inputs[0].astype("f4") / 127.5 - 1).numpy()[:, 0]
    assert [float(row["logit"]) for row in rows] == pytest.approx(list(logits), rel=1e-4, abs=1e-5)
    for row, logit, label in zip(rows, logits, examples.labels, strict=True):
        assert row["label"] == ("cat", "dog")[label]
        assert row["predicted"] == ("cat", "dog")[int(logit > 0)]
        assert float(row["probability"]) == pytest.approx(1 / (1 + np.exp(-logit)), rel=1e-4)


def test_predictions_of_many_classes(one_device, tmp_path):
    for label, name in enumerate(("ant", "bee", "$c_")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(12):
            photo = sketch_jpeg(label % 2, index)
            (tmp_path / "photos" / name / f"{name}{index}.jpg").write_bytes(photo)
    make_run(tmp_path / "run", tmp_path / "photos")
    config = EvalConfig(
        ckpt_dir=(str(tmp_path / "run"),),
        split=("train",),
        predictions=str(tmp_path / "p.csv"),
        resamples=20,
    )
    (evaluation,) = evaluate(config)
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert len(rows) == evaluation.photos
    for row in rows:
        shares = {name: float(row[f"probability {name}"]) for name in ("ant", "bee", "$c_")}
        assert sum(shares.values()) == pytest.approx(1)
        assert row["predicted"] == max(shares, key=shares.get)
    correct = np.mean([row["predicted"] == row["label"] for row in rows])
    assert evaluation.scores.headline_value == pytest.approx(correct)
    events = EventAccumulator(str(tmp_path / "run" / "events" / "evaluation_train"))
    events.Reload()
    assert {"precision_recall/ant/pr_curves", "precision_recall/$c_/pr_curves"} <= set(
        events.Tags()["tensors"]
    )


def test_a_run_with_other_classes_is_refused_before_any_evaluation(
    runs, photo_folder, tmp_path, capsys
):
    (tmp_path / "photos").mkdir()
    (draw_photos(tmp_path / "photos", 12) / "dog").rename(tmp_path / "photos" / "wolf")
    make_run(tmp_path / "run", tmp_path / "photos")
    dirs = (str(runs / "one"), str(tmp_path / "run"))
    config = EvalConfig(ckpt_dir=dirs, image_folder=str(photo_folder))
    with pytest.raises(UserError, match="the photos have the classes cat, dog"):
        evaluate(config)
    assert capsys.readouterr().out == ""


def predictions(names, labels, logits) -> Predictions:
    return Predictions(tuple(names), np.array(labels), np.array(logits, float)[:, np.newaxis])


def test_differences_are_paired_and_do_not_depend_on_the_order_of_photos():
    generator = np.random.default_rng(0)
    names = [f"{index}.jpg" for index in range(300)]
    labels = generator.integers(2, size=300)
    hard = 6 * generator.normal(size=300)  # difficulty, the same for both models
    one, other = hard + 0.3 * (2 * labels - 1), hard
    found = difference(
        VARIANT, predictions(names, labels, one), predictions(names, labels, other), 400
    )
    gains = (one > 0).astype(float) - (other > 0)
    assert found["accuracy"].value == pytest.approx(np.mean(gains * (2 * labels - 1)))
    low, high = found["loss"].interval
    assert low < found["loss"].value < high < 0  # significant, although each loss varies far more
    losses = predictions(names, labels, other).losses()
    assert high - low < 0.3 * 2 * 1.96 * losses.std() / 300**0.5
    order = generator.permutation(300)
    shuffled = predictions([names[k] for k in order], labels[order], other[order])
    assert difference(VARIANT, predictions(names, labels, one), shuffled, 400) == found
    with_others = predictions([*names[1:], "new.jpg"], labels, other)
    assert difference(VARIANT, predictions(names, labels, one), with_others, 10) is None


def test_two_equal_models_do_not_differ():
    same = predictions("abc", [0, 1, 1], [-1, 2, -3])
    found = difference(VARIANT, same, same, 20)
    assert (found["loss"].value, found["loss"].interval) == (0.0, (0.0, 0.0))


def test_batches_at_the_same_time_give_the_same_logits(runs, photo_folder, monkeypatch):
    examples = load_split(FolderSource(str(photo_folder)), "train", 32)
    model = classifier.Classifier(str(runs / "one"), batch_size=12)
    found = []
    for count in (1, 2):
        monkeypatch.setattr(classifier.devices, "concurrent_batches", lambda _, count=count: count)
        found.append(model.logits(examples))
    assert len(found[0]) == len(examples) > 5 * 12
    np.testing.assert_array_equal(*found)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(evaluating, "POLL_SECONDS", 0.0)


def point(directory: RunDirectory, *names: str) -> None:
    folder = directory.checkpoints / "latest"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.index").touch()
    tf.compat.v1.train.update_checkpoint_state(str(folder), names[-1], list(names))


def test_each_new_checkpoint_is_yielded_once_until_training_ends(tmp_path, quick):
    directory = RunDirectory(tmp_path)
    point(directory, "step-1", "step-2")
    new = new_checkpoints(directory, 60)
    assert Path(next(new)).name == "step-2"  # earlier checkpoints are skipped
    point(directory, "step-3", "step-4")  # two are written during one evaluation
    assert [Path(next(new)).name for _ in range(2)] == ["step-3", "step-4"]
    # A killed run resumes from its last checkpoint.
    point(directory, "step-4", "step-5")
    directory.write_result({})
    assert [Path(path).name for path in new] == ["step-5"]


def test_a_finished_run_is_evaluated_once(runs, quick, capsys):
    RunDirectory(runs / "one").write_result({})
    config = EvalConfig(
        ckpt_dir=(str(runs / "one"),),
        split=("validation", "test"),
        watch=True,
        pictures=False,
        resamples=0,
    )
    found = [(evaluation.step, evaluation.split) for evaluation in evaluate(config)]
    assert found == [(8, "validation"), (8, "test")]
    RunDirectory(runs / "one").forget_result()
    capsys.readouterr()


def test_watching_times_out_without_a_new_checkpoint(tmp_path, quick):
    directory = RunDirectory(tmp_path)
    with pytest.raises(UserError, match=r"no new checkpoint appeared in .* longer --watch_timeout"):
        list(new_checkpoints(directory, 0.01))
    point(directory, "step-2")
    new = new_checkpoints(directory, 0.01)
    assert Path(next(new)).name == "step-2"
    with pytest.raises(UserError, match="the training has not ended"):
        next(new)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"split": ("test", "train"), "predictions": "p.csv"}, "given with 2 evaluations"),
        ({"watch": True, "checkpoint": ("best",)}, "expected one --ckpt_dir"),
        ({"watch": True, "predictions": "p.csv"}, "given with watch"),
        ({"dataset": "digits", "image_folder": "photos"}, "expected only one of them"),
    ],
)
def test_conflicting_settings_are_refused(settings, expected):
    with pytest.raises(UserError, match=expected):
        EvalConfig(ckpt_dir=("run",), **settings)


def test_photos_of_some_of_the_classes_are_evaluated(one_device, tmp_path, capsys):
    """With the labels of the run, in whose order another class precedes."""
    photos, other = tmp_path / "photos", tmp_path / "other"
    for label, name in enumerate(("ant", "cat", "dog")):
        (photos / name).mkdir(parents=True)
        for index in range(20):
            jpeg = sketch_jpeg(label % 2, 40 * label + index)
            (photos / name / f"{name}{index}.jpg").write_bytes(jpeg)
    run = make_run(tmp_path / "run", photos)
    (whole,) = evaluate_quickly(run, split=("train",))
    shutil.copytree(photos, other)
    shutil.rmtree(other / "ant")
    capsys.readouterr()
    (some,) = evaluate_quickly(run, split=("train",), image_folder=str(other))
    assert capsys.readouterr().err == (
        "note: the photos have 2 of the 3 classes of the run, without ant\n"
        "splits       train 32, validation 4, test 4; by a hash of each photo's name\n"
    )
    present = [one for one in whole.scores.confusion if one.label != "ant"]
    assert list(some.scores.confusion) == present
    (line,) = [line for line in str(some).splitlines() if line.startswith("ant")]
    assert line.split() == ["ant", "0", "-", "-", "-"]
    (other / "dog").rename(other / "wolf")
    with pytest.raises(UserError, match="the photos have the classes cat, wolf"):
        evaluate_quickly(run, image_folder=str(other))


def test_a_part_of_a_split_of_a_folder_is_evaluated(one_device, split_folder):
    _, run = split_folder
    (whole,), (part,) = (
        evaluate_quickly(run, split=(split,)) for split in ("train", "train[10:50%]")
    )
    assert whole.photos == 40
    assert part.predictions.names == whole.predictions.names[4:20]
    assert part.leaked == {"train": 16}


def test_a_checkpoint_that_a_run_in_training_replaces_is_looked_up_again(
    one_device, split_folder, monkeypatch
):
    _, run = split_folder
    restore, calls = classifier.restore_model, []

    def restore_later(model, path, averages):
        calls.append(path)
        if len(calls) == 1:  # the training removes it, and has written another
            for file in Path(path).parent.glob("step-4.*"):
                file.rename(file.with_name(file.name.replace("step-4", "step-8")))
            sums = Path(path).with_name("step-8.sha256")
            sums.write_text(sums.read_text().replace("step-4", "step-8"))
            point_at(Path(path).parent, ["step-8"])
            raise UserError("gone")
        return restore(model, path, averages)

    monkeypatch.setattr(classifier, "restore_model", restore_later)
    assert classifier.Classifier(str(run)).checkpoint.endswith("latest/step-8")
    monkeypatch.setattr(classifier, "restore_model", restore)
    with pytest.raises(UserError, match="is not an intact checkpoint"):
        classifier.Classifier(str(run), str(run / "checkpoints" / "latest" / "step-4"))


@pytest.fixture
def split_folder(tmp_path):
    """Photos in the folders train, val and test, and a run on them."""
    photos = tmp_path / "photos"
    for number, part in enumerate(("train", "val", "test")):
        for label, name in enumerate(("cat", "dog")):
            (photos / part / name).mkdir(parents=True)
            for index in range(number * 20, number * 20 + 20):
                (photos / part / name / f"{name}{index}.jpg").write_bytes(sketch_jpeg(label, index))
    return photos, make_run(tmp_path / "run", photos)


def evaluate_quickly(run: Path, **settings) -> list:
    return evaluate(EvalConfig(ckpt_dir=(str(run),), pictures=False, resamples=0, **settings))


def test_photos_that_changed_their_split_are_not_evaluated(one_device, split_folder):
    """Without `test`, the photos of `val` are the test split, and `train` is divided."""
    photos, run = split_folder
    assert evaluate_quickly(run)[0].leaked == {}
    shutil.rmtree(photos / "test")
    expected = "of the validation split were in the train split.*the splits changed after"
    for split in ("test", "validation"):  # the first needs a temperature from the second
        with pytest.raises(UserError, match=expected):
            evaluate_quickly(run, split=(split,))
    assert not list((run / "checkpoints" / "latest").glob("*.validation.json"))


def test_other_photos_that_were_trained_on_are_counted(one_device, split_folder, tmp_path, capsys):
    photos, run = split_folder
    other = tmp_path / "other"
    for part, source in (("train", "test"), ("test", "train")):
        shutil.copytree(photos / source, other / part)
    for name in ("cat", "dog"):
        for file in (photos / "val" / name).iterdir():
            file.rename(other / "test" / name / f"copy of {file.name}")
    (one,) = evaluate_quickly(run, image_folder=str(other))
    assert one.photos == 80
    assert one.leaked == {"train": 40, "validation": 40}
    printed = capsys.readouterr().out.splitlines()
    assert "note: 40 of these 80 photos were trained on" in printed
    assert "note: 40 of these 80 photos were validated on" in printed
    latest = run / "checkpoints" / "latest"
    (file,) = latest.glob("*.other-??????.test.json")
    assert json.loads(file.read_text())["leaked"] == one.leaked
    namesake = shutil.copytree(other, tmp_path / "elsewhere" / "other")
    evaluate_quickly(run, image_folder=f"{namesake}/")
    assert len(list(latest.glob("*.other-??????.test.json"))) == 2


def test_photos_that_are_all_damaged_are_refused_wherever_they_are_kept(one_device, split_folder):
    photos, run = split_folder
    for file in photos.rglob("*.jpg"):
        file.write_bytes(b"x")
    config = json.loads((run / "config.json").read_text())
    for place, expected in (("memory", "has no usable photo"), ("none", "split can be decoded")):
        (run / "config.json").write_text(json.dumps({**config, "photo_cache": place}))
        with pytest.raises(UserError, match=expected):
            evaluate_quickly(run, image_folder=str(photos), split=("all",))


class Shares(Task):
    """A task whose metrics have the names of built-in figures, or need an array of the source."""

    needs_array = False

    def metrics(self, logits, batch):
        if self.needs_array:
            return {"distance": logits[:, 0] - batch["teacher"]}
        return {"roc_auc": tf.ones(len(logits)), "mine": tf.zeros(len(logits))}


def test_metrics_of_a_task_replace_no_other_figure_and_may_need_an_array(capsys):
    task = Shares(("cat", "dog"))
    examples = SplitArrays((), np.array([0, 1], np.int32), ("a", "b"))
    evaluator = SimpleNamespace(
        classifier=SimpleNamespace(task=task),
        variant=VARIANT,
        _loader=SimpleNamespace(examples=lambda split: examples),
        _is_own=False,
    )
    logits = np.zeros((2, 1), np.float32)
    found = Evaluator._task_figures(evaluator, "test", logits, {"loss": None, "roc_auc": None})
    assert {name: figure.value for name, figure in found.items()} == pytest.approx(
        {"task_loss": np.log(2), "task_roc_auc": 1.0, "mine": 0.0}
    )
    task.needs_array = True
    assert Evaluator._task_figures(evaluator, "test", logits, {}) == {}
    assert capsys.readouterr().err == (
        "note: the metrics of Shares are left out: these photos have no array 'teacher'\n"
    )
    evaluator._is_own = True
    with pytest.raises(KeyError):
        Evaluator._task_figures(evaluator, "test", logits, {})


def test_a_copy_of_a_training_photo_in_the_test_split_is_counted(one_device, split_folder):
    photos, run = split_folder
    shutil.copy(photos / "train" / "cat" / "cat3.jpg", photos / "test" / "cat" / "other name.jpg")
    assert evaluate_quickly(run)[0].leaked == {"train": 1}
    assert evaluate_quickly(run, split=("train",))[0].leaked == {}
