"""The first table: what K slots do to the loss and the scores of every task, for every method, on the same examples.

    python suites/first_table.py --zoo DIR --data DIR -o OUT            measures what is not measured yet, then prints
    python suites/first_table.py --zoo DIR --data DIR -o OUT --print    prints what there is

Losses come first; then greedy answers for zero-shot, own, random, K-Merge++ and D2C (seed 0), on the tasks whose own
adapter beats zero-shot. Differences to random are paired: every resample draws the same examples for both sides. OUT
keeps every loss and every answer (by adapter digest, examples digest, and backend), so it can be interrupted at any
time and goes on where it was. The zoo and the data that the tables in docs/results.md come from are not distributed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lorashelf import Adapter, Recipe, Shelf, new_settings, plan_add, plan_cluster, read_adapter
from lorashelf.backend import Loss, mean_loss
from lorashelf.backends.hf import HFBackend
from lorashelf.d2c import search
from lorashelf.flow import merger
from lorashelf.metrics import loss_kept, metric, normalised, scored
from lorashelf.metrics.kept import LEAST_GAIN
from lorashelf.objective import Objective
from lorashelf.tasks import ExampleSet, Task, read_tasks

MERGES = ("linear", "ties")
SEEDS = (0, 22, 44)
SEARCH_EXAMPLES = 10
ITERATIONS = 200
ANSWERED = ("own adapters", "random", "kmerge++", "d2c", "zero-shot")


class Store:
    """Losses and answers by adapter, examples and backend, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[tuple[str, ...], Any] = {}
        if path.exists():
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    entry = json.loads(line)
                    self._known[tuple(entry["key"])] = entry["value"]

    def __contains__(self, key: tuple[str, ...]) -> bool:
        return key in self._known

    def get(self, key: tuple[str, ...], measure: Callable[[], Any]) -> Any:
        """What is stored under the key, measured first where nothing is."""
        if key not in self._known:
            self._known[key] = measure()
            with self._path.open("a") as handle:
                handle.write(json.dumps({"key": key, "value": self._known[key]}, ensure_ascii=False) + "\n")
        return self._known[key]


def _absent() -> Any:
    raise KeyError("not measured")


@dataclass(frozen=True)
class Row:
    """One method: the adapter that serves each task (None: the bare base)."""

    method: str
    merge: str
    seed: int | None
    serving: Mapping[str, Adapter | None]


class Suite:
    """Adapters, examples and a store of what was measured on them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.tasks: dict[str, Task] = read_tasks(options.data)
        names = sorted(set(self.tasks) & {path.name for path in options.zoo.iterdir() if path.is_dir()})
        self.names = [name for name in names if not options.tasks or name in options.tasks.split(",")]
        self.adapters = {name: read_adapter(options.zoo / name) for name in self.names}
        self.backend = HFBackend.open(options.base, dtype="f32")
        self.k, self.out, self.limit = options.slots, options.output, options.examples
        self.merges = options.merges.split(",")
        self.iterations = [int(t) for t in options.iterations.split(",")]
        self.out.mkdir(parents=True, exist_ok=True)
        self.examples = {name: self._fitting(name, "validation", self.limit) for name in self.names}
        self.store = Store(self.out / "losses.jsonl")
        self.answers = Store(self.out / "answers.jsonl")

    def _fitting(self, name: str, split: str, limit: int) -> ExampleSet:
        fitting, dropped = self.backend.fitting(self.tasks[name].examples(split, limit, seed=0))
        if dropped:
            print(f"{name}: {dropped} examples are longer than the context and left out", file=sys.stderr)
        return fitting

    def losses(self, adapter: Adapter | None, examples: ExampleSet) -> list[Loss]:
        """The loss of every example, from the store or measured."""
        return [
            Loss(*pair)
            for pair in self.store.get(self._key(adapter, examples), lambda: self.backend.nll([(adapter, examples)])[0])
        ]

    def _key(self, adapter: Adapter | None, examples: ExampleSet) -> tuple[str, ...]:
        return (adapter.digest if adapter else "base", examples.digest, self.backend.id)

    def predictions(self, adapter: Adapter | None, name: str) -> list[str]:
        """The greedy answers to a task's examples."""
        task, examples = self.tasks[name], self.examples[name]
        texts = [example.input for example in examples.examples]

        def measure() -> list[str]:
            return self.backend.answers(adapter, task.prompt, texts, max_new_tokens=task.max_new_tokens)

        return list(self.answers.get((*self._key(adapter, examples), str(task.max_new_tokens)), measure))

    def gaining(self) -> list[str]:
        """The tasks whose own adapter beats zero-shot by at least 0.02 nats a token."""
        loss = {who: {n: mean_loss(self.losses(x(n), self.examples[n])) for n in self.names} for who, x in self._both()}
        return [n for n in self.names if loss["zero"][n] - loss["own"][n] >= LEAST_GAIN]

    def _both(self) -> list[tuple[str, Callable[[str], Adapter | None]]]:
        return [("zero", lambda _: None), ("own", self.adapters.__getitem__)]

    def table(self, digest: str, name: str) -> np.ndarray:
        """(examples, 2): summed NLL and tokens of each, as stored."""
        return np.array(self.store.get((digest, self.examples[name].digest, self.backend.id), _absent))

    def scored(self, entry: dict[str, Any]) -> dict[str, float] | None:
        """Task → score of what was answered, None where an answer is lacking."""
        found = {}
        for name in self.gaining():
            task, examples = self.tasks[name], self.examples[name]
            key = (entry["serving"][name], examples.digest, self.backend.id, str(task.max_new_tokens))
            if key not in self.answers or task.metric is None:
                return None
            predictions = self.answers.get(key, _absent)
            found[name] = scored(metric(task.metric, task.language), examples.examples, predictions, draws=1).value
        return found

    # rows -------------------------------------------------------------------------------------------------------

    def rows(self) -> Iterator[Callable[[], Row]]:
        """Every row, the first seed of everything first."""
        if self.merges[0] == MERGES[0]:
            yield lambda: Row("zero-shot", "", None, dict.fromkeys(self.names))
            yield lambda: Row("own adapters", "", None, self.adapters)
        for seed in SEEDS:
            for merge in self.merges:
                yield lambda m=merge, s=seed: self.offline("random", m, s)
                if seed == SEEDS[0]:
                    yield lambda m=merge, s=seed: self.online("kmerge++", m, s)
                    for iterations in self.iterations:
                        yield lambda m=merge, s=seed, t=iterations: self.d2c(m, s, t)
                    yield lambda m=merge, s=seed: self.online("kmerge", m, s)
                    for method in ("single", "oracle", "agglomerative", "kmeans", "kmeans_svd"):
                        yield lambda n=method, m=merge, s=seed: self.offline(n, m, s)

    def recipe(self, merge: str, seed: int) -> Recipe:
        """Merged and stored in float32, so that only the method differs."""
        return Recipe(merge=merge, seed=seed, dtype="f32")

    def offline(self, method: str, merge: str, seed: int) -> Row:
        """A partition without data; `oracle` is one block a problem type."""
        if method == "oracle":
            by_type = itertools.groupby(self.names, key=lambda name: name.split("-")[0])
            return self._of_blocks(method, merge, seed, [list(block) for _, block in by_type])
        settings = replace(new_settings(self.k), recipe=self.recipe(merge, seed))
        with TemporaryDirectory() as folder:
            made, _ = Shelf.create_with(
                Path(folder) / "a.shelf",
                settings,
                lambda snapshot: plan_cluster(snapshot, self.adapters, method=method),
            )
            blocks = [list(slot.members) for slot in made.manifest.slots]
        return self._of_blocks(method, merge, seed, blocks)

    def online(self, policy: str, merge: str, seed: int) -> Row:
        """The adapters arrive in a random order (`seed`) at a shelf of K slots; the threshold is the automatic one."""
        settings = new_settings(self.k, policy=policy, merge=merge, seed=seed, dtype="f32")
        order = random.Random(seed).sample(self.names, len(self.names))
        with TemporaryDirectory() as folder:
            snapshot = Shelf.create(Path(folder) / "a.shelf", settings).snapshot()
            for name in order:
                snapshot = snapshot.after(plan_add(snapshot, self.adapters[name], name))
            slots = snapshot.manifest.slots
            serving = {task: snapshot.adapter(slot) for slot in slots for task in slot.members}
        self._tell(policy, merge, seed, [list(slot.members) for slot in slots])
        return Row(policy, merge, seed, serving)

    def d2c(self, merge: str, seed: int, iterations: int) -> Row:
        """The data-driven search on examples of the train split; a longer one goes on where a shorter one ended."""
        sets = {name: self._fitting(name, "train", SEARCH_EXAMPLES) for name in self.names}
        settings = {"merge": merge, "seed": seed}
        journal = self.out / f"d2c-{merge}-{seed}.jsonl"
        merge_blocks = merger(self.adapters, self.recipe(merge, seed))
        objective = Objective(self.adapters, sets, self.backend, merge_blocks, settings=settings, journal=journal)
        found = search(
            self.names,
            self.k,
            objective,
            iterations=iterations,
            seed=seed,
            watch=lambda steps: told(steps, f"D2C {merge} {seed}"),
        )
        print(
            f"D2C {merge} {seed}, T = {iterations}: {objective.asked} losses asked for, "
            f"{len(objective.known)} distinct, {len(found.moves)} moves",
            file=sys.stderr,
        )
        name = "d2c" if iterations == ITERATIONS else f"d2c, T = {iterations}"
        return self._of_blocks(name, merge, seed, [list(block) for block in found.blocks])

    def _of_blocks(self, method: str, merge: str, seed: int, blocks: Sequence[Sequence[str]]) -> Row:
        self._tell(method, merge, seed, blocks)
        merged = merger(self.adapters, self.recipe(merge, seed))
        return Row(method, merge, seed, {name: x for block in blocks for x in [merged(block)] for name in block})

    def _tell(self, method: str, merge: str, seed: int, blocks: Sequence[Sequence[str]]) -> None:
        with (self.out / "partitions.jsonl").open("a") as handle:
            handle.write(json.dumps({"method": method, "merge": merge, "seed": seed, "blocks": blocks}) + "\n")


def told(steps: Sequence[int], title: str) -> Iterator[int]:
    """The steps, with a line on stderr now and then."""
    start = time.monotonic()
    for i, step in enumerate(steps):
        if i and i % 20 == 0:
            left = (time.monotonic() - start) / i * (len(steps) - i)
            print(f"{title}: {i} of {len(steps)}, about {left / 60:.0f} min left", file=sys.stderr, flush=True)
        yield step


def main() -> None:
    """Measure row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True, help="a folder of PEFT folders, named after the tasks")
    parser.add_argument("--data", type=Path, required=True, help="a folder of task folders")
    parser.add_argument("-o", "--output", type=Path, required=True, help="where measurements are kept")
    parser.add_argument("--base", help="the base model; default SmolLM2-135M-Instruct")
    parser.add_argument("--slots", type=int, default=5)
    parser.add_argument("--examples", type=int, default=20, help="validation examples a task")
    parser.add_argument("--merges", default=",".join(MERGES), help="two processes may share the work, a merge each")
    parser.add_argument("--iterations", default=str(ITERATIONS), help="D2C's T; several are several rows")
    parser.add_argument("--tasks", help="only these, separated by commas")
    parser.add_argument("--print", action="store_true", help="only print what there is")
    options = parser.parse_args()
    suite = Suite(options)
    if options.print:
        printed(suite)
        return
    rows = []
    for make in suite.rows():
        start = time.monotonic()
        row = make()
        means = {name: mean_loss(suite.losses(x, suite.examples[name])) for name, x in row.serving.items()}
        mean = float(np.mean(list(means.values())))
        seconds = time.monotonic() - start
        print(
            f"{row.method} {row.merge} {row.seed}: mean loss {mean:.4f} ({seconds:.0f} s)", file=sys.stderr, flush=True
        )
        with (suite.out / "rows.jsonl").open("a") as handle:
            served = {name: x.digest if x else "base" for name, x in row.serving.items()}
            rows.append(row)
            handle.write(
                json.dumps(
                    {"method": row.method, "merge": row.merge, "seed": row.seed, "serving": served, "losses": means}
                )
                + "\n"
            )

    answered = [row for method in ANSWERED for row in rows if row.method == method and row.seed in (None, SEEDS[0])]
    for row in answered:
        for name in suite.gaining():
            suite.predictions(row.serving[name], name)
        print(f"{row.method} {row.merge}: answered", file=sys.stderr, flush=True)
    printed(suite)


# the tables -----------------------------------------------------------------------------------------------------------


def printed(suite: Suite) -> None:
    """Print what was measured: methods over all tasks, and tasks for the methods that answered."""
    with (suite.out / "rows.jsonl").open() as handle:
        entries = {(e["method"], e["merge"], e["seed"]): e for e in map(json.loads, handle)}
    zero, own = (entries[(name, "", None)]["losses"] for name in ("zero-shot", "own adapters"))
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for (method, merge, _), entry in sorted(entries.items(), key=str):
        groups.setdefault((method, merge), []).append(entry)
    count = len(suite.examples[suite.names[0]].examples)
    print(
        f"{len(suite.names)} tasks, {count} validation examples each (fewer where a task has no more), K = {suite.k}\n"
    )
    print("| method | merge | seeds | mean loss | loss kept % | − random, 95 % | score | S |")
    print("|---|---|---|---|---|---|---|---|")
    for (method, merge), group in sorted(groups.items(), key=lambda item: (item[0][1], mean_of(item[1]))):
        losses = {name: float(np.mean([e["losses"][name] for e in group])) for name in suite.names}
        kept, _ = loss_kept(losses, own, zero)
        versus = "–"
        if merge and method != "random" and ("random", merge) in groups:
            low, high = paired(suite, group, groups[("random", merge)])
            versus = f"{low:+.3f} … {high:+.3f}"
        score, ratio = scores(suite, group[0], entries[("own adapters", "", None)])
        kept_text = "–" if kept is None else f"{100 * kept:.1f}"
        cells = [method, merge or "–", len(group), f"{mean_of(group):.4f}", kept_text, versus, score, ratio]
        print(f"| {' | '.join(map(str, cells))} |")


def mean_of(group: Sequence[dict[str, Any]]) -> float:
    """Mean loss over tasks and seeds."""
    return float(np.mean([list(entry["losses"].values()) for entry in group]))


def paired(suite: Suite, ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """The 95 % interval of the difference of mean losses; a resample draws each task's examples, for both sides."""
    rng, total = np.random.default_rng(0), np.zeros(1000)
    for name in suite.names:
        tables = [np.mean([suite.table(e["serving"][name], name) for e in group], axis=0) for group in (ours, theirs)]
        n = len(tables[0])
        counts = rng.multinomial(n, np.full(n, 1 / n), size=len(total))
        mine, other = (counts @ table[:, 0] / (counts @ table[:, 1]) for table in tables)
        total += (mine - other) / len(suite.names)
    low, high = np.percentile(total, [2.5, 97.5])
    return float(low), float(high)


def scores(suite: Suite, entry: dict[str, Any], own: dict[str, Any]) -> tuple[str, str]:
    """Mean score and S over the tasks whose own adapter beats zero-shot, where answers are there."""
    mine, reference = suite.scored(entry), suite.scored(own)
    if mine is None or reference is None:
        return "–", "–"
    ratio, _ = normalised(mine, reference)
    return f"{np.mean(list(mine.values())):.1f}", "–" if ratio is None else f"{ratio:.3f}"


if __name__ == "__main__":
    main()
