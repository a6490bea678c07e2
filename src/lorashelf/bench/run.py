"""Measure a suite's cells, each one once: resumable at any point, shared by processes that run at the same time.

FOLDER/METHOD-ID.json       the result of a cell: commit these files
FOLDER/measured/N.jsonl     losses and answers by adapter, examples and model; one file per process, read by all
FOLDER/search-ID.jsonl      the losses of a search until its cell is done
FOLDER/claims/ID            locked while a process measures the cell
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .. import atomic
from ..errors import UsageError
from ..evaluation.measure import prepare
from ..locks import sole
from ..lora.adapter import Adapter, wider
from ..models.protocol import Scores
from ..result_store import ResultStore
from ..tasks.folders import Task
from .assignment import Inputs, assign, bytes_of
from .results import document, path_of, read_results, write_result
from .suite import Cell, Suite

MEASURED, CLAIMS = "measured", "claims"
Watch = Callable[[Cell, Sequence[Any]], Iterable[Any]]
"""Wraps the steps of a cell (the iterations of a search, and the measurements) to follow their progress."""


def run(
    suite: Suite,
    adapters: Mapping[str, Adapter],
    tasks: Mapping[str, Task],
    backend: Scores,
    folder: Path,
    watch: Watch = lambda _, steps: steps,
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Measure the remaining cells; yields each cell with its result when done.

    A cell that another process is measuring is skipped. Raises what evaluation and searches raise, DiskError.
    """
    for path in (folder / MEASURED, folder / CLAIMS):
        atomic.make_parents(path / "x")
    dtype = wider([x.dtype for x in adapters.values()])  # sizes are compared at this dtype
    own_bytes = bytes_of(adapters.values(), dtype)
    with _journal(folder / MEASURED) as kept:
        for cell in suite.cells:
            with _claimed(cell, folder) as free:
                if not free or cell.id in read_results(suite, folder):
                    continue
                started = time.monotonic()
                inputs = Inputs(adapters, tasks, backend, folder, partial(watch, cell))
                assignment = assign(cell, inputs)
                options: dict[str, Any] = {"split": suite.split, "limit": suite.limit, "seed": suite.seed}
                loss_only = "answers" not in cell.measure
                ready = prepare(backend, assignment.serving, tasks, **options, loss_only=loss_only)
                journal = ResultStore(kept, beside=_files(folder / MEASURED))
                measured = ready.measured(backend, journal, partial(watch, cell))
                sizes = {"bytes": assignment.bytes(dtype), "own_bytes": own_bytes}
                result = document(suite, cell, assignment, measured, sizes, time.monotonic() - started)
                write_result(result, path_of(cell, folder))
                atomic.remove(folder / f"search-{cell.id}.jsonl")
                yield cell, result


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


@contextlib.contextmanager
def _journal(folder: Path) -> Iterator[Path]:
    """Lock a file of measurements for this process: the first that no other process holds."""
    for number in range(1, 1000):
        path = folder / f"{number}.jsonl"
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(sole(folder / f"{number}.lock", "another process writes here", path, "wait"))
            except UsageError:
                continue
            if not path.exists():
                atomic.append(path, b"", 0)
            yield path
            return
    raise UsageError("1000 processes are measuring this suite", where=str(folder), cure="wait until some are done")


@contextlib.contextmanager
def _claimed(cell: Cell, folder: Path) -> Iterator[bool]:
    """Claim a cell for the block; yields whether this process may measure the cell."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(sole(folder / CLAIMS / cell.id, "another process measures this cell", folder, "wait"))
        except UsageError:
            yield False
            return
        yield True


def status(suite: Suite, folder: Path) -> dict[str, Any]:
    """Return each cell's state (done, running, waiting) and the estimated seconds for the rest.

    The estimate is the mean time of finished cells of the same kind; None if a kind has none.
    """
    done = read_results(suite, folder) if folder.exists() else {}
    running = [cell.id for cell in suite.cells if cell.id not in done and _is_claimed(cell, folder)]
    seconds: dict[str, list[float]] = {}
    for cell in suite.cells:
        if cell.id in done:
            seconds.setdefault(cell.how, []).append(done[cell.id]["seconds"])
    left = [cell for cell in suite.cells if cell.id not in done]
    known = all(cell.how in seconds for cell in left)
    estimate = sum(sum(seconds[c.how]) / len(seconds[c.how]) for c in left) if known else None
    cells = [
        {"id": c.id, "label": c.label, "state": "done" if c.id in done else "running" if c.id in running else "waiting"}
        for c in suite.cells
    ]
    return {"suite": suite.name, "cells": cells, "done": len(done), "of": len(suite.cells), "seconds_left": estimate}


def _is_claimed(cell: Cell, folder: Path) -> bool:
    if not (folder / CLAIMS / cell.id).exists():
        return False
    with _claimed(cell, folder) as free:
        return not free
