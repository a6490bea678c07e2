"""Clustering by loss: adapters, a few examples per task and a backend in; a clustering and a report out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

from ..digest import canonical_json, digest
from ..errors import TaskDataError, UnknownName
from ..lora.adapter import Adapter
from ..merging.blocks import merger, named
from ..merging.spec import MergeSpec
from ..models.protocol import Scores
from ..placement.clustering import Clustering, clustered
from ..placement.partition_methods import Watch
from ..placement.partitioners import PARTITIONERS
from ..tasks.folders import ExampleSet, Task
from .block_loss import BlockLoss

Fitting = Callable[[ExampleSet], tuple[ExampleSet, int]]


def cluster_by_loss(
    adapters: Mapping[str, Adapter],
    k: int,
    spec: MergeSpec,
    backend: Scores,
    examples: Mapping[str, ExampleSet],
    *,
    method: str = "d2c",
    held_out: Mapping[str, ExampleSet] | None = None,
    journal: Path | None = None,
    watch: Watch = iter,
    **parameters: Any,
) -> Clustering:
    """Cluster adapters (by task name) into at most k blocks by the loss of the examples with the blocks' merges.

    D2C (arXiv 2601.17441) takes `iterations`, `propose`, `accept`, `init`, `restarts`, `keep_best` and `budget`
    (docs/methods.md). The search uses `examples`; `held_out` is only reported. A `journal` keeps every loss, and the
    same search resumes from it. The report has the mean loss over tasks in nats per token (`start`, `search` and
    `held_out`), how many losses were requested, distinct, and measured in this run (`evaluations`), and what they
    depend on: `examples` is the digest of the sets' digests, `model` the base's name, weights' fingerprint, dtype and
    prompt id. Raises UsageError for unknown parameters and for a journal of another search, and what the backend
    raises.
    """
    adapters = dict(sorted(named(adapters).items()))
    sets = {normalize("NFC", task): examples_of for task, examples_of in examples.items()}
    options = PARTITIONERS[method].checked(parameters)
    settings = {"recipe": spec.document(), "k": k, "method": method, **options}
    objective = BlockLoss(adapters, sets, backend, merger(adapters, spec), settings=settings, journal=journal)
    found, start = clustered(adapters, k, method=method, seed=spec.seed, losses=objective, watch=watch, **options)
    counts = {
        "losses": {"asked": objective.asked, "distinct": len(objective.known)},
        "evaluations": objective.measured,
    }
    others = None if held_out is None else {normalize("NFC", task): each for task, each in held_out.items()}
    after, elsewhere = objective.means(found.blocks, others)  # first: losses shared with the start are then known
    before, _ = objective.means(start)
    loss = {"start": before, "search": after, "held_out": elsewhere}
    digests = {task: sets[task].digest for task in adapters}
    model = {"name": backend.name, "weights": backend.weights, "dtype": backend.dtype, "prompt": backend.prompt_id}
    origin = {"examples": digest([canonical_json(digests)]), "model": model}
    return replace(found, report={**found.report, **counts, "loss": loss, **origin})


def drawn(
    tasks: Mapping[str, Task], names: Iterable[str], fitting: Fitting, split: str, limit: int, seed: int
) -> tuple[dict[str, ExampleSet], int]:
    """Draw `limit` fitting examples of each task's split by (seed, task); also return how many did not fit.

    Raises UnknownName for a task without a folder, TaskDataError naming every task without fitting examples.
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
