"""Measure a suite's cells, each one once: resumable at any point, shared by processes that run at the same time.

FOLDER/METHOD-ID.json       the result of a cell: commit these files
FOLDER/measured/N.jsonl     losses and answers by adapter, examples and model; one file per process, read by all
FOLDER/search-ID.jsonl      the losses of a search until its cell is done; gains-ID.jsonl: the gains fitted so far
FOLDER/claims/ID            locked while a process measures the cell
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import atomic
from ..errors import UsageError
from ..evaluation.measure import prepare
from ..locks import sole
from ..lora.adapter import Adapter, wider
from ..models.protocol import Scores
from ..result_store import ResultStore
from ..tasks.folders import Task
from .assignment import Inputs, assign, bytes_of
from .results import EXAMPLES, document, path_of, read_named, read_results, write_result
from .suite import BLOCKS_OF, Cell, Suite

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
    priority: int | None = None,
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Measure the remaining cells up to a priority; yields each cell with its result when done.

    A cell that another process is measuring is skipped. Raises what evaluation and searches raise, DiskError.
    """
    for path in (folder / MEASURED, folder / CLAIMS):
        atomic.make_parents(path / "x")
    dtype = wider([x.dtype for x in adapters.values()])  # sizes are compared at this dtype
    own_bytes = bytes_of(adapters.values(), dtype)
    with _journal(folder / MEASURED) as kept:
        for cell in (cell for cell in suite.cells if priority is None or cell.priority <= priority):
            with _claimed(cell, suite, folder) as free:
                done = read_results(suite, folder)
                if not free or cell.id in done:
                    continue
                started = time.monotonic()
                earlier = _earlier(cell, suite, folder, done)
                chosen = suite.measured_tasks or tuple(adapters)
                inputs = Inputs(adapters, tasks, backend, folder, partial(watch, cell), earlier, suite.split, chosen)
                assignment = assign(cell, inputs)
                options: dict[str, Any] = {"split": suite.split, "limit": suite.limit, "seed": suite.seed}
                loss_only = "answers" not in cell.measure
                serving = {task: x for task, x in assignment.serving.items() if task in chosen}
                ready = prepare(backend, serving, tasks, **options, loss_only=loss_only)
                beside = [path for each in (folder, *suite.shared) for path in _files(each / MEASURED)]
                journal = ResultStore(kept, beside=beside)
                measured = ready.measured(backend, journal, partial(watch, cell))
                sizes = {"bytes": assignment.bytes(dtype), "own_bytes": own_bytes}
                result = document(suite, cell, assignment, measured, sizes, time.monotonic() - started)
                write_result(result, path_of(cell, folder))
                for steps in ("search", "gains"):
                    atomic.remove(folder / f"{steps}-{cell.id}.jsonl")
                yield cell, result


def _earlier(
    cell: Cell, suite: Suite, folder: Path, done: Mapping[str, dict[str, Any]]
) -> Mapping[str, dict[str, Any]]:
    """Return the results whose blocks a cell may take: those done, and those of shared suites, whatever examples they
    measured; for a cell that names a result that one, under whatever conditions.
    """
    if cell.method == BLOCKS_OF:
        return read_named(cell.options["result"], (folder, *suite.shared))
    if cell.how != "search":
        return {}
    alone = replace(suite, shared=())
    shared = [read_results(alone, each, any_of=EXAMPLES) for each in suite.shared]
    return {cell: result for results in (*shared, done) for cell, result in results.items()}


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
def _claimed(cell: Cell, suite: Suite, folder: Path) -> Iterator[bool]:
    """Claim a cell for the block, in the shared folders too; yields whether this process may measure the cell. Claims
    are locks, which the system releases when a process ends, however it ends.
    """
    with contextlib.ExitStack() as stack:
        for each in sorted({folder, *suite.shared}):  # in one order, so that of two processes one gets all
            path = each / CLAIMS / cell.id
            atomic.make_parents(path)
            try:
                stack.enter_context(sole(path, "another process measures this cell", each, "wait"))
            except UsageError:
                yield False
                return
        yield True


def status(suite: Suite, folder: Path) -> dict[str, Any]:
    """Return each cell's state (done, running, waiting) and the estimated seconds for the rest, in all and by priority.

    The estimate of a cell is the suite's `hours`, else the mean time of finished cells of the same kind; a sum is None
    if a cell has neither.
    """
    done = read_results(suite, folder)
    running = [cell.id for cell in suite.cells if cell.id not in done and _is_claimed(cell, suite, folder)]
    seconds: dict[str, list[float]] = {}
    for cell in suite.cells:
        if cell.id in done:
            seconds.setdefault(cell.how, []).append(done[cell.id]["seconds"])

    def estimate(cells: Sequence[Cell]) -> float | None:
        if any(cell.hours is None and cell.how not in seconds for cell in cells):
            return None
        return sum(3600 * c.hours if c.hours is not None else float(np.mean(seconds[c.how])) for c in cells)

    left = [cell for cell in suite.cells if cell.id not in done]
    priorities = []
    for number in sorted({cell.priority for cell in suite.cells}):
        waiting = [cell for cell in left if cell.priority == number]
        of = sum(cell.priority == number for cell in suite.cells)
        priorities.append({"priority": number, "left": len(waiting), "of": of, "seconds_left": estimate(waiting)})
    cells = [
        {"id": c.id, "label": c.label, "state": "done" if c.id in done else "running" if c.id in running else "waiting"}
        for c in suite.cells
    ]
    counts = {"done": len(done), "of": len(suite.cells), "seconds_left": estimate(left), "priorities": priorities}
    return {"suite": suite.name, "cells": cells, **counts}


def _is_claimed(cell: Cell, suite: Suite, folder: Path) -> bool:
    if not any((each / CLAIMS / cell.id).exists() for each in (folder, *suite.shared)):
        return False
    with _claimed(cell, suite, folder) as free:
        return not free
