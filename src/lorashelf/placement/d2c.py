"""D2C, clustering by what merges do to the loss of a few examples (arXiv 2601.17441, Algorithm 1): the search alone.

From a random balanced partition, T times: draw a block that has a member, another block, and a task of the first; move
the task if its loss under the merge of its new block is lower than under that of its old one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import UsageError, numbered
from .partitioners import balanced

Block = frozenset[str]
Losses = Callable[[Sequence[tuple[Block, str]]], Sequence[float]]
"""The loss of each task under the merge of its block, in nats a token."""
Accept = Literal["task", "both"]


@dataclass(frozen=True, slots=True)
class Found:
    """Where a search ended: the non-empty blocks, the moves it took as (iteration, task), and the proposals it made."""

    blocks: tuple[tuple[str, ...], ...]
    moves: tuple[tuple[int, str], ...]
    proposals: int


def search(
    tasks: Sequence[str],
    k: int,
    losses: Losses,
    *,
    iterations: int = 200,
    seed: int = 0,
    accept: Accept = "task",
    start: Sequence[Sequence[str]] | None = None,
    keep_best: bool = False,
    watch: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Found:
    """Partition tasks into at most k blocks; iteration i draws from (seed, i), so equal losses give equal searches.

    `accept` "task" is the paper's rule: the moved task's own loss must fall. "both": the summed loss of all members of
    both blocks must. `start` replaces the random balanced partition. `keep_best` returns the partition of the lowest
    total loss Σ_t ℓ(block of t, t) seen, at the cost of measuring every task after each move. With n ≤ k every task is
    its own block. Raises UsageError for k < 1, no tasks, or a start that is no partition of them into k blocks.
    """
    names = sorted(tasks)
    if k < 1 or not names:
        what = f"{numbered(len(names), 'adapter')} into {numbered(k, 'slot')}"
        raise UsageError(what, cure="give at least one adapter and one slot")
    if len(names) <= k:
        return Found(tuple((name,) for name in names), (), 0)
    blocks = _started(names, k, seed, start)
    best, lowest = list(blocks), _total(blocks, losses) if keep_best else 0.0
    moves, proposals = [], 0
    for i in watch(range(iterations if k > 1 else 0)):
        old, new, task = proposal(blocks, np.random.default_rng([seed, i]))
        proposals += 1
        changed = {old: blocks[old] - {task}, new: blocks[new] | {task}}
        if not _lower(blocks, changed, old, new, task, accept, losses):
            continue
        blocks = [changed.get(index, block) for index, block in enumerate(blocks)]
        moves.append((i, task))
        if keep_best and (total := _total(blocks, losses)) < lowest:
            best, lowest = list(blocks), total
    final = best if keep_best else blocks
    return Found(tuple(sorted(tuple(sorted(block)) for block in final if block)), tuple(moves), proposals)


def proposal(blocks: Sequence[Block], rng: np.random.Generator) -> tuple[int, int, str]:
    """A move drawn uniformly: a block with members, another block (it may be empty), a task of the first."""
    filled = [index for index, block in enumerate(blocks) if block]
    old = filled[rng.integers(len(filled))]
    others = [index for index in range(len(blocks)) if index != old]
    new = others[rng.integers(len(others))]
    members = sorted(blocks[old])
    return old, new, members[rng.integers(len(members))]


def _started(names: list[str], k: int, seed: int, start: Sequence[Sequence[str]] | None) -> list[Block]:
    if start is None:
        labels = balanced(len(names), k, seed)
        return [frozenset(n for n, label in zip(names, labels, strict=True) if label == c) for c in range(k)]
    if sorted(name for block in start for name in block) != names or len(start) > k:
        raise UsageError(f"the start is no partition of the {len(names)} tasks into {k} blocks")
    return [*(frozenset(block) for block in start), *[Block()] * (k - len(start))]


def _lower(
    blocks: Sequence[Block], changed: dict[int, Block], old: int, new: int, task: str, accept: Accept, losses: Losses
) -> bool:
    """Whether the move lowers the loss that `accept` names, strictly."""
    if accept == "task":
        before, after = losses([(blocks[old], task), (changed[new], task)])
        return after < before
    asked = [(block, t) for block in (blocks[old], blocks[new]) for t in sorted(block)]
    asked += [(block, t) for block in (changed[old], changed[new]) for t in sorted(block)]
    values = list(losses(asked))
    return sum(values[len(values) // 2 :]) < sum(values[: len(values) // 2])


def _total(blocks: Iterable[Block], losses: Losses) -> float:
    return sum(losses([(block, task) for block in blocks for task in sorted(block)]))
