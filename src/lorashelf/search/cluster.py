"""Clustering by loss: the adapters, a few examples of each task and a backend in; a partition and what it cost out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import TaskDataError, UnknownName
from ..lora.adapter import Adapter
from ..merging.blocks import merger
from ..merging.spec import MergeSpec
from ..models.protocol import Scores
from ..placement import d2c
from ..placement.partitioners import partition
from ..tasks.folders import ExampleSet, Task
from .block_loss import BlockLoss

Fitting = Callable[[ExampleSet], tuple[ExampleSet, int]]


@dataclass(frozen=True, slots=True)
class Searched:
    """A partition found by losses, the mean loss of the tasks under it, and what the search cost."""

    found: d2c.Found
    loss: float
    """Mean over tasks on the examples searched with, in nats a token."""
    held_out: float | None
    """The same on other examples, None where a task has none."""
    asked: int
    distinct: int
    evaluations: int
    """How many losses a model measured in this run; the rest came from memory or the journal."""

    def document(self) -> dict[str, Any]:
        """As in the JSON answer of `cluster`."""
        return {
            "evaluations": self.evaluations,
            "losses": {"asked": self.asked, "distinct": self.distinct},
            "proposals": self.found.proposals,
            "accepted": len(self.found.moves),
            "loss": {"search": self.loss, "held_out": self.held_out},
        }


def cluster_by_loss(
    adapters: Mapping[str, Adapter],
    k: int,
    spec: MergeSpec,
    backend: Scores,
    examples: Mapping[str, ExampleSet],
    *,
    held_out: Mapping[str, ExampleSet] | None = None,
    iterations: int = 200,
    accept: d2c.Accept = "task",
    init: Literal["random", "agglomerative"] = "random",
    keep_best: bool = False,
    journal: Path | None = None,
    watch: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Searched:
    """D2C (arXiv 2601.17441, Algorithm 1) over adapters by task name, with the spec's method, rank, dtype and seed.

    `examples` are searched with, `held_out` only reported on. With a `journal` every loss is kept, and the same search
    goes on from it. Raises UsageError if the journal is of another search, and what the backend raises.
    """
    options = {"k": k, "iterations": iterations, "accept": accept, "init": init, "keep_best": keep_best}
    settings = {"recipe": spec.document(), **options}
    objective = BlockLoss(adapters, examples, backend, merger(adapters, spec), settings=settings, journal=journal)
    tasks, start = sorted(adapters), None
    if init == "agglomerative" and len(tasks) > k:
        indices = partition([adapters[task] for task in tasks], k, method=init)
        start = [[tasks[i] for i in block] for block in indices]
    found = d2c.search(
        tasks,
        k,
        objective,
        iterations=iterations,
        seed=spec.seed,
        accept=accept,
        start=start,
        keep_best=keep_best,
        watch=watch,
    )
    asked, distinct, evaluations = objective.asked, len(objective.known), objective.measured
    final, others = 0.0, 0.0
    for block in found.blocks:  # both losses of a block, then the next: each is merged once
        served = [(frozenset(block), task) for task in block]
        final += sum(objective(served))
        others += 0.0 if held_out is None else sum(objective.on(held_out, served))
    mean_of_others = None if held_out is None else others / len(tasks)
    return Searched(found, final / len(tasks), mean_of_others, asked, distinct, evaluations)


def drawn(
    tasks: Mapping[str, Task], names: Iterable[str], fitting: Fitting, split: str, limit: int, seed: int
) -> tuple[dict[str, ExampleSet], int]:
    """`limit` examples of each task's split that fit the model, drawn by (seed, task), and how many did not fit.

    Raises UnknownName for a task without a folder, TaskDataError naming every one without examples that fit.
    """
    sets: dict[str, ExampleSet] = {}
    faults: dict[str, str] = {}
    dropped = 0
    for name in names:
        if name not in tasks:
            raise UnknownName("task among the examples", name, sorted(tasks))
        if split not in tasks[name].splits:
            faults[f"{name} has no {split}.jsonl"] = f"add {split}.jsonl"
            continue
        fit, beyond = fitting(tasks[name].examples(split))
        sets[name], dropped = fit.drawn(limit, seed), dropped + beyond
        if not fit.examples:
            faults[f"{name}: no example of {split}.jsonl fits the model's context"] = "shorten the examples"
    if faults:
        raise TaskDataError(faults)
    return sets, dropped
