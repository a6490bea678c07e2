"""Several cores at once: many like pieces of work side by side, or one piece beside what goes on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

T = TypeVar("T")
R = TypeVar("R")
WORKERS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def each(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """What `function` gives for every item, in order: several items at a time, one BLAS thread each."""
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(WORKERS) as pool:
        yield from pool.map(function, items)


@contextlib.contextmanager
def beside(function: Callable[[], R]) -> Iterator[Future[R]]:
    """Run `function` while the block runs; it is done when the block is left."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(function)
