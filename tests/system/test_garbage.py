from __future__ import annotations

import gc
import weakref

import pytest

from research.system.garbage import collected, not_searched


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
