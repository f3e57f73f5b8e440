"""What `run_cache.py` lists and removes."""

from __future__ import annotations

import json
import os
import time

import filelock
import numpy as np
import pytest

from research.data.cache_report import tidy
from research.data.cache_store import CacheStore, entries_of
from tests.helpers import run_script


def write_entry(store: CacheStore, description: dict, megabytes: int, days: float) -> None:
    def make(make_rows):
        rows = make_rows((megabytes, 10**6), np.dtype(np.uint8))
        rows.append(np.zeros((megabytes, 10**6), np.uint8))
        return [rows]

    store.find_or_make(description, make)
    (entry,) = [one for one in entries_of(store.folder) if one.made_from == description]
    then = time.time() - days * 86400
    os.utime(entry.folder / "contents.json", (then, then))


@pytest.fixture
def folder(tmp_path):
    photos = {"kept": "photos", "photos": 1200, "size": 160}
    write_entry(CacheStore(tmp_path / "photos"), {**photos, "first": 0}, 3, days=40)
    write_entry(CacheStore(tmp_path / "photos"), {**photos, "first": 600}, 3, days=3.2)
    write_entry(CacheStore(tmp_path), {"kept": "features", "photos": 7, "size": 32}, 1, days=0)
    write_entry(CacheStore(tmp_path), {"kept": "activations", "photos": 8, "size": 32}, 2, days=50)
    other = tmp_path / "another program"
    other.mkdir()
    (other / "contents.json").write_text(json.dumps({"made_from": {}}))
    return tmp_path


def listed(capsys) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_entries_are_listed_with_their_size_and_last_use(folder, capsys):
    tidy(str(folder))
    assert listed(capsys) == [
        ["kept", "photos", "pixels", "size", "last", "used"],
        ["features", "7", "32", "1.0", "MB", "today"],
        ["photos", "1,200", "160", "6.0", "MB", "3", "days", "ago"],
        ["activations", "8", "32", "2.0", "MB", "50", "days", "ago"],
        ["9.0", "MB", "in", str(folder)],
    ]


@pytest.mark.parametrize(
    ("days", "gigabytes", "removed", "kept"),
    [
        (45, None, "2.0", ["features", "photos"]),
        (30, None, "5.0", ["features", "photos"]),
        (None, 0.0045, "5.0", ["features", "photos"]),
        (None, 0.0035, "8.0", ["features"]),
        (45, 0.0, "9.0", []),
    ],
)
def test_the_least_recently_used_entries_are_removed(
    folder, capsys, days, gigabytes, removed, kept
):
    tidy(str(folder), days, gigabytes)
    first, *others = listed(capsys)
    assert first == ["removed", removed, "MB"]
    assert [line[0] for line in others[1:-1]] == kept
    assert (folder / "another program/contents.json").exists()


def test_an_entry_that_is_being_written_is_not_removed(folder, capsys):
    (entry,) = [one for one in entries_of(folder) if one.made_from["kept"] == "features"]
    with filelock.FileLock(f"{entry.folder}.lock"):
        tidy(str(folder), keep_gigabytes=0)
    assert [line[0] for line in listed(capsys)] == ["removed", "kept", "features", "1.0"]


def test_using_an_entry_makes_it_recent_and_writing_one_removes_unused_ones(folder, capsys):
    store = CacheStore(folder)
    assert store.find({"kept": "activations", "photos": 8, "size": 32}) is not None
    write_entry(store, {"kept": "old"}, 1, days=61)
    write_entry(CacheStore(folder), {"kept": "new"}, 1, days=0)  # a later run
    assert "trunk cache  removed 1 MB that no run used for 60 days" in capsys.readouterr().out
    kept = {one.made_from["kept"] for one in entries_of(folder)}
    assert kept == {"activations", "features", "new"}


def test_the_program_lists_an_empty_cache_and_refuses_a_negative_size(tmp_path):
    process = run_script(tmp_path, "run_cache.py", "--cache_dir=none")
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == f"0.0 MB in {tmp_path / 'none'}\n"
    process = run_script(tmp_path, "run_cache.py", "--keep_gigabytes=-1")
    assert process.returncode == 2
    expected = "run_cache.py: keep_gigabytes is -1.0; expected a number of at least 0\n"
    assert process.stderr == expected
