from __future__ import annotations

import itertools
import threading
import time

import pytest

from research.data.thread_pool import in_order


def test_results_come_in_order_while_several_are_computed():
    both = threading.Barrier(2, timeout=60)

    def work(item: int) -> int:
        both.wait()  # until another thread is here
        time.sleep(0.01 * (item % 2 == 0))
        return item * item

    with in_order(work, range(6), threads=2) as results:
        assert list(results) == [(item, item * item) for item in range(6)]


def test_only_a_few_items_are_read_ahead():
    numbers = itertools.count()
    with in_order(str, numbers, threads=2) as results:
        assert next(results) == (0, "0")
        assert next(numbers) == 4


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_ends_the_iteration_and_the_threads(threads):
    used = set()

    def work(item: int) -> float:
        used.add(threading.current_thread())
        return 1 / item

    with pytest.raises(ZeroDivisionError), in_order(work, [1, 0, 1], threads) as results:
        list(results)
    assert (threading.main_thread() in used) == (threads == 1)
    assert not any(one.is_alive() for one in used - {threading.main_thread()})
