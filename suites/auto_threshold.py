"""Which rule should set K-Merge++'s threshold without held-out adapters? Measured on a zoo, printed as a table.

    python suites/auto_threshold.py --zoo DIR

DIR holds PEFT folders named <type>-<language>. Ten random orders of arrival and six worst ones (all tasks of a type in
a row, types and languages shuffled), K = 5, merge `linear`, the library's own similarity and fold. A rule gets the
scores seen so far, those of the present arrival included, and gives the threshold (None: open while a slot is free).
For each rule: slots used (least to most), purity by type, mean cosine inside slots × 1000.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lorashelf import POLICIES, Adapter, MergeSpec, read_adapter, similarity
from lorashelf.merging.average import Average, fold, single, source
from lorashelf.placement.actions import Candidate, Open, Refuse
from lorashelf.placement.policies import View, auto_threshold

SLOTS = 5
Rule = Callable[[Sequence[float]], float | None]


def constant(value: float) -> Rule:
    """Always the same."""
    return lambda scores: value


def quantile(q: float, least: int = 1) -> Rule:
    """A quantile of the scores, once there are enough."""
    return lambda scores: float(np.quantile(scores, q)) if len(scores) >= least else None


def medians(factor: float) -> Rule:
    """A multiple of their median."""
    return lambda scores: factor * float(np.median(scores)) if scores else None


def deviations(factor: float) -> Rule:
    """Their mean and so many standard deviations."""
    return lambda scores: float(np.mean(scores) + factor * np.std(scores)) if len(scores) > 1 else None


RULES: dict[str, Rule] = {
    "none (K-Merge)": lambda scores: None,
    **{f"{value:.3f}": constant(value) for value in (0.006, 0.008, 0.010, 0.012, 0.015, 0.020, 0.028)},
    "median of the scores": quantile(0.5),
    "0.7 quantile": quantile(0.7),
    "0.8 quantile": quantile(0.8),
    "0.8 quantile of ≥ 2": quantile(0.8, 2),
    "0.9 quantile of ≥ 2": quantile(0.9, 2),
    "2.5 medians": medians(2.5),
    "mean + 1 deviation": deviations(1.0),
    "mean + ½ deviation (`auto`)": auto_threshold,
}


def arrive(adapters: dict[str, Adapter], order: Sequence[str], rule: Rule) -> list[list[str]]:
    """The slots' members after the adapters arrived in this order under K-Merge++ with the rule's thresholds."""
    spec = MergeSpec()
    scores_seen: list[float] = []
    slots: list[Average] = []
    for task in order:
        adapter = adapters[task]
        record = source(task, task.split("-")[0], adapter)
        scores = similarity([adapter], [slot.adapter for slot in slots])[0].tolist() if slots else []
        scores_seen += scores
        offered = [Candidate.folding(slot, score) for slot, score in enumerate(scores)]
        if len(slots) < SLOTS:
            offered.append(Candidate.opening(len(slots)))
        chosen = POLICIES["kmerge++"](offered, View(threshold=rule(scores_seen)))
        if isinstance(chosen, Refuse):
            raise TypeError(chosen.reason)
        if isinstance(chosen.action, Open):
            slots.append(single(adapter, record, spec))
        else:
            slots[chosen.action.slot] = fold([slots[chosen.action.slot]], adapter, record, spec)
    return [[m.task for m in slot.history.merged] for slot in slots]


def orders(tasks: Sequence[str]) -> dict[str, list[list[str]]]:
    """Ten random orders, and six in which all tasks of a type come in a row."""
    worst = []
    for seed in range(6):
        rng = random.Random(seed)
        types = sorted({task.split("-")[0] for task in tasks})
        rng.shuffle(types)
        by_type = [[task for task in tasks if task.split("-")[0] == kind] for kind in types]
        worst.append([task for group in by_type for task in rng.sample(group, len(group))])
    return {"random": [random.Random(seed).sample(list(tasks), len(tasks)) for seed in range(10)], "worst": worst}


def purity(blocks: list[list[str]]) -> float:
    """The share of tasks that are of their slot's commonest type."""
    commonest = [Counter(task.split("-")[0] for task in block).most_common(1)[0][1] for block in blocks]
    return sum(commonest) / sum(map(len, blocks))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True)
    zoo = parser.parse_args().zoo
    adapters = {
        path.name: read_adapter(path) for path in sorted(zoo.iterdir()) if (path / "adapter_config.json").exists()
    }
    names = list(adapters)
    matrix = similarity(list(adapters.values()))
    index = {name: i for i, name in enumerate(names)}
    pairs = matrix[np.triu_indices(len(names), 1)]
    quantiles = ", ".join(f"q{q:g} {np.quantile(pairs, q):.4f}" for q in (0.5, 0.75, 0.8, 0.9))
    print(f"{len(names)} adapters, pairwise cosine: {quantiles}\n")
    heads = ["threshold", "slots, random", "purity", "inside", "slots, worst", "purity", "inside"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    started, total = time.monotonic(), len(RULES)
    for done, (name, rule) in enumerate(RULES.items(), 1):
        cells = []
        for sequence in orders(names).values():
            found = [arrive(adapters, order, rule) for order in sequence]
            used = [len(blocks) for blocks in found]
            inside = [
                np.mean([matrix[index[a], index[b]] for block in blocks for a, b in itertools.combinations(block, 2)])
                for blocks in found
            ]
            span = f"{min(used)}-{max(used)}" if min(used) < max(used) else f"{min(used)}"
            cells += [span, f"{np.mean([purity(blocks) for blocks in found]):.2f}", f"{1000 * np.mean(inside):.1f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        left = (time.monotonic() - started) / done * (total - done)
        print(f"{done}/{total} rules, about {left:.0f} s left", file=sys.stderr)


if __name__ == "__main__":
    main()
