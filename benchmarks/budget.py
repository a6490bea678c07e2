"""Many large adapters that arrive one by one at a shelf of a fixed number of bytes.

    python benchmarks/budget.py [--count N] [--shelf DIR]

Adapters of rank 32 in the shapes of Llama-3.2-1B's attention (13.6 MB in f16), with singular values that fall as those
of trained adapters do. Every adapter has 250 kB of the budget: 1.8 % of its bytes. The first ones stay as fine as they
are coded; once the shelf is full, every add makes others coarser. Times are CPU seconds of one thread, the coding
apart. With --shelf, an interrupted run is resumed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import common
from coded import large
from common import megabytes, seconds

COUNT = 1000
SHARE = 250_000  # bytes of the budget per adapter
ADD, PEAK = 2.0, 500.0


@contextmanager
def timed(taken: dict[str, float], stage: str) -> Iterator[None]:
    started = time.process_time()
    try:
        yield
    finally:
        taken[stage] = taken.get(stage, 0.0) + time.process_time() - started


def coding(taken: dict[str, float], alone: Callable[..., Any], *given: Any) -> Any:
    with timed(taken, "coding"):
        return alone(*given)


def added(shelf: Any, number: int) -> dict[str, Any]:
    """Add an adapter; the CPU seconds of its stages, and what the shelf predicts afterwards."""
    from lorashelf import plan_add
    from lorashelf.lora.quality import summary
    from lorashelf.merging.average import alone
    from lorashelf.shelf.allocation import rate

    adapter = large(number)
    taken: dict[str, float] = {}
    with mock.patch("lorashelf.shelf.arrival.alone", partial(coding, taken, alone)), timed(taken, "whole"):
        plan = plan_add(shelf.snapshot(), adapter, f"task-{number:04}")
        assert not plan.refused, plan.refused
        shelf.commit(plan)
    slots = shelf.snapshot().manifest.slots
    found = summary({task: rate(slot)["predicted_quality"] or 0.0 for slot in slots for task in slot.members})
    return {**taken, "coarser": len(plan.report["coarser"]), "mean": found["mean"], "least": found["least"]}


def main() -> int:
    parser = common.arguments(__doc__)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--shelf", type=Path, help="folder of the shelf, kept and resumed")
    options = parser.parse_args()
    with common.confined(1), tempfile.TemporaryDirectory(prefix="lorashelf-bench-") as name:
        return run(options, options.shelf or Path(name) / "full.shelf")


def run(options: argparse.Namespace, path: Path) -> int:
    from lorashelf import Shelf, new_settings

    count = options.count
    common.heading(f"{count:,} adapters of Llama-3.2-1B's shapes in {count * SHARE / 1e6:g} MB", 1, ["constriction"])
    if not path.exists():
        Shelf.create(path, new_settings(None, bytes=count * SHARE))
    shelf = Shelf(path)
    done = len(shelf.snapshot().manifest.tasks)
    found: dict[int, dict[str, Any]] = {}
    for number in range(done, count):
        found[number + 1] = added(shelf, number)
        if (number + 1) % 50 == 0:
            print(f"{number + 1} of {count}", file=sys.stderr)
    return report(shelf, found)


def report(shelf: Any, found: dict[int, dict[str, Any]]) -> int:
    rows, step = [], max(len(found) // 10, 1)
    for last in sorted(found)[step - 1 :: step]:
        some = [found[n] for n in range(last - step + 1, last + 1)]
        rest = [each["whole"] - each["coding"] for each in some]
        rows.append([f"{last - step + 1:,} to {last:,}", seconds(statistics.median(e["coding"] for e in some))])
        rows[-1] += [seconds(statistics.median(rest)), seconds(max(rest))]
        rows[-1] += [f"{statistics.mean(e['coarser'] for e in some):.0f}", f"{some[-1]['mean']:.4f}"]
        rows[-1] += [f"{some[-1]['least']:.4f}"]
    common.table(
        ["adds", "coding", "the rest, median", "most", "made coarser", "predicted quality, mean", "least"], rows
    )
    started = time.perf_counter()
    faults = shelf.verify()
    taken = time.perf_counter() - started
    size = sum(each.stat().st_size for each in shelf.path.rglob("*") if each.is_file())
    peak = common.anonymous()
    lines = [["the shelf", f"{size / 1e6:.1f} MB"], ["verify, wall", seconds(taken)], ["faults", str(len(faults))]]
    common.table(["at the end", ""], [*lines, ["anonymous memory", megabytes(peak)]])
    most = max(statistics.median([e["whole"] - e["coding"] for e in list(found.values())[i::3]]) for i in range(3))
    return common.verdicts([("an add beside the coding, CPU seconds, median", most, "<=", ADD)], 1)


if __name__ == "__main__":
    sys.exit(main())
