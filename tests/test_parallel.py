from __future__ import annotations

import threading

import pytest
from threadpoolctl import threadpool_info

from lorashelf import parallel


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_each_keeps_the_order_and_gives_blas_one_thread() -> None:
    before = blas_threads()
    found = list(parallel.each(lambda i: (i, blas_threads()), range(50)))
    assert found == [(i, {1}) for i in range(50)]
    assert blas_threads() == before


def test_each_raises_what_an_item_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        list(parallel.each(lambda i: 1 // i, [2, 1, 0]))


def test_beside_runs_while_the_block_runs_and_is_done_after_it() -> None:
    entered = threading.Event()
    with parallel.beside(lambda: entered.wait(10)) as answer:
        assert not answer.done()
        entered.set()
    assert answer.done()
    assert answer.result()


def test_an_error_beside_waits_until_the_result_is_asked_for() -> None:
    with parallel.beside(lambda: 1 // 0) as answer:
        pass
    with pytest.raises(ZeroDivisionError):
        answer.result()
