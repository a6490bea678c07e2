"""Several cores at once: many similar pieces of work in parallel, or one piece in the background.

Parallel pieces need one BLAS thread each, and BLAS has one limit for the whole process. The limit is therefore set only
if no other code computes: in a process owned by the command line, or if only our threads run. In a server's threads
BLAS is left alone, and the pieces are computed in sequence unless BLAS already has one thread.
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


_OURS = "lorashelf"  # prefix of our threads' names


def own_process() -> None:
    """Declare that no other code computes in this process, whatever threads run: for programs, not for libraries."""
    _BLAS.owned = True


def each(function: Callable[[T], R], items: Iterable[T], workers: int = WORKERS) -> Generator[R, None, None]:
    """Yield `function` of every item, in order: several items at a time, with one BLAS thread each, if no other code
    computes.

    If closed early, items that have not been started are dropped.
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
    """The BLAS thread limit: set by its first user, restored by the last."""

    def __init__(self) -> None:
        self.owned = False
        self._lock, self._users = threading.Lock(), 0
        self._limit: Any = None

    @contextlib.contextmanager
    def one_thread(self) -> Iterator[bool]:
        """Limit BLAS to one thread in the block if no other code computes; yields whether BLAS has one thread."""
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
        """Return whether the process is the command line's, or only the main thread and ours run."""
        main = threading.main_thread()
        return self.owned or all(t is main or t.name.startswith(_OURS) for t in threading.enumerate())

    @staticmethod
    def _libraries() -> Any:
        from threadpoolctl import ThreadpoolController  # here and below: not needed to start reading

        return ThreadpoolController().select(user_api="blas")


_BLAS = _Blas()


def _pool(workers: int) -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(workers, thread_name_prefix=_OURS)


def at_once(function: Callable[[T], R], items: Sequence[T], workers: int = WORKERS) -> list[R]:
    """Return `function` of every item, in order, computed in parallel; for work without BLAS."""
    if min(len(items), workers) < 2:
        return [function(item) for item in items]
    with _pool(min(len(items), workers)) as pool:
        return list(pool.map(function, items))


@contextlib.contextmanager
def beside(function: Callable[[], R]) -> Iterator[Future[R]]:
    """Run `function` in a thread during the block; leaving the block waits for it."""
    with _pool(1) as pool:
        yield pool.submit(function)


@contextlib.contextmanager
def following(function: Callable[[T], object], most: int = 8) -> Iterator[Callable[[T], T]]:
    """Yield a function that returns its argument at once, while a thread calls `function` with the arguments in order.

    At most `most` arguments wait; leaving the block waits for all of them.
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
