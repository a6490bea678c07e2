"""Several cores at once: many like pieces of work side by side, or one piece beside what goes on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator
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


@contextlib.contextmanager
def beside(function: Callable[[], R]) -> Iterator[Future[R]]:
    """Run `function` while the block runs; it is done when the block is left."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(function)
