from __future__ import annotations

import threading

import pytest
from threadpoolctl import threadpool_info

from lorashelf import execution


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_each_keeps_the_order_and_gives_blas_one_thread() -> None:
    before = blas_threads()
    found = list(execution.each(lambda i: (i, blas_threads()), range(50)))
    assert found == [(i, {1}) for i in range(50)]
    assert blas_threads() == before


def test_each_with_one_worker_stays_in_this_thread_and_takes_items_one_by_one() -> None:
    begun: list[int] = []
    results = execution.each(lambda i: (begun.append(i), threading.get_ident()), range(5), workers=1)
    assert next(results) == (None, threading.get_ident())
    assert begun == [0]


def test_each_drops_what_has_not_begun_when_it_is_closed() -> None:
    begun: list[int] = []
    go = threading.Event()

    def work(i: int) -> None:
        begun.append(i)
        if i:
            go.wait(10)

    results = execution.each(work, range(1000), workers=2)
    next(results)
    threading.Timer(0.2, go.set).start()
    results.close()
    assert len(begun) < 10


def test_each_raises_what_an_item_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        list(execution.each(lambda i: 1 // i, [2, 1, 0]))


def test_beside_runs_while_the_block_runs_and_is_done_after_it() -> None:
    entered = threading.Event()
    with execution.beside(lambda: entered.wait(10)) as answer:
        assert not answer.done()
        entered.set()
    assert answer.done()
    assert answer.result()


def test_an_error_beside_waits_until_the_result_is_asked_for() -> None:
    with execution.beside(lambda: 1 // 0) as answer:
        pass
    with pytest.raises(ZeroDivisionError):
        answer.result()
