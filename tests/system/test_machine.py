from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from research.system.machine import fits_in_memory, free_disk, free_memory, processors


def test_without_limits_the_machine_counts(tmp_path):
    assert processors(tmp_path) == len(os.sched_getaffinity(0))
    assert 0 < free_memory(tmp_path) <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("quota", "count"),
    [
        ("100000 100000", 1),
        ("50000 100000", 1),
        ("150000 100000", min(2, len(os.sched_getaffinity(0)))),
    ],
)
def test_the_processor_quota_of_a_container_counts(tmp_path, quota, count):
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert processors(tmp_path) == count


def test_no_quota_is_no_limit(tmp_path):
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert processors(tmp_path) == len(os.sched_getaffinity(0))


def test_the_memory_limit_of_a_container_counts_without_reclaimable_memory(tmp_path):
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    assert free_memory(tmp_path) == 1000
    (tmp_path / "memory.stat").write_text("anon 3000\ninactive_file 700\n")
    assert free_memory(tmp_path) == 1700
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) > 1e6


def test_at_most_half_of_the_free_memory_is_used():
    assert fits_in_memory(1000)
    assert not fits_in_memory(psutil.virtual_memory().total)


def test_free_disk_of_a_missing_folder(tmp_path):
    assert free_disk(tmp_path / "no" / "such") == pytest.approx(free_disk(Path(tmp_path)), rel=0.1)


def test_free_disk_of_an_inaccessible_folder_is_0(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr("shutil.disk_usage", refuse)
    assert free_disk(tmp_path / "private" / "cache") == 0
