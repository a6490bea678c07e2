"""Out of memory: our own error, and a retry in smaller pieces."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from ..errors import OutOfMemory

T = TypeVar("T")
R = TypeVar("R")
_logger = logging.getLogger("lorashelf")


@contextmanager
def within_memory(what: str, where: str, cure: str) -> Iterator[None]:
    """Raise OutOfMemory if memory runs out in the block."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        ended = isinstance(error, MemoryError) or "out of memory" in str(error).lower()
        if not ended and "not enough memory" not in str(error):
            raise
        raise OutOfMemory(what, where=where, cure=cure) from error


def sparing(work: Callable[[Sequence[T]], Sequence[R]], batch: Sequence[T], where: str) -> list[R]:
    """Return the work's results for a batch; if memory runs out, try the items one by one. Raises OutOfMemory."""
    what, cure = "out of memory, even with one example at a time", "free memory, or give a smaller base"
    limit = partial(within_memory, what, where, f"{cure} or shorter examples")
    try:
        with limit():
            return list(work(batch))
    except OutOfMemory:
        _logger.warning("out of memory with %d examples in a batch; trying one at a time", len(batch))
    with limit():
        return [found for one in batch for found in work([one])]
