"""Several cores at once: many like pieces of work side by side, or one piece beside what goes on.

Pieces side by side want one BLAS thread each, and BLAS knows one limit for the whole process. So it is set only where
nobody else computes: in a process that the command line owns, or where no thread but ours runs. In a server's threads
BLAS stays as it is, and the pieces are computed one after the other unless BLAS has one thread already.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

T = TypeVar("T")
R = TypeVar("R")
WORKERS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


_OURS = "lorashelf"  # how the names of our threads begin


def own_process() -> None:
    """Say that nobody else computes in this process, whatever threads run: for programs, not for libraries."""
    _BLAS.owned = True


def each(function: Callable[[T], R], items: Iterable[T], workers: int = WORKERS) -> Generator[R, None, None]:
    """What `function` gives for every item, in order: several items at a time, one BLAS thread each, where nobody else
    computes.

    Closed early, it drops what has not begun.
    """
    if workers == 1:
        yield from map(function, items)
        return
    with _BLAS.one_thread() as single:
        if not single:
            yield from map(function, items)
            return
        with _pool(workers) as pool:
            yield from pool.map(function, items)


class _Blas:
    """BLAS's limit of threads: set by the first that needs it, put back by the last."""

    def __init__(self) -> None:
        self.owned = False
        self._lock, self._users = threading.Lock(), 0
        self._limit: Any = None

    @contextlib.contextmanager
    def one_thread(self) -> Iterator[bool]:
        """Hold BLAS at one thread in the block where nobody else computes; yields whether it has one."""
        if not self._alone():
            yield all(library["num_threads"] == 1 for library in self._libraries().info())
            return
        with self._lock:
            if not self._users:
                self._limit = self._libraries().limit(limits=1)
            self._users += 1
        try:
            yield True
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._limit.restore_original_limits()

    def _alone(self) -> bool:
        """Whether the process is the command line's, or runs no thread but the main one and ours."""
        main = threading.main_thread()
        return self.owned or all(t is main or t.name.startswith(_OURS) for t in threading.enumerate())

    @staticmethod
    def _libraries() -> Any:
        from threadpoolctl import ThreadpoolController  # here and below: readers start without

        return ThreadpoolController().select(user_api="blas")


_BLAS = _Blas()


def _pool(workers: int) -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(workers, thread_name_prefix=_OURS)


def at_once(function: Callable[[T], R], items: Sequence[T], workers: int = WORKERS) -> list[R]:
    """What `function` gives for every item, in order; for work without BLAS, whose threads stay as they are."""
    if min(len(items), workers) < 2:
        return [function(item) for item in items]
    with _pool(min(len(items), workers)) as pool:
        return list(pool.map(function, items))


@contextlib.contextmanager
def beside(function: Callable[[], R]) -> Iterator[Future[R]]:
    """Run `function` while the block runs; it is done when the block is left."""
    with _pool(1) as pool:
        yield pool.submit(function)


@contextlib.contextmanager
def following(function: Callable[[T], object], most: int = 8) -> Iterator[Callable[[T], T]]:
    """Give a function that returns its argument at once, while a thread calls `function` with the arguments in order.

    At most `most` arguments wait; the thread has done with all of them when the block is left.
    """
    running: deque[Future[object]] = deque()
    with _pool(1) as pool:

        def passed(item: T) -> T:
            running.append(pool.submit(function, item))
            if len(running) > most:
                running.popleft().result()
            return item

        yield passed
        for future in running:
            future.result()
