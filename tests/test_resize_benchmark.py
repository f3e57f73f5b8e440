"""The basis of the table of `--resize`: differences that are paired by photo."""

from __future__ import annotations

import pytest

from benchmarks.resize import summarize, table


def run_of(resize: str, fold: int, extra: float) -> dict:
    losses = {str(index): (index % 7 + extra, index % 7 < 5) for index in range(50)}
    names = sorted(losses, reverse=resize == "crop")
    return {
        "data": "d",
        "recipe": "fast",
        "resize": resize,
        "fold": fold,
        "left_out": {f"{fold}/{name}": losses[name] for name in names},
        "test": {name: losses[name] for name in names[:10]},
    }


def test_differences_are_paired_by_photo_over_the_folds_of_all():
    runs = [run_of("squash", 0, 0.0), run_of("squash", 1, 9.0)]
    runs += [run_of("crop", 0, 0.25), run_of("pad", 0, 0.0), run_of("pad", 1, 0.0)]
    squash, crop, *_ = summarize(runs)
    assert (squash["folds"], squash["photos"], crop["folds"], crop["photos"]) == (1, 50, 1, 50)
    # Each photo has the same difference, although photos differ and are in another order.
    for key in ("difference", "from", "to"):
        assert crop[f"log loss: {key}"] == pytest.approx(0.25)
        assert crop[f"accuracy, %: {key}"] == 0
    lines = table(summarize(runs)).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| **+0.250 (+0.250 to +0.250)** | +0.000 (" in lines[2]
    assert summarize(runs[:2]) == []


def test_test_photos_are_averaged_over_the_runs():
    runs = [run_of("squash", fold, 0.0) for fold in (0, 1)]
    runs += [{**run_of("pad", fold, 0.25 + fold), "test": runs[0]["test"]} for fold in (0, 1)]
    runs += [run_of("crop", fold, 0.0) for fold in (0, 1)]
    runs[2]["test"] = {name: (loss + 1.0, hit) for name, (loss, hit) in runs[0]["test"].items()}
    *_, test = summarize(runs)
    assert (test["split"], test["resize"], test["photos"]) == ("test", "pad", 10)
    assert test["log loss: difference"] == pytest.approx(0.5)
