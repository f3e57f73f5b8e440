from __future__ import annotations

import pytest

from research.config import TrainConfig
from research.errors import UserError
from research.runtime import fast_precision, resolve_precision, resolve_xla

NONE: frozenset[str] = frozenset()


@pytest.mark.parametrize(
    ("capabilities", "cpu_flags", "expected"),
    [
        ([(9, 0)], NONE, "bfloat16"),
        ([(8, 0), (9, 0)], NONE, "bfloat16"),
        ([(7, 5)], NONE, "float16"),
        ([(9, 0), (7, 0)], NONE, "float16"),  # the slowest decides
        ([(6, 1)], frozenset({"amx_bf16"}), "float32"),
        ([], NONE, "float32"),
        ([], frozenset({"avx512_bf16"}), "float32"),
        ([], frozenset({"amx_bf16"}), "bfloat16"),
    ],
)
def test_auto_takes_what_the_device_is_fast_in(capabilities, cpu_flags, expected):
    assert fast_precision(capabilities, cpu_flags) == expected


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_precision_that_is_asked_for_is_taken(precision):
    assert resolve_precision(precision) == precision


def test_xla_is_for_gpus_unless_asked_for():
    assert not resolve_xla(TrainConfig(), 1)  # no GPU here
    assert resolve_xla(TrainConfig(xla="on"), 2)
    assert not resolve_xla(TrainConfig(xla="off"), 1)
    assert resolve_xla(TrainConfig(xla="on", bn_mode="sync"), 1)


def test_xla_and_an_exchange_within_the_step_do_not_go_together():
    with pytest.raises(UserError, match="bn_mode is 'sync' on 2 devices"):
        resolve_xla(TrainConfig(xla="on", bn_mode="sync"), 2)
