"""The basis of the ablation's tables: folds, paired tests, settings, and what is still to run."""

from __future__ import annotations

import argparse
import collections
import json

import numpy as np
import pytest
from scipy import stats

from benchmarks import ablation_rows
from benchmarks.ablation import (
    WEIGHTS,
    Planned,
    current_runs,
    expected_seconds,
    expected_time,
    plan_runs,
)
from benchmarks.ablation_report import (
    Difference,
    difference_text,
    mean_and_error,
    mean_over_tasks,
    over_tasks,
    paired_test,
    report,
)
from benchmarks.ablation_rows import FIT_ROWS, ROWS, record_new_settings, settings_of
from benchmarks.harness import REPORT_END, RESULTS, report_mark, write_report
from benchmarks.tasks import Fold, Task, hash_of_weights
from flags.command_line import parse_config
from research.data.loader import DataLoader
from research.data.source import Source
from research.loop.builder import make_augmentation
from research.loop.preparation import check_views
from research.settings.automatic import without_auto
from research.settings.train_config import TrainConfig


def test_each_photo_is_in_the_test_split_of_one_fold():
    names = [f"photo{number}.jpg" for number in range(2000)]
    for seed in (0, 1):
        tested: collections.Counter[str] = collections.Counter()
        for index in range(5):
            fold = Fold(seed, index, 5)
            splits = collections.Counter(fold.split_of(name) for name in names)
            assert splits["test"] == pytest.approx(400, rel=0.15)
            assert splits["validation"] == pytest.approx(160, rel=0.3)
            tested.update(name for name in names if fold.split_of(name) == "test")
        assert set(tested.values()) == {1}
        assert len(tested) == len(names)
    moved = [name for name in names if Fold(0, 0, 5).split_of(name) != Fold(1, 0, 5).split_of(name)]
    assert len(moved) > 300


def test_the_paired_test_corrects_for_shared_training_photos():
    differences = np.array([0.01, 0.03, 0.02, 0.00, 0.04])
    mean, error, probability, freedom = paired_test(differences, folds=5)
    assert mean == pytest.approx(0.02)
    assert error == pytest.approx(differences.std(ddof=1) * np.sqrt(1 / 5 + 1 / 4))
    t = 0.02 / error
    assert probability == pytest.approx(2 * (1 - stats.t.cdf(t, 4)))
    assert freedom == 4
    assert probability > stats.ttest_1samp(differences, 0).pvalue
    assert np.isnan(paired_test(np.zeros(5), 5).probability)


def test_mean_and_error():
    assert mean_and_error(np.array([1.0, 3.0])) == pytest.approx((2.0, 1.0))
    assert np.isnan(mean_and_error(np.array([1.0]))[1])


def test_the_runs_on_file_have_the_settings_of_their_rows():
    """Otherwise, the report would leave them out."""
    known = {row: settings_of(row) for row in (*ROWS, *FIT_ROWS)}
    for file in RESULTS.glob("ablation*.jsonl"):
        for run in map(json.loads, file.read_text().splitlines()):
            assert run["settings"] == known[run["row"]], (file.name, run["row"])


def test_every_row_has_its_own_settings():
    hashes = [settings_of(row) for row in (*ROWS, *FIT_ROWS)]
    assert len(set(hashes)) == len(hashes)


def test_a_new_setting_changes_a_hash_only_if_a_row_changes_it(tmp_path, monkeypatch):
    file = tmp_path / "settings.json"
    monkeypatch.setattr(ablation_rows, "SETTINGS", file)
    # As if `resize` were newer than all runs: only rows that change it have another hash.
    known = json.loads((RESULTS / "ablation_settings.json").read_text())
    known["first"].remove("resize")
    file.write_text(json.dumps(known))
    before = {row: settings_of(row) for row in ROWS}
    record_new_settings(file)
    assert json.loads(file.read_text())["later"]["resize"] == "squash"
    assert {row: settings_of(row) for row in ROWS} == before
    # As if its default had been `pad` in earlier runs: now every row differs from them, except
    # those that change it.
    file.write_text(json.dumps({**known, "later": {**known["later"], "resize": "pad"}}))
    after = {row: settings_of(row) for row in ROWS}
    changed = {row for row in ROWS if after[row] != before[row]}
    assert changed == {row for row in ROWS if not row.startswith(("fastai", "timm"))}


def test_each_row_can_be_trained_with_its_trunk_cache():
    """Rows whose views cannot be counted would be refused with a cache on disk."""
    places = set()
    for row in ROWS:
        flags = Planned(Task("a", ()), Fold(1, 0, 3), row).flags("MobileNetV2", "none", RESULTS)
        config = parse_config(TrainConfig, flags)
        augmentation = make_augmentation(without_auto(config))
        check_views(config, DataLoader(source=Source(), augmentation=augmentation))
        places.add(config.trunk_cache)
    assert places == {"disk", "auto"}


def test_missing_runs_take_turns_and_are_estimated_from_finished_ones():
    tasks = [Task("a", ()), Task("b", (), ("--evaluation_scale=1",))]
    finished = {"row": "fast", "task": "a", "seed": 1, "fold": 1, "process_seconds": 10.0}
    runs = [finished, {**finished, "seed": 9, "process_seconds": 30.0}]
    missing = plan_runs(tasks, ["default", "fast"], 2, 3, 3, runs)
    assert len(missing) == 2 * 2 * 2 * 3 - 1
    assert plan_runs(tasks, ["default", "fast"], 2, 3, 1, runs) == missing[:7]
    assert [one.group for one in missing[:4]] == ["a-1-1", "b-1-1", "b-1-1", "a-2-2"]
    flags = missing[1].flags("MobileNetV2", "none", RESULTS)
    assert f"--cache_dir={RESULTS / 'b-1-1'}" in flags
    assert "--evaluation_scale=1" not in flags
    (with_fit,) = plan_runs(tasks[1:], ["article, with fit"], 1, 3, 1, [])
    assert with_fit.flags("MobileNetV2", "none", RESULTS)[-1] == "--evaluation_scale=1"
    # Row and task are known (median 20), only the row is, neither is (median of all runs).
    pairs = [("fast", "a"), ("fast", "b"), ("best", "b")]
    assert expected_seconds(pairs, runs) == (60.0, 2)
    assert expected_seconds(pairs, []) == (0.0, 3)
    assert expected_time(7200.0, 0, 3, 2) == "3 runs, about 1.0 hours with --jobs=2"
    assert "3 of them have no finished run" in expected_time(0.0, 3, 3, 1)


def test_only_runs_of_the_same_folds_backbone_weights_and_settings_count(tmp_path):
    weights = tmp_path / "other.weights.h5"
    weights.write_bytes(b"other")
    first = {"row": "fast", "settings": settings_of("fast"), "folds": 3, "seed": 0}
    own = {**first, "task": "a", "backbone": "VGG16", "weights": hash_of_weights(str(weights))}
    ours = {**first, "task": "a", "backbone": "MobileNetV2", "weights": WEIGHTS}
    lines = [ours, own, {**ours, "folds": 5}, {**ours, "settings": "old"}, {**own, "folds": 2}]
    out = tmp_path / "runs.jsonl"
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def found(backbone: str, weights: str | None) -> list[dict]:
        return current_runs(
            argparse.Namespace(out=out, folds=3, backbone=backbone, weights=weights)
        )

    assert found("MobileNetV2", None) == [ours]
    assert found("MobileNetV2", str(weights)) == found("VGG16", None) == []
    assert found("VGG16", str(weights)) == [own]


def runs_of(task: str, row: str, accuracies: list[float], losses: list[float]) -> list[dict]:
    return [
        {
            "task": task,
            "row": row,
            "seed": seed,
            "fold": 0,
            "core_seconds": 10.0,
            "found_cache": seed == 0,
            "accuracy": accuracy,
            "log_loss": loss,
        }
        for seed, (accuracy, loss) in enumerate(zip(accuracies, losses, strict=True))
    ]


def test_rows_are_compared_by_their_mean_over_tasks_and_their_worst_task():
    runs = runs_of("a", "default", [0.9, 0.8, 0.7], [0.1, 0.2, 0.3])
    runs += runs_of("a", "fast", [0.92, 0.82, 0.72], [0.05, 0.1, 0.16])
    runs += runs_of("b", "default", [0.5, 0.5, 0.5], [1.0, 1.0, 1.0])
    runs += runs_of("b", "fast", [0.4, 0.42, 0.44], [2.0, 2.1, 1.9])
    runs += runs_of("b", "best", [0.6, 0.6, 0.6], [1.0, 1.0, 1.0])  # has no run on a
    (fast,) = over_tasks(runs, ["a", "b"], folds=3)
    assert fast.mean("accuracy").mean == pytest.approx((0.02 - 0.08) / 2)
    # Half the log loss on one task and twice the log loss on the other: about the same.
    assert abs(fast.mean("log_loss").mean) < 0.02
    assert fast.worst("accuracy")[0] == fast.worst("log_loss")[0] == "b"
    low, high = fast.worst("accuracy")[1].interval
    assert low < -0.08 < high < 0
    lines = report(runs, ["a", "b"], 3).splitlines()
    assert lines[2].startswith("| fast | 2 | -3.00")
    assert "b **-8.00 (" in lines[2]
    assert "**b**" in lines
    # The core seconds of the runs that computed their cache themselves.
    assert lines[-1].startswith("| best | 3 | 60.00 ± 0.00 |")
    assert lines[-1].endswith("| 10 |")


def test_the_error_of_a_mean_over_tasks():
    first, second = Difference(1.0, 0.3, 0.0, 2), Difference(3.0, 0.4, 0.0, 2)
    mean = mean_over_tasks([first, second])
    assert mean.mean == 2.0
    assert mean.error == pytest.approx(0.25)
    assert 2 < mean.freedom <= 4
    assert np.isnan(mean_over_tasks([first, Difference(1.0, np.nan, np.nan)]).error)
    assert difference_text("accuracy", Difference(0.01, np.nan, np.nan)) == "+1.00"
    assert difference_text("log_loss", Difference(np.log(0.5), 1e-9, 0.0, 2)).startswith("**-50 (")


def test_the_report_replaces_the_part_of_a_document_between_its_marks(tmp_path):
    file = tmp_path / "recipes.md"
    begin = report_mark("ablation")
    file.write_text(f"before\n{begin}\nold\n{REPORT_END}\nafter\n")
    for _ in range(2):
        write_report("ablation", "new", file)
    assert file.read_text() == f"before\n{begin}\n\nnew\n\n{REPORT_END}\nafter\n"
    file.write_text("no marks")
    with pytest.raises(SystemExit, match="has no lines"):
        write_report("ablation", "new", file)
