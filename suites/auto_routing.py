"""How often does the text alone find its task, its type, its slot? Measured for `generate --auto`, printed as a table.

    python suites/auto_routing.py --zoo DIR --data DIR --examples DIR [-o OUT] [--depth 0.67] [--queries 10]

The queries are validation texts of --data (drawn, the instruction left out). The prototypes are means over the task's
texts: 6 (train) and 12 (train and validation) of --examples, 12 and 100 of the train split of --data. The slots are
those of a shelf of five, filled from --zoo by K-Merge++ in the demo's order (seed 0). --depth is the share of the
layers after which representations are taken. OUT keeps the representations, so that an interrupted run goes on.

Besides the accuracies: the mean confidence (the closer to the accuracy, the truer), and how often the slot is right
where its confidence is at least 0.9, with the share of such queries. The last table is what each type is taken for.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lorashelf import Shelf, new_settings, plan_add, read_adapter
from lorashelf.models.hf import DEPTH, HFBackend
from lorashelf.serving.text_routing import Prototypes
from lorashelf.tasks.folders import read_tasks

SLOTS = 5
Embed = Callable[[str, Sequence[str]], np.ndarray]


def slots_of(zoo: Path) -> dict[str, int]:
    """Task → slot on a shelf of five, filled in the demo's order."""
    named = {path.name: path for path in sorted(zoo.iterdir()) if (path / "adapter_config.json").exists()}
    with tempfile.TemporaryDirectory() as folder:
        shelf = Shelf.create(Path(folder) / "a.shelf", new_settings(SLOTS))
        for task in random.Random(0).sample(sorted(named), len(named)):
            shelf.commit(plan_add(shelf.snapshot(), read_adapter(named[task]), task))
        return {task: slot.id for slot in shelf.snapshot().manifest.slots for task in slot.members}


def embedder(out: Path | None, depth: float) -> Embed:
    """Representations by name, from OUT where they are there already."""
    backend: list[HFBackend] = []

    def embed(name: str, texts: Sequence[str]) -> np.ndarray:
        file = None if out is None else out / f"{name} depth {depth:.3f}.npy"
        if file is not None and file.exists():
            return np.asarray(np.load(file))
        if not backend:
            backend.append(HFBackend.open(dtype="f32"))
        found = backend[0].embed(texts, depth)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, found)
        return found

    return embed


def row(name: str, known: Prototypes, queries: np.ndarray, truth: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Print one line of the table; returns the chosen tasks."""
    types = np.array([task.split("-")[0] for task in known.tasks])
    confidences = known.confidences(queries)
    chosen: np.ndarray = confidences.argmax(axis=1)
    by_slot = confidences @ (slots[:, None] == slots[None, :])  # (m, n): of each task's slot
    of_slot = by_slot[np.arange(len(chosen)), chosen]
    right, sure = slots[chosen] == slots[truth], of_slot >= 0.9
    cells = [
        (chosen == truth).mean(),
        (types[chosen] == types[truth]).mean(),
        right.mean(),
        confidences.max(axis=1).mean(),
        of_slot.mean(),
        right[sure].mean(),
        sure.mean(),
    ]
    print(f"| {name} | {' | '.join(f'{100 * cell:.1f}' for cell in cells)} |", flush=True)
    return chosen


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("zoo", "data", "examples"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--depth", type=float, default=DEPTH)
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument(
        "--train", type=int, nargs="+", default=[12, 100], help="texts of --data a prototype is made of"
    )
    options = parser.parse_args()
    slot_of = slots_of(options.zoo)
    data, shown = read_tasks(options.data), read_tasks(options.examples)
    names = sorted(slot_of.keys() & data.keys() & shown.keys())
    embed = embedder(options.output, options.depth)
    texts: dict[str, dict[str, list[str]]] = {"queries": {}}
    for name in names:
        texts["queries"][name] = [e.input for e in data[name].examples("validation", options.queries).examples]
        few = [[e.input for e in shown[name].splits[split]] for split in ("train", "validation")]
        texts.setdefault(f"{len(few[0])} few-shot", {})[name] = few[0]
        texts.setdefault(f"{len(few[0]) + len(few[1])} few-shot", {})[name] = few[0] + few[1]
        for count in options.train:
            drawn = [e.input for e in data[name].examples("train", count).examples]
            texts.setdefault(f"{count} of the data's train split", {})[name] = drawn
    total, done, started = sum(map(len, texts.values())), 0, time.monotonic()
    found: dict[str, dict[str, np.ndarray]] = {}
    for kind, by_task in texts.items():
        found[kind] = {}
        for name, lines in by_task.items():
            found[kind][name] = embed(f"{kind} {len(lines)} {name}", lines)
            done += 1
            left = (time.monotonic() - started) / done * (total - done)
            print(f"{done}/{total} sets of texts, about {left:.0f} s left", file=sys.stderr)
    queries = np.concatenate([found["queries"][name] for name in names])
    truth = np.repeat(np.arange(len(names)), [len(found["queries"][name]) for name in names])
    slots = np.array([slot_of[name] for name in names])
    print(f"{len(names)} tasks, {len(queries)} queries, {len(set(slots))} slots, depth {options.depth:.2f}; in %\n")
    heads = ["prototypes", "task", "type", "slot", "task conf.", "slot conf.", "slot if sure", "sure"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    largest = max(np.bincount(slots[truth])) / len(truth)
    print(f"| always the largest slot | | | {100 * largest:.1f} | | | | |")
    for kind in list(texts)[1:]:
        known = Prototypes(tuple(names), np.stack([found[kind][name].mean(axis=0) for name in names]))
        chosen = row(kind, known, queries, truth, slots)
    kinds = sorted({name.split("-")[0] for name in names})
    index = np.array([kinds.index(name.split("-")[0]) for name in names])
    print(f"\nThe last row by type, in %:\n\n| type | {' | '.join(kinds)} |\n|{'---|' * (len(kinds) + 1)}")
    for i, kind in enumerate(kinds):
        of_kind = index[chosen[index[truth] == i]]
        cells = " | ".join(f"{100 * share:.0f}" for share in np.bincount(of_kind, minlength=len(kinds)) / len(of_kind))
        print(f"| {kind} | {cells} |")


if __name__ == "__main__":
    main()
