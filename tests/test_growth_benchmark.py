"""The benchmark of growth: its photos, its results on file, and its table."""

from __future__ import annotations

import argparse
import json

import pytest

from benchmarks import growth, harness
from benchmarks.growth import Cell, measure_all, parse_cell, table, write_photos
from research.data.folder.folder_source import FolderSource
from research.data.source import SPLITS


def test_each_photo_has_its_own_content_and_each_class_a_training_photo(tmp_path):
    write_photos(tmp_path, Cell(600, 100))
    source = FolderSource(str(tmp_path))
    assert [source.count(split) for split in SPLITS] == [480, 60, 60]
    assert len(source.class_names) == 100
    labels = [[one.label for one in source.examples(split)] for split in SPLITS]
    assert [len(set(one)) for one in labels] == [100, 60, 60]
    contents = {one.image for split in SPLITS for one in source.examples(split)}
    assert len(contents) == 600
    assert not any("copies" in note for note in source.notes)


def row_of(cell: Cell, flags=()) -> dict:
    seconds = {"seconds": 0.5, "processor_seconds": 0.25}
    process = {**seconds, "peak_bytes": 2e9, "peak_anonymous_bytes": 1e9}
    parts = {
        "first_step": seconds,
        "second_start": seconds,
        "step": seconds,
        "train": process,
        "evaluate": process,
    }
    return {**cell._asdict(), "flags": list(flags), **parts}


def test_cells_on_file_are_not_repeated_and_rows_are_told_apart_by_flags(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    measured = []

    def measure(cell, flags):
        measured.append((*cell, *flags))
        return row_of(cell, flags)

    monkeypatch.setattr(growth, "measure", measure)
    cells = list(map(parse_cell, ("2000x10", "20000x2")))
    measure_all(cells[:1], [])
    measure_all(cells, [])
    measure_all(cells[:1], ["--trunk_cache=disk"])
    measure_all(cells, [])
    assert measured == [(2000, 10), (20000, 2), (2000, 10, "--trunk_cache=disk")]
    rows = json.loads((tmp_path / "growth.json").read_text())["rows"]
    assert [(row["photos"], *row["flags"]) for row in rows] == [
        (20000,),
        (2000,),
        (2000, "--trunk_cache=disk"),
    ]
    lines = table(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[4] == (
        "| 2,000 | 10 | `--trunk_cache=disk` | 0.5 s (0.25) | 0.5 s (0.25) | 500 ms (250) "
        "| 0.5 s (0.25) | 2.00 GB (1.00) | 2.00 GB (1.00) |"
    )


@pytest.mark.parametrize("text", ["2000", "2000x1", "10x20", "x2", "a x2"])
def test_a_cell_that_cannot_be_read_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected PHOTOSxCLASSES"):
        parse_cell(text)
