"""A clustering: tasks in blocks that share an adapter each, and how they were found; whichever method found them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError, numbered
from ..lora.adapter import Adapter
from ..merging.blocks import named
from .partition_methods import Losses, Watch
from .partitioners import partitioned


@dataclass(frozen=True, slots=True)
class Clustering:
    """Blocks of task names, the method and the seed that found them, and what it reports (JSON values)."""

    blocks: tuple[tuple[str, ...], ...]
    method: str
    seed: int | None = None
    report: Mapping[str, Any] = field(default_factory=dict)

    def check(self, tasks: Sequence[str], k: int) -> None:
        """Raise UsageError unless the blocks hold every task once, and are at most k, none empty."""
        listed = sorted(task for block in self.blocks for task in block)
        if listed != sorted(tasks) or not all(self.blocks):
            astray = sorted({*listed} ^ {*tasks}) if listed else ["it is empty"]
            why = ", ".join(astray) or "it has a task twice, or an empty block"
            raise UsageError(
                f"the clustering is not one of these adapters: {why}",
                cure="cluster the adapters that are to be stored, by the same names",
            )
        if len(self.blocks) > k:
            what = f"the clustering has {len(self.blocks)} blocks, the shelf {numbered(k, 'slot')}"
            raise UsageError(what, cure=f"cluster into {numbered(k, 'slot')}, or give the shelf more")


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
    """The adapters (task → adapter) in at most k blocks, by a partition method; `partition` on names.

    `losses` gives the loss of each (block of names, task); only some methods ask for them. Raises as `partition`, and
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
    """As `cluster`, with the blocks that a search started from; of other methods those it found."""
    known = dict(sorted(named(adapters).items()))
    names = list(known)

    def by_name(pairs: Sequence[tuple[frozenset[int], int]]) -> Sequence[float]:
        assert losses is not None
        return losses([(frozenset(names[i] for i in block), names[task]) for block, task in pairs])

    of_indices = None if losses is None else by_name
    found = partitioned(list(known.values()), k, method=method, seed=seed, losses=of_indices, watch=watch, **parameters)
    blocks, start = (
        tuple(tuple(names[i] for i in block) for block in each) for each in (found.blocks, found.start or found.blocks)
    )
    return Clustering(blocks, method, seed, found.report), start
