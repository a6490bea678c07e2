"""A clustering: blocks of tasks, each sharing one adapter, and how they were found, by whichever method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError, numbered
from ..lora.adapter import Adapter
from ..lora.arrays import Cube
from ..merging.blocks import named
from .partition_methods import Losses, Watch, Weighed
from .partitioners import partitioned


@dataclass(frozen=True, slots=True)
class Clustering:
    """Blocks of task names, the method and seed that found them, and the method's report (JSON values)."""

    blocks: tuple[tuple[str, ...], ...]
    method: str
    seed: int | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    start: tuple[tuple[str, ...], ...] = ()
    """The blocks that a search started from; of other methods, and of a clustering by hand, empty."""
    moves: tuple[tuple[int, str, str | None], ...] = ()
    """The moves from `start` to `blocks`: iteration, task, a task of the joined block (None: none); see `replayed`."""

    def check(self, tasks: Sequence[str], k: int) -> None:
        """Raise UsageError unless at most k non-empty blocks hold every task once."""
        listed = sorted(task for block in self.blocks for task in block)
        if listed != sorted(tasks) or not all(self.blocks):
            differing = sorted({*listed} ^ {*tasks}) if listed else ["it is empty"]
            why = ", ".join(differing) or "a task occurs twice, or a block is empty"
            raise UsageError(
                f"the clustering does not match these adapters: {why}",
                cure="cluster the adapters to be stored, under the same names",
            )
        if len(self.blocks) > k:
            what = f"the clustering has {len(self.blocks)} blocks, the shelf {numbered(k, 'slot')}"
            raise UsageError(what, cure=f"cluster into {numbered(k, 'slot')}, or give the shelf more slots")


@dataclass(frozen=True, slots=True)
class _ByIndex:
    """Losses by the indices of the names."""

    losses: Losses[str]
    names: Sequence[str]

    def __call__(self, pairs: Sequence[tuple[frozenset[int], int]]) -> Sequence[float]:
        return self.losses([(frozenset(self.names[i] for i in block), self.names[task]) for block, task in pairs])

    def grams(self) -> Cube | None:
        """Return those of the losses, whose tasks are sorted like the names."""
        return self.losses.grams() if isinstance(self.losses, Weighed) else None


def cluster(
    adapters: Mapping[str, Adapter],
    k: int,
    *,
    method: str,
    seed: int = 0,
    losses: Losses[str] | None = None,
    watch: Watch = iter,
    **parameters: Any,
) -> Clustering:
    """Cluster adapters (task → adapter) into at most k blocks by a partition method: `partition` by name.

    `losses` returns the loss of each (block of names, task); only some methods use losses. Raises as `partition`, and
    TaskNameError.
    """
    return clustered(adapters, k, method=method, seed=seed, losses=losses, watch=watch, **parameters)[0]


def clustered(
    adapters: Mapping[str, Adapter],
    k: int,
    *,
    method: str,
    seed: int = 0,
    losses: Losses[str] | None = None,
    watch: Watch = iter,
    **parameters: Any,
) -> tuple[Clustering, tuple[tuple[str, ...], ...]]:
    """Return the result of `cluster`, and the blocks that a search started from (of other methods, the result)."""
    known = dict(sorted(named(adapters).items()))
    names = list(known)

    of_indices = None if losses is None else _ByIndex(losses, names)
    found = partitioned(list(known.values()), k, method=method, seed=seed, losses=of_indices, watch=watch, **parameters)
    blocks, start = (
        tuple(tuple(names[i] for i in block) for block in each) for each in (found.blocks, found.start or found.blocks)
    )
    moves = tuple((i, names[task], None if beside is None else names[beside]) for i, task, beside in found.moves)
    return Clustering(blocks, method, seed, found.report, start if found.start else (), moves), start
