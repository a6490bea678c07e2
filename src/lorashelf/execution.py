"""Several cores at once: many like pieces of work side by side, or one piece beside what goes on."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")
R = TypeVar("R")
WORKERS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def each(function: Callable[[T], R], items: Iterable[T], workers: int = WORKERS) -> Generator[R, None, None]:
    """What `function` gives for every item, in order: several items at a time, one BLAS thread each.

    Closed early, it drops what has not begun.
    """
    if workers == 1:
        yield from map(function, items)
        return
    from concurrent.futures import ThreadPoolExecutor  # here and below: readers start without

    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(workers) as pool:
        yield from pool.map(function, items)


def at_once(function: Callable[[T], R], items: Sequence[T], workers: int = WORKERS) -> list[R]:
    """What `function` gives for every item, in order; for work without BLAS, whose threads stay as they are."""
    if min(len(items), workers) < 2:
        return [function(item) for item in items]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(len(items), workers)) as pool:
        return list(pool.map(function, items))


@contextlib.contextmanager
def beside(function: Callable[[], R]) -> Iterator[Future[R]]:
    """Run `function` while the block runs; it is done when the block is left."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(function)


@contextlib.contextmanager
def following(function: Callable[[T], object], most: int = 8) -> Iterator[Callable[[T], T]]:
    """Give a function that returns its argument at once, while a thread calls `function` with the arguments in order.

    At most `most` arguments wait; the thread has done with all of them when the block is left.
    """
    from concurrent.futures import ThreadPoolExecutor

    running: deque[Future[object]] = deque()
    with ThreadPoolExecutor(1) as pool:

        def passed(item: T) -> T:
            running.append(pool.submit(function, item))
            if len(running) > most:
                running.popleft().result()
            return item

        yield passed
        for future in running:
            future.result()
