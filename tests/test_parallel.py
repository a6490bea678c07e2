from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from lorashelf import execution


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


@pytest.fixture
def two_threads() -> Iterator[None]:
    """BLAS has two threads, also on a machine of one core."""
    with threadpool_limits(2, "blas"):
        yield


@pytest.fixture
def owned(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    """The process is the command line's."""
    monkeypatch.setattr(execution._BLAS, "owned", True)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> Iterator[None]:
    """Another thread than ours lives in the process, as in a server."""
    monkeypatch.setattr(execution._BLAS, "owned", False)
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    yield
    done.set()
    other.join()


def test_each_keeps_the_order_and_gives_blas_one_thread(owned: None) -> None:
    found = list(execution.each(lambda i: (i, blas_threads()), range(50), workers=2))
    assert found == [(i, {1}) for i in range(50)]
    assert blas_threads() == {2}


@pytest.mark.parametrize("kind", ["owned", "shared"])
def test_pieces_that_overlap_leave_blas_as_it_was(kind: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(kind)
    first, second = (execution.each(lambda _: blas_threads(), range(100), workers=2) for _ in range(2))
    during = [next(first), next(second)]
    first.close()
    assert next(second) == during[1]
    second.close()
    assert during == [{1 if kind == "owned" else 2}] * 2
    assert blas_threads() == {2}


@pytest.mark.parametrize("limit", [1, 2])
def test_a_server_keeps_its_blas_and_gets_workers_where_that_has_one_thread(shared: None, limit: int) -> None:
    with threadpool_limits(limit, "blas"):
        found = set(execution.each(lambda _: (threading.current_thread(), *blas_threads()), range(50), workers=2))
    assert {threads for _, threads in found} == {limit}
    assert (threading.current_thread() in {thread for thread, _ in found}) == (limit == 2)


@pytest.mark.parametrize(("beside", "inside"), [("", 1), ("threading.Thread(target=time.sleep, args=[1]).start()", 2)])
def test_a_script_of_one_thread_gives_blas_one(beside: str, inside: int) -> None:
    code = f"""
import threading, time, numpy
from lorashelf import execution
from threadpoolctl import threadpool_info
{beside}
print(set(execution.each(lambda _: threadpool_info()[0]["num_threads"], range(3), workers=2)))
"""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (ran.stdout, ran.stderr) == (f"{{{min(inside, os.cpu_count() or 1)}}}\n", "")


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
