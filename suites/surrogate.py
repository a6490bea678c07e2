"""Which surrogate ranks blocks as the true losses do?

    python suites/surrogate.py --zoo DIR --data DIR

DIR holds one PEFT folder and one task folder per task. From the committed cells of first_table: the share of the gain
in loss that a task loses in its block, beside what a surrogate expects: minus cos_t(ΔW_t, Σ ΔW of the block), or the
damage of the exact mean, ‖ΔW_mean − ΔW_t‖²_t / ‖ΔW_t‖²_t, with inner products by weights or by effects on outputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lorashelf import gram, read_adapter
from lorashelf.bench.results import read_results
from lorashelf.bench.suite import read_suite
from lorashelf.lora.arrays import Array64, Cube, Float64
from lorashelf.models.hf import HFBackend
from lorashelf.search.cluster import drawn
from lorashelf.tasks.folders import read_tasks

SUITE = Path(__file__).with_name("first_table.toml")


class Loss(NamedTuple):
    """The share of the gain that a task loses in a block, under a merge."""

    merge: str
    task: int
    block: list[int]
    lost: float


def lost(names: list[str]) -> Iterator[Loss]:
    """Yield what is measured in every block of at least two tasks; copies of a block once."""
    results = list(read_results(read_suite(SUITE), SUITE.with_suffix(".results")).values())
    means = [
        {task: sum(found["nll"]) / sum(found["tokens"]) for task, found in result["tasks"].items()}
        for result in results
    ]
    own, base = (means[[r["cell"]["method"] for r in results].index(method)] for method in ("own", "base"))
    for result, mean in zip(results, means, strict=True):
        for block in result["provenance"].get("blocks", []):
            for task in block if len(block) > 1 else []:
                share = (mean[task] - own[task]) / (base[task] - own[task])
                yield Loss(result["cell"]["merge"], names.index(task), [names.index(t) for t in block], share)


def expected(grams: Cube, rows: list[Loss], damage: bool) -> Float64[Array64, " n"]:
    """Return what a surrogate expects of each block for its task: the damage, or minus the cosine."""
    found = []
    for _, task, block, _ in rows:
        of = grams[task]
        square, inner, own = of[np.ix_(block, block)].mean(), of[task, block].mean(), of[task, task]
        found.append((square - 2 * inner + own) / own if damage else -inner / np.sqrt(square * own))
    return np.array(found)


def correlation(x: Float64[Array64, " n"], y: Float64[Array64, " n"]) -> float:
    """Return Spearman's rank correlation."""
    return float(np.corrcoef(np.argsort(np.argsort(x)), np.argsort(np.argsort(y)))[0, 1])


def concordance(guess: Float64[Array64, " n"], rows: list[Loss]) -> float:
    """Return the share of pairs of blocks of one task and merge that are ranked as measured."""
    pairs = [
        (guess[i] - guess[j]) * (rows[i].lost - rows[j].lost)
        for i, j in combinations(range(len(rows)), 2)
        if rows[i][:2] == rows[j][:2] and sorted(rows[i].block) != sorted(rows[j].block)
    ]
    return float(np.mean(np.array(pairs) > 0))


def table(rows: list[Loss], cubes: dict[str, Cube]) -> None:
    """Print the table."""
    print("| inner products | surrogate | merge | losses | Spearman | pairs of one task in order |")
    print("|---|---|---|---|---|---|")
    for merge in sorted({row.merge for row in rows}):
        some = [row for row in rows if row.merge == merge]
        measured = np.array([row.lost for row in some])
        for name, grams in cubes.items():
            for damage in (False, True):
                guess = expected(grams, some, damage)
                paired = len({row.task for row in some}) < len(some)
                order = f"{100 * concordance(guess, some):.0f} %" if paired else "–"
                kind = "damage" if damage else "cosine"
                print(f"| {name} | {kind} | {merge} | {len(some)} | {correlation(guess, measured):.2f} | {order} |")


def main() -> None:
    """Observe the inputs of every task, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    tasks = read_tasks(options.data)
    names = sorted(tasks)
    adapters = [read_adapter(options.zoo / name) for name in names]
    backend = HFBackend.open(dtype="f32")
    sets, _ = drawn(tasks, names, backend.fitting, "train", 10, 0)
    effects = np.stack(list(backend.effects(adapters, [sets[name] for name in names])))
    weights = np.broadcast_to(gram(adapters), effects.shape)
    table(list(lost(names)), {"weights": weights, "effects": effects})


if __name__ == "__main__":
    main()
