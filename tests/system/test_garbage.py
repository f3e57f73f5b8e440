from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import tensorflow as tf

from research.loop.preparation import raise_as_user_error
from research.settings.train_config import TrainConfig
from research.system.errors import UserError
from research.system.garbage import collected, not_searched
from research.system.program import ended_by_a_line


class Ring:
    """Refers to itself, so that reference counting does not free it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def no_automatic_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_only_objects_created_in_the_block_are_freed(no_automatic_collection):
    older = Ring()
    old = weakref.ref(older)
    with collected():
        new = weakref.ref(Ring())
        del older
        assert new() is not None
    assert new() is None
    assert old() is not None
    gc.collect()
    assert old() is None


def test_objects_are_freed_after_an_error(no_automatic_collection):
    with pytest.raises(KeyboardInterrupt), collected():
        new = weakref.ref(Ring())
        raise KeyboardInterrupt
    assert new() is None
    assert gc.get_freeze_count() == 0


def read_until_an_error(pipelines: list[weakref.ref]) -> None:
    def take(index: np.int64) -> np.int64:
        if index == 2:
            raise UserError("no photo")
        return index

    numbers = tf.data.Dataset.range(4).map(lambda i: tf.numpy_function(take, [i], tf.int64))
    iterator = iter(numbers.prefetch(2))
    pipelines.append(weakref.ref(iterator))
    for _ in iterator:
        pass


def test_a_pipeline_that_raised_an_error_is_freed_in_the_thread_that_used_it(
    no_automatic_collection, capsys
):
    """A collection in a thread of the pipeline would wait for this thread, without end."""
    pipelines: list[weakref.ref] = []
    with pytest.raises(SystemExit) as ended, ended_by_a_line():
        read_until_an_error(pipelines)
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(": no photo\n")
    with pytest.raises(UserError, match=r"^no photo$") as raised:
        try:
            read_until_an_error(pipelines)
        except tf.errors.OpError as error:
            raise_as_user_error(error, TrainConfig())
    assert raised.value.__cause__ is not None
    assert [pipeline() for pipeline in pipelines] == [None, None]


def test_the_collector_is_on_again_and_skips_what_was_created_without_it():
    before = gc.get_freeze_count()
    try:
        with pytest.raises(KeyboardInterrupt), not_searched():
            assert not gc.isenabled()
            created = [[] for _ in range(1000)]
            raise KeyboardInterrupt
        assert gc.isenabled()
        assert gc.get_freeze_count() >= before + len(created)
    finally:
        gc.unfreeze()
