"""Tests of the table of trained parts."""

from __future__ import annotations

import dataclasses

import pytest

from research.loop.builder import build_network, make_groups
from research.loop.plan import make_plan
from research.loop.run_state import RunState
from research.runs.console import parts_table
from tests.learners import CONFIG, SHAPES


@pytest.mark.parametrize(
    ("changes", "trained_by"),
    [
        ({}, {"head": "SGD 0.5, constant", "backbone": "SGD 0.01, constant", "frozen": "-"}),
        (
            {"epochs": 0, "head_epochs": 2},
            {"head": "SGD 0.5, constant", "backbone": "- (epochs is 0)", "frozen": "-"},
        ),
        (
            {"unfreeze_from": "stage2", "stage_decay": 0.5},
            {
                "backbone stage3": "SGD 0.01, constant",
                "backbone stage2": "SGD 0.005, constant",
                "frozen": "-",
                "head": "SGD 0.5, constant",
            },
        ),
    ],
)
def test_the_table_names_the_optimizer_of_each_part(changes, trained_by):
    config = dataclasses.replace(CONFIG, **changes)
    built = build_network(config, ("a", "b"))
    groups = make_groups(config, built.network.model, RunState(SHAPES).step, make_plan(config, 16))
    lines = parts_table(built, groups)
    assert max(map(len, lines)) <= 79
    for part, optimizer in trained_by.items():
        (line,) = [line for line in lines if line.startswith(f"{part} ")]
        assert line.endswith(f"  {optimizer}")
