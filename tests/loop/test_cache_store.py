from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import filelock
import ml_dtypes
import numpy as np
import pytest

from research.data import cache_store
from research.data.cache_store import CacheStore
from research.system.errors import UserError
from tests.helpers import ROOT

MADE_FROM = {"photos": "abc", "layers": [1, 2]}


def values(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    first = generator.normal(size=(5, 2, 3)).astype(np.float32)
    return first, generator.normal(size=(5, 4)).astype(ml_dtypes.bfloat16)


def maker(arrays):
    """Fills two arrays in two parts each."""

    def make(make_rows):
        made = [make_rows(array.shape, array.dtype) for array in arrays]
        for rows, array in zip(made, arrays, strict=True):
            rows.append(array[:3])
            rows.append(array[3:])
        return made

    return make


def never(make_rows):
    raise AssertionError("made again")


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def entry_of(store: CacheStore):
    (entry,) = (path for path in store.folder.iterdir() if path.is_dir())
    return entry


@pytest.fixture
def store(tmp_path):
    return CacheStore(tmp_path / "no such" / "folder")


def test_what_was_made_is_found_and_not_made_again(store):
    assert not store.has_entries
    assert store.find(MADE_FROM) is None
    assert not store.folder.exists()
    assert_equal(store.find_or_make(MADE_FROM, maker(values())), values())
    assert store.has_entries
    assert_equal(store.find_or_make(MADE_FROM, never), values())
    assert_equal(CacheStore(store.folder).find(MADE_FROM), values())


@pytest.mark.parametrize("other", [{"photos": "abd", "layers": [1, 2]}, {"photos": "abc"}])
def test_what_was_made_from_something_else_is_not_found(store, other):
    store.find_or_make(MADE_FROM, maker(values()))
    assert store.find(other) is None
    assert_equal(store.find_or_make(other, maker(values(1))), values(1))
    assert_equal(store.find(MADE_FROM), values())


def cut_short(entry):
    os.truncate(entry / "0.bin", 100)


def lengthened(entry):
    with (entry / "1.bin").open("ab") as file:
        file.write(b"more")


def removed(entry):
    (entry / "1.bin").unlink()


def no_json(entry):
    (entry / "contents.json").write_text("{")


def other_description(entry):
    contents = json.loads((entry / "contents.json").read_text())
    contents["made_from"]["photos"] = "something else"
    (entry / "contents.json").write_text(json.dumps(contents))


@pytest.mark.parametrize("damage", [cut_short, lengthened, removed, no_json, other_description])
def test_a_damaged_entry_counts_as_none_and_is_replaced(store, damage):
    store.find_or_make(MADE_FROM, maker(values()))
    damage(entry_of(store))
    assert store.find(MADE_FROM) is None
    assert_equal(store.find_or_make(MADE_FROM, maker(values())), values())


def test_what_is_found_and_not_right_is_made_anew(store):
    store.find_or_make(MADE_FROM, maker(values()))
    found = store.find_or_make(MADE_FROM, maker(values(1)), lambda arrays: False)
    assert_equal(found, values(1))
    assert_equal(store.find_or_make(MADE_FROM, never, lambda arrays: True), values(1))


def test_a_folder_that_can_only_be_read_serves_what_is_there(store):
    store.find_or_make(MADE_FROM, maker(values()))
    for path in store.folder.glob("*.lock"):
        path.unlink()
        path.mkdir()  # even root cannot lock it
    assert_equal(store.find_or_make(MADE_FROM, never), values())


def test_a_failure_while_making_leaves_nothing(store):
    def fail(make_rows):
        make_rows((3, 2), np.float32).append(np.zeros((1, 2), np.float32))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.find_or_make(MADE_FROM, fail)
    assert not [path for path in store.folder.iterdir() if path.is_dir()]


WAITING_WRITER = """
import sys
import numpy as np
from pathlib import Path
from research.data.cache_store import CacheStore

def make(make_rows):
    rows = make_rows((5, 4), np.float32)
    rows.append(np.full((2, 4), 7, np.float32))
    print("half", flush=True)
    sys.stdin.readline()
    rows.append(np.full((3, 4), 7, np.float32))
    return [rows]

CacheStore(Path(sys.argv[1])).find_or_make({"photos": "abc", "layers": [1, 2]}, make)
"""


def start_waiting_writer(store: CacheStore) -> subprocess.Popen[str]:
    """Starts a process that writes half of an entry, and the rest after a line of its input."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING_WRITER, str(store.folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    return process


def test_a_half_written_entry_of_a_killed_process_is_not_trusted_and_removed(store):
    process = start_waiting_writer(store)
    (partial,) = store.folder.glob("*.partial")
    assert (partial / "0.bin").stat().st_size == 2 * 4 * 4
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert store.find(MADE_FROM) is None
    # Whoever comes next clears it away, whatever it makes itself.
    assert_equal(store.find_or_make({"photos": "x"}, maker(values(1))), values(1))
    assert not list(store.folder.glob("*.partial"))
    assert_equal(store.find_or_make(MADE_FROM, maker(values())), values())


def test_what_another_process_is_making_is_waited_for_and_left_alone(store, monkeypatch):
    process = start_waiting_writer(store)
    said = []

    def told(line: str, flush: bool) -> None:
        said.append(line)
        process.stdin.write("\n")  # the other one goes on when this one waits
        process.stdin.flush()

    monkeypatch.setattr(cache_store, "print", told, raising=False)
    assert_equal(store.find_or_make({"photos": "x"}, maker(values(1))), values(1))
    (found,) = store.find_or_make(MADE_FROM, never)
    assert said == ["trunk cache  waiting for another run that fills the same cache"]
    np.testing.assert_array_equal(found, np.full((5, 4), 7))
    process.communicate()
    assert process.returncode == 0


def test_another_entry_is_not_waited_for(store):
    store.find_or_make(MADE_FROM, maker(values()))
    with filelock.FileLock(f"{entry_of(store)}.lock"):
        begin = time.monotonic()
        assert_equal(store.find_or_make({"photos": "x"}, maker(values(1))), values(1))
        assert time.monotonic() - begin < 5


def test_a_folder_that_cannot_be_written_is_told_with_ways_out(tmp_path):
    (tmp_path / "file").write_text("")
    store = CacheStore(tmp_path / "file" / "cache")
    with pytest.raises(UserError, match=r"cannot be written .*--cache_dir, or --trunk_cache=off"):
        store.find_or_make(MADE_FROM, maker(values()))
