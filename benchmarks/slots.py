"""`lorashelf add` into filled shelves of 10, 100 and 1,000 slots.

    python benchmarks/slots.py

Tiny adapters (2 modules of 64 x 64, r 32, f32: 33 kB), every slot filled, policy kmerge: the newcomer is scored against
all slots and folded into the nearest. Whole processes are timed from outside; the stages in another child, after its
imports: reading the shelf, the similarity, the rest of the plan, the commit. What grows apart from the similarity is
what a shelf costs by its number of slots.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import common
from common import Run, child, megabytes, seconds, times

COUNTS = (10, 100, 1000)
SHAPES, LAYERS = {"q_proj": (64, 64)}, 2
STAGES = ("read", "similarity", "plan", "commit")


# sides: each runs in a child and prints one JSON line ---------------------------------------------------------------


def stages(shelf: Path, new: Path) -> dict[str, float]:
    """Seconds of every stage of an add."""
    from lorashelf import Shelf, plan_add, read_adapter, similarity

    taken = dict.fromkeys(STAGES, 0.0)

    def timed(stage: str, work: Callable[..., Any], *given: Any) -> Any:
        started = time.perf_counter()
        result = work(*given)
        taken[stage] += time.perf_counter() - started
        return result

    opened, adapter = Shelf(shelf), read_adapter(new)
    snapshot = timed("read", opened.snapshot)
    with mock.patch("lorashelf.shelf.arrival.similarity", partial(timed, "similarity", similarity)):
        plan = timed("plan", plan_add, snapshot, adapter, new.name)
    taken["plan"] -= taken["similarity"]
    timed("commit", opened.commit, plan)
    assert plan.report["decision"] == "fold", plan.report
    return taken


# the benchmark ------------------------------------------------------------------------------------------------------


class Bench:
    """A filled shelf of so many slots, an adapter beside it, and how either side is run on a fresh copy."""

    def __init__(self, folder: Path, count: int, threads: int) -> None:
        from lorashelf import Shelf, cluster, new_settings, plan_cluster, write_adapter

        folder.mkdir()
        self.shelf, self.copy, self.new, self.threads = folder / "full", folder / "copy", folder / "new", threads
        *held, newcomer = common.random_adapters(count + 1, LAYERS, SHAPES)
        write_adapter(newcomer, self.new)
        made = Shelf.create(self.shelf, new_settings(count, policy="kmerge"))
        named = {f"task{i:04d}": adapter for i, adapter in enumerate(held)}
        alone = cluster(named, count, method="random")  # as many blocks as adapters
        made.commit(plan_cluster(made.snapshot(), named, alone))
        assert len(made.snapshot().manifest.slots) == count

    @property
    def records(self) -> int:
        """Bytes of the manifest and the pages that the latest run has written."""
        folders = [(self.shelf / name, self.copy / name) for name in ("manifests", "pages")]
        return sum(
            path.stat().st_size for old, new in folders for path in new.iterdir() if not (old / path.name).exists()
        )

    def run(self, side: str, watch: bool = False) -> Run:
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.shelf, self.copy, copy_function=_linked)
        words: list[str | Path] = ["-m", "lorashelf", "add", self.copy, self.new, "--json"]
        if side == "stages":
            words = [__file__, "--side", self.copy, self.new]
        return child([sys.executable, *words], self.threads, watch=watch)


def _linked(source: str, target: str) -> None:
    """Link an object's file, which nothing changes; copy any other."""
    (os.link if "objects" in Path(source).parts else shutil.copy2)(source, target)


def main() -> int:
    options = common.arguments(__doc__).parse_args()
    if options.side:
        print(json.dumps(stages(*map(Path, options.side))))
        return 0
    common.heading("Adding an adapter to shelves of 10, 100 and 1,000 filled slots", options.threads, [])
    with tempfile.TemporaryDirectory(prefix="lorashelf-bench-") as name:
        benches = {count: Bench(Path(name) / str(count), count, options.threads) for count in COUNTS}
        return measured(benches, options.rounds or 7, options.threads)


def measured(benches: dict[int, Bench], rounds: int, threads: int) -> int:
    calls: dict[str, Any] = {}
    for count, bench in benches.items():
        calls |= {f"{side} {count}": partial(bench.run, side) for side in ("add", "stages")}
    found = common.interleaved(calls, rounds)
    peaks = {count: bench.run("add", watch=True).peak for count, bench in benches.items()}
    records = {count: bench.records for count, bench in benches.items()}
    walls = {count: [run.wall for run in found[f"add {count}"]] for count in benches}
    within = {
        count: {stage: [run.result[stage] for run in found[f"stages {count}"]] for stage in STAGES} for count in benches
    }
    columns = ["slots", "whole add, min", "median", *(f"{stage}, median" for stage in STAGES)]
    common.table(
        columns,
        [
            [
                f"{count:,}",
                *common.spread(walls[count]),
                *(seconds(statistics.median(s)) for s in within[count].values()),
            ]
            for count in benches
        ],
    )
    written = {count: min(run.written for run in found[f"add {count}"]) for count in benches}
    common.table(
        ["slots", "written", "of it manifest and pages", "peak anonymous"],
        [
            [f"{count:,}", f"{written[count] / 1e3:.0f} kB", f"{records[count] / 1e3:.1f} kB", megabytes(peaks[count])]
            for count in benches
        ],
    )
    least, *others = benches
    apart = {
        count: [sum(run.result[s] for s in STAGES if s != "similarity") for run in found[f"stages {count}"]]
        for count in benches
    }
    common.table(
        [f"times that of {least} slots, median of {rounds} pairs", *(f"{count:,} slots" for count in others)],
        [
            [name, *(times(common.paired(values[count], values[least])) for count in others)]
            for name, values in (
                ("whole add", walls),
                ("the similarity", {count: within[count]["similarity"] for count in benches}),
                ("the other stages", apart),
            )
        ],
    )
    peak = max(peaks.values()) / 1e6
    return common.verdicts([("peak anonymous memory of add, MB", peak, "<=", 150)], threads)


if __name__ == "__main__":
    sys.exit(main())
