from __future__ import annotations

import gc
import weakref

import pytest

from research.system.garbage import collected


class Ring:
    """Refers to itself, so that counting references does not free it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def no_automatic_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_what_was_made_within_is_freed_and_what_is_older_is_left_to_python(no_automatic_collection):
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


def test_it_is_freed_after_an_error_too(no_automatic_collection):
    with pytest.raises(KeyboardInterrupt), collected():
        new = weakref.ref(Ring())
        raise KeyboardInterrupt
    assert new() is None
    assert gc.get_freeze_count() == 0
