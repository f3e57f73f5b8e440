from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from research.data import rows as rows_module
from research.data.rows import Rows, rows_in_a_file
from research.system.errors import UserError


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("on_disk", [False, True])
def test_finished_rows_equal_the_added_rows(tmp_path, dtype, on_disk):
    values = np.random.default_rng(0).uniform(0, 200, (7, 2, 3)).astype(dtype)
    with (tmp_path / "rows").open("wb+") as file:
        rows = Rows((10, 2, 3), dtype, file if on_disk else None)
        for part in (values[:4], values[4:5], values[5:]):
            rows.append(part)
        found = rows.finish()
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("on_disk", [False, True])
def test_rows_are_written_in_any_order_and_unused_ones_are_left_out(tmp_path, on_disk):
    values = np.random.default_rng(0).uniform(size=(6, 2, 3)).astype(np.float32)
    with (tmp_path / "rows").open("wb+") as file:
        rows = Rows((9, 2, 3), np.float32, file if on_disk else None)
        for row in (5, 0, 3, 4):
            rows.write(row, values[row : row + 1])
        found = rows.finish(unused=[2, 1, 6, 8])
        np.testing.assert_array_equal(found, values[[0, 3, 4, 5]])
        assert not on_disk or (tmp_path / "rows").stat().st_size == 4 * 24


@pytest.mark.parametrize("on_disk", [False, True])
def test_threads_write_rows_at_the_same_time(tmp_path, monkeypatch, on_disk):
    monkeypatch.setattr(rows_module, "MOVED_BYTES", 3 * 1000)
    values = np.random.default_rng(0).integers(0, 256, (400, 1000), np.uint8)
    with (tmp_path / "rows").open("wb+") as file, ThreadPoolExecutor(8) as pool:
        rows = Rows(values.shape, np.uint8, file if on_disk else None)
        used = [row for row in range(400) if row % 7]
        list(pool.map(lambda row: rows.write(row, values[row : row + 1]), reversed(used)))
        np.testing.assert_array_equal(rows.finish(range(0, 400, 7)), values[used])


def test_rows_in_a_file_leave_no_name_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rows = rows_in_a_file((2, 4), np.float32)
    rows.append(np.ones((2, 4), np.float32))
    found = rows.finish()
    del rows
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, 1)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_with_a_way_out():
    with open("/dev/full", "wb+", buffering=0) as full:
        rows = Rows((2, 3), np.float32, full, "give another folder")
        with pytest.raises(UserError, match=r"No space left on device.*; give another folder"):
            rows.append(np.zeros((2, 3), np.float32))


@pytest.mark.parametrize("on_disk", [False, True])
def test_more_rows_than_announced_are_refused(tmp_path, on_disk):
    with (tmp_path / "rows").open("wb+") as file:
        rows = Rows((2, 3), np.float32, file if on_disk else None)
        rows.append(np.zeros((2, 3), np.float32))
        with pytest.raises(UserError, match="yields more photos than its count, 2; correct its"):
            rows.append(np.zeros((1, 3), np.float32))


def test_without_rows_the_array_is_empty(tmp_path):
    with (tmp_path / "rows").open("wb+") as file:
        assert Rows((3, 2), np.float32, file).finish().shape == (0, 2)
