from __future__ import annotations

import dataclasses

import pytest

from research.loop.trunk.decision import FreeSpace, Phase, PhotoCounts, decide
from research.system.errors import UserError

# 110 photos of 1,000 bytes; the frozen layers cost as much as the others forward and backward.
PHASE = Phase("activations", PhotoCounts(100, 10, 1), 10, 10.0, 1000, 30.0, 10.0)
SIZE = 110 * 1000
ROOMY = FreeSpace(100 * SIZE, 100 * SIZE, 100 * SIZE)


def phase(views: int | None = 1, **changes) -> Phase:
    return dataclasses.replace(PHASE, photos=PhotoCounts(100, 10, views), **changes)


def test_the_gain_is_work_without_over_work_with():
    # Ten epochs of 100 photos forward and back and of 10 forward.
    without = 10 * (100 * (30 + 3 * 10) + 10 * (30 + 10))
    once = 110 * 30 + 10 * (100 * 3 * 10 + 10 * 10)
    assert phase().gain == pytest.approx(without / once)
    assert phase().size == SIZE
    # Twice the photos to fill in, in two views.
    twice = 210 * 30 + 10 * (100 * 3 * 10 + 10 * 10)
    assert phase(views=2).gain == pytest.approx(without / twice)
    assert phase(views=2).size == 210 * 1000


def test_of_the_head_alone_everything_but_the_first_time_is_spared():
    assert phase(input_kind="features", other_cost=0.0).gain == pytest.approx(10)


@pytest.mark.parametrize(
    ("setting", "changes", "place", "reason"),
    [
        ("auto", {}, "memory", "activations in memory, 0.1 MB: about 1.9 times as fast"),
        ("auto", {"bytes_per_photo": 10**5}, "memory", "in memory, 11 MB: about"),
        ("auto", {"views": 2}, "memory", "in memory, 0.2 MB, 2 views: about"),
        ("auto", {"epochs": 1, "visits": 1.0}, None, "would make training 1.00 times as fast"),
        ("auto", {"spared_cost": 0.5}, None, "would make training 1.02 times as fast"),
        ("memory", {"epochs": 1, "visits": 1.0}, "memory", "in memory"),
        ("disk", {}, "disk", "on disk"),
        ("again", {"epochs": 1, "visits": 1.0}, "memory", "in memory"),
        ("off", {}, None, "off, as requested"),
        ("auto", {"views": None}, None, "off: None shows photos differently every time"),
        ("auto", {"spared_cost": 0.0}, None, "off: no layer is frozen"),
        ("memory", {"spared_cost": 0.0}, None, "off: no layer is frozen"),
    ],
)
def test_it_is_used_where_it_pays_or_is_asked_for(setting, changes, place, reason):
    free_space = FreeSpace(10**9, 10**9, 10**9)
    decision = decide(setting, phase(**changes), free_space)
    assert decision.place == place
    assert reason in decision.reason
    assert len(decision.reason) <= 80 - len("trunk cache  ")


def test_filling_on_one_device_costs_as_much_as_steps_on_all():
    # Ten epochs of 100 photos forward and back and of 10 forward, on four devices.
    without = (10 * (100 * (30 + 3 * 10) + 10 * (30 + 10))) / 4
    with_cache = 110 * 30 + 10 * (100 * 3 * 10 + 10 * 10) / 4
    assert phase(devices=4).gain == pytest.approx(without / with_cache)
    assert decide("auto", phase(epochs=3, visits=3.0), ROOMY).place == "memory"
    assert decide("auto", phase(epochs=3, visits=3.0, devices=4), ROOMY).place is None


def test_auto_takes_at_most_half_of_the_memory_then_half_of_the_disk():
    assert decide("auto", PHASE, FreeSpace(2 * SIZE, 0, 0)).place == "memory"
    assert decide("auto", PHASE, FreeSpace(2 * SIZE - 1, 2 * SIZE, 0)).place == "file"
    nowhere = decide("auto", PHASE, FreeSpace(2 * SIZE - 1, 2 * SIZE - 1, 100 * SIZE))
    assert nowhere.place is None
    assert "over half of the free space" in nowhere.reason


def test_a_run_that_must_do_it_again_finds_a_place():
    assert decide("again", PHASE, FreeSpace(2 * SIZE, SIZE, 0)).place == "memory"
    assert decide("again", PHASE, FreeSpace(SIZE, SIZE, 0)).place == "file"
    assert decide("again", PHASE, FreeSpace(SIZE, SIZE - 1, 0)).place == "memory"


@pytest.mark.parametrize("setting", ["memory", "disk", "again"])
def test_what_is_asked_for_and_does_not_fit_is_refused(setting):
    with pytest.raises(UserError, match=r"no room for a trunk cache: activations .* take 0.1 MB"):
        decide(setting, PHASE, FreeSpace(SIZE - 1, SIZE - 1, SIZE - 1))


def test_what_lies_on_disk_already_is_used_without_asking_for_room_or_gain():
    none = FreeSpace(0, 0, 0)
    once = phase(epochs=1, visits=1.0)
    for setting in ("auto", "disk", "again"):
        decision = decide(setting, once, none, found=True)
        assert decision.place == "disk"
        assert "on disk, found there" in decision.reason
    assert decide("off", once, ROOMY, found=True).place is None
    assert decide("memory", once, ROOMY, found=True).place == "memory"
