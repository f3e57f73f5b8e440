from __future__ import annotations

import types

import psutil
import pytest

from research.config import TrainConfig
from research.residual import build_small_resnet
from research.split import split_backbone
from research.trunk_cache import bytes_a_photo, decide


@pytest.fixture(scope="module")
def parts():
    return split_backbone(build_small_resnet((32, 32, 3), None), 30)


def config(**settings) -> TrainConfig:
    return TrainConfig(backbone="SmallResNet", **settings)


def test_a_photo_takes_what_crosses_the_cut(parts):
    (tensor,) = parts.trunk.outputs
    _, height, width, channels = tensor.shape
    assert bytes_a_photo(parts) == 4 * height * width * channels


@pytest.mark.parametrize(
    ("settings", "visits", "use", "reason"),
    [
        ({}, 10, True, "in memory"),
        ({"trunk_cache": "off"}, 10, False, "as asked"),
        ({}, 1, False, "too few to pay"),
        ({"trunk_cache": "memory"}, 1, True, "in memory"),
        ({"horizontal_flip": True}, 10, False, "mirrored"),
    ],
)
def test_it_is_used_where_it_pays(parts, settings, visits, use, reason):
    decision = decide(config(**settings), parts, photos=100, visits=visits)
    assert decision.use is use
    assert reason in decision.reason


def test_it_is_not_used_where_it_would_take_half_of_what_is_free(parts, monkeypatch):
    def memory() -> types.SimpleNamespace:
        return types.SimpleNamespace(available=150 * bytes_a_photo(parts))

    monkeypatch.setattr(psutil, "virtual_memory", memory)
    assert decide(config(), parts, photos=70, visits=10).use
    decision = decide(config(), parts, photos=80, visits=10)
    assert not decision.use
    assert "more than half of the free" in decision.reason
    assert decide(config(trunk_cache="memory"), parts, photos=80, visits=10).use


def test_without_frozen_layers_there_is_nothing_to_cache():
    whole = split_backbone(build_small_resnet((32, 32, 3), None), 0)
    assert decide(config(), whole, 100, 10).reason == "off: no layer is frozen"
