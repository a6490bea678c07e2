"""Routing by text alone: a text goes to the task with the nearest prototype, the mean representation of its examples.

The similarity is the cosine after subtracting the prototypes' mean, which leaves what separates the tasks. The
confidences are softmax(cosine / TEMPERATURE) over the tasks; a slot's is the sum over the tasks routed to it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import atomic
from ..digest import canonical_json, digest
from ..errors import DiskError, UsageError
from ..lora.arrays import Array32, Array64, Float32, Float64
from ..models.protocol import Embeds
from ..shelf.snapshot import Snapshot
from ..tasks.folders import ExampleSet, Task

TEMPERATURE = 0.02  # of 0.02, 0.03 … 0.15 the most likely on held-out training texts: docs/results.md
MOST_EXAMPLES = 100  # per task, drawn
KEPT = ".prototype"  # suffix of a cache file: float32 values, little-endian, and their digest
_logger = logging.getLogger("lorashelf")


@dataclass(frozen=True, eq=False)
class Prototypes:
    """Task names and the mean representations of the tasks' texts, (n, d)."""

    tasks: tuple[str, ...]
    means: Float32[Array32, "tasks width"]

    def confidences(self, embeddings: Float32[Array32, "texts width"]) -> Float64[Array64, "texts tasks"]:
        """Return (m, n) confidences of m representations in each task; every row sums to 1."""
        centre = self.means.mean(axis=0)
        cosines = _directions(embeddings - centre) @ _directions(self.means - centre).T
        weights = np.exp((cosines - cosines.max(axis=1, keepdims=True)) / TEMPERATURE)
        return np.asarray(weights / weights.sum(axis=1, keepdims=True))


@dataclass(frozen=True, slots=True)
class Choice:
    """The task chosen for a text and its slot, with the confidence in each; `others` are the next best tasks."""

    task: str
    slot: int
    confidence: float
    slot_confidence: float
    others: Mapping[str, float]


def examples_on(snapshot: Snapshot, tasks: Mapping[str, Task]) -> dict[str, ExampleSet]:
    """Return the training examples of those tasks that are on the shelf. Raises UsageError if there are none."""
    known = {name: tasks[name] for name in sorted(snapshot.manifest.tasks) if name in tasks}
    found = {name: task.examples("train", MOST_EXAMPLES) for name, task in known.items() if "train" in task.splits}
    if not found:
        cure = "give a folder of task folders with train.jsonl, named like the tasks on the shelf"
        raise UsageError("no task on the shelf has examples here", where=str(snapshot.path), cure=cure)
    return found


def prototypes(
    model: Embeds,
    examples: Mapping[str, ExampleSet],
    cache: Path | None = None,
    *,
    watch: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> Prototypes:
    """Return the prototypes of tasks. `cache` is a folder for the means, keyed by model and examples.

    `watch` wraps the iteration over the tasks' names.
    """
    means = [_mean(model, examples[task], cache) for task in watch(list(examples))]
    return Prototypes(tuple(examples), np.stack(means))


def choose(model: Embeds, known: Prototypes, snapshot: Snapshot, text: str) -> Choice:
    """Choose the task whose prototype is nearest, and its slot."""
    (row,) = known.confidences(model.embed([text]))
    order = np.argsort(-row, kind="stable")
    ranked = {known.tasks[i]: float(row[i]) for i in order}
    task = next(iter(ranked))
    slot, _ = snapshot.located(task)
    return Choice(
        task=task,
        slot=slot.id,
        confidence=ranked[task],
        slot_confidence=sum(ranked.get(member, 0.0) for member in slot.members),
        others=dict(list(ranked.items())[1:4]),
    )


def _mean(model: Embeds, examples: ExampleSet, cache: Path | None) -> Float32[Array32, " width"]:
    """Return the mean representation of a task's texts, from the cache if stored there undamaged."""
    key = digest([canonical_json([model.embedding_id, examples.digest])])
    file = None if cache is None else cache / f"{key}{KEPT}"
    if (kept := _kept(file, examples.task)) is not None:
        return kept
    embedded = model.embed([example.input for example in examples.examples])
    mean = np.asarray(embedded.mean(axis=0), "<f4")
    if file is not None:
        with contextlib.suppress(DiskError):  # without a cache, the mean is computed again next time
            atomic.make_parents(file)
            atomic.replace_file(file, _sealed(mean.tobytes()), file.parent)
    return mean


def _kept(file: Path | None, task: str) -> Float32[Array32, " width"] | None:
    """Return the mean in a cache file; None if the file does not exist or, with a warning, if it is damaged."""
    if file is None or not file.exists():
        return None
    try:
        data = atomic.read_file(file)
    except OSError:
        return None
    values = data[: -len(digest([]))]
    if data != _sealed(values):
        _logger.warning("the cached prototype of %s is damaged and will be rebuilt (%s)", task, file)
        return None
    return np.frombuffer(values, "<f4")


def _sealed(values: bytes) -> bytes:
    """Return the values followed by their digest."""
    return values + digest([values]).encode()


def _directions(vectors: Float32[Array32, "n width"]) -> Float64[Array64, "n width"]:
    """Return the rows scaled to length 1; rows of zeros are kept."""
    wide = vectors.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(wide / np.where(norms > 0, norms, 1.0))
