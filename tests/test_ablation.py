"""The basis of the ablation's table: folds and a paired test."""

from __future__ import annotations

import collections
import json

import numpy as np
import pytest
from scipy import stats

from benchmarks.ablation import Fold
from benchmarks.ablation_report import mean_and_error, paired_test
from benchmarks.ablation_rows import REMOVED, ROWS, settings_of
from benchmarks.harness import RESULTS


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
    mean, error, probability = paired_test(differences, folds=5)
    assert mean == pytest.approx(0.02)
    assert error == pytest.approx(differences.std(ddof=1) * np.sqrt(1 / 5 + 1 / 4))
    t = 0.02 / error
    assert probability == pytest.approx(2 * (1 - stats.t.cdf(t, 4)))
    assert probability > stats.ttest_1samp(differences, 0).pvalue
    assert np.isnan(paired_test(np.zeros(5), 5).probability)


def test_mean_and_error():
    assert mean_and_error(np.array([1.0, 3.0])) == pytest.approx((2.0, 1.0))
    assert np.isnan(mean_and_error(np.array([1.0]))[1])


def test_the_runs_on_file_have_the_settings_of_their_rows():
    """Otherwise, the report would leave them out."""
    known = {**{row: settings_of(row) for row in ROWS}, **REMOVED}
    for file in RESULTS.glob("ablation*.jsonl"):
        for run in map(json.loads, file.read_text().splitlines()):
            assert run["settings"] == known[run["row"]], (file.name, run["row"])


def test_every_row_has_its_own_settings():
    hashes = [settings_of(row) for row in ROWS]
    assert len(set(hashes)) == len(hashes)
