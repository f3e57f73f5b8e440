"""Programs killed at random moments; `python -m tests.reliability.faults` is the long version."""

from __future__ import annotations

from tests.helpers import launcher
from tests.reliability.faults import Faults, disturb


def test_killed_programs_resume_and_leave_no_damaged_file_that_is_used(tmp_path):
    """They end with the weights, rows, files and predictions of an undisturbed run, bit for bit."""
    figures = disturb(Faults(tmp_path, 0, launcher()), kills=3)
    assert figures["violations"] == []
    assert figures["kills"] >= 2  # fewer than requested only if a program ended before its kill
    assert figures["runs_finished_like_the_undisturbed_one"] >= 1
