"""D2C: clustering by the loss of a few examples with merged adapters (arXiv 2601.17441, Algorithm 1); the search.

From a first partition, T times: a proposer returns a change, and an acceptor uses losses to take or refuse the change.
The paper's search is `uniform_move` × `moved_falls`, from a random balanced partition.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Generic, Literal

import numpy as np

from ..errors import UsageError
from ..lora.adapter import Adapter
from ..lora.algebra import gram
from ..merging.parameters import Within
from .partition_methods import (
    Losses,
    Partition,
    Partitioned,
    Task,
    Watch,
    Weighed,
    balanced,
    check_counts,
    partition,
    partition_method,
)
from .surrogate import Surrogate

ROUNDING = 1e-9  # times the number of tasks: expected gains up to this are rounding
Block = frozenset[str]
Accept = Literal["task", "both"]
Init = Literal["random", "agglomerative", "guided"]
Propose = Literal["uniform", "guided"]


@dataclass(frozen=True, slots=True)
class Change(Generic[Task]):
    """A step from one partition to another: the changed blocks, and the tasks that move."""

    places: tuple[int, ...]
    before: tuple[frozenset[Task], ...]
    after: tuple[frozenset[Task], ...]
    moved: tuple[Task, ...]


Proposer = Callable[[Sequence[frozenset[Task]], np.random.Generator, Container[Change[Task]]], "Change[Task] | None"]
"""(blocks, generator, changes refused so far) → a change, or None if there is nothing left to propose."""
Acceptor = Callable[[Change[Task], Losses[Task]], bool]


@dataclass(frozen=True, slots=True)
class Found(Generic[Task]):
    """The result of a search: the non-empty blocks, the accepted moves as (iteration, task), the number of proposals,
    the first blocks, and for every move a task of the joined block that does not move itself (None: there is none).
    """

    blocks: tuple[tuple[Task, ...], ...]
    moves: tuple[tuple[int, Task], ...]
    proposals: int
    start: tuple[tuple[Task, ...], ...]
    joined: tuple[Task | None, ...] = ()

    @property
    def accepted(self) -> int:
        """The number of accepted proposals; a swap is one proposal with two moves."""
        return len({iteration for iteration, _ in self.moves})


def moving(blocks: Sequence[frozenset[Task]], to: Mapping[Task, int]) -> Change[Task]:
    """Return the change that moves each task to the block at its new place."""
    came: list[int] = [next(place for place, block in enumerate(blocks) if task in block) for task in to]
    places = tuple(dict.fromkeys([*came, *to.values()]))
    after = (blocks[here].difference(to) | {task for task, place in to.items() if place == here} for here in places)
    return Change(places, tuple(blocks[place] for place in places), tuple(after), tuple(to))


def changed(blocks: Sequence[frozenset[Task]], change: Change[Task]) -> list[frozenset[Task]]:
    """Return the blocks after a change."""
    after = dict(zip(change.places, change.after, strict=True))
    return [after.get(place, block) for place, block in enumerate(blocks)]


def uniform_move(
    blocks: Sequence[frozenset[Task]], rng: np.random.Generator, refused: Container[Change[Task]] = ()
) -> Change[Task]:
    """Draw a move uniformly: a non-empty block, another block (possibly empty), a task of the first."""
    filled = [index for index, block in enumerate(blocks) if block]
    old = filled[rng.integers(len(filled))]
    others = [index for index in range(len(blocks)) if index != old]
    new = others[rng.integers(len(others))]
    members = sorted(blocks[old])
    return moving(blocks, {members[rng.integers(len(members))]: new})


class Guided:
    """A proposer of the move or swap with the largest gain expected by the surrogate among those not refused; None once
    no gain is expected.

    With `beyond`, changes from which a loss is expected follow, the smallest loss first; then no task is proposed for
    the same block twice.
    """

    def __init__(self, surrogate: Surrogate, *, beyond: bool = False) -> None:
        """The tasks are the indices of the surrogate's adapters."""
        self._surrogate, self._beyond = surrogate, beyond
        self._tried: set[frozenset[tuple[int, int]]] = set()

    def __call__(
        self, blocks: Sequence[frozenset[int]], rng: np.random.Generator, refused: Container[Change[int]] = ()
    ) -> Change[int] | None:
        """Return the most promising change; the generator is not used."""
        moves, swaps = self._surrogate.gains(blocks)
        home = {task: place for place, block in enumerate(blocks) for task in block}
        gains = np.concatenate([moves.ravel(), swaps.ravel()])
        for index in np.argsort(-gains, kind="stable").tolist():
            if gains[index] <= (-np.inf if self._beyond else ROUNDING * len(moves)):
                break
            if index < moves.size:
                task, place = divmod(index, len(blocks))
                to = {task: place}
            else:
                task, other = divmod(index - moves.size, len(moves))
                to = {task: home[other], other: home[task]}
            if (change := moving(blocks, to)) in refused or (tried := frozenset(to.items())) in self._tried:
                continue
            if self._beyond:
                self._tried.add(tried)
            return change
        return None


def moved_falls(change: Change[Task], losses: Losses[Task]) -> bool:
    """Return whether the summed loss of the moved tasks falls, strictly. The paper's rule."""
    pairs = [
        (next(block for block in blocks if task in block), task)
        for blocks in (change.before, change.after)
        for task in change.moved
    ]
    return _falls(losses(pairs))


def both_fall(change: Change[Task], losses: Losses[Task]) -> bool:
    """Return whether the summed loss of all members of the changed blocks falls, strictly."""
    return _falls(losses([(b, task) for blocks in (change.before, change.after) for b in blocks for task in sorted(b)]))


def _falls(values: Sequence[float]) -> bool:
    """Return whether the second half of the values, after the change, has the smaller sum."""
    half = len(values) // 2
    return sum(values[half:]) < sum(values[:half])


ACCEPTORS: Mapping[Accept, Acceptor[int]] = MappingProxyType({"task": moved_falls, "both": both_fall})


class _Spent(Exception):
    """A proposal would measure more losses than the search may."""


def search(
    tasks: Sequence[Task],
    k: int,
    losses: Losses[Task],
    *,
    iterations: int = 200,
    seed: int | tuple[int, ...] = 0,
    propose: Proposer[Task] = uniform_move,
    accept: Acceptor[Task] = moved_falls,
    start: Sequence[Sequence[Task]] | None = None,
    keep_best: bool = False,
    budget: int = 0,
    watch: Watch = iter,
) -> Found[Task]:
    """Partition tasks into at most k blocks; iteration i draws from (seed, i), so equal losses give equal searches.

    With a `budget` the search ends before proposals have requested more distinct losses than that.

    `start` replaces the random balanced partition. `keep_best` returns the partition of the lowest total loss
    Σ_t ℓ(block of t, t) seen, at the cost of measuring every task after each move. With n ≤ k every task is its own
    block. Raises UsageError for k < 1, no tasks, or a start that is not a partition of the tasks into k blocks.
    """
    names = sorted(tasks)
    check_counts(len(names), k)
    if len(names) <= k:
        own = tuple((name,) for name in names)
        return Found(own, (), 0, own)
    seeds: tuple[int, ...] = (seed,) if isinstance(seed, int) else seed
    blocks = first = _started(names, k, seed, start)
    best, lowest = blocks, total(blocks, losses) if keep_best else 0.0
    moves: list[tuple[int, Task]] = []
    joined: list[Task | None] = []
    refused: set[Change[Task]] = set()
    proposals = 0
    requested: set[tuple[frozenset[Task], Task]] = set()

    def limited(pairs: Sequence[tuple[frozenset[Task], Task]]) -> Sequence[float]:
        requested.update(pairs)
        if budget and len(requested) > budget:
            raise _Spent
        return losses(pairs)

    for i in watch(range(iterations if k > 1 else 0)):
        change = propose(blocks, np.random.default_rng([*seeds, i]), refused)
        if change is None:
            break
        try:
            taken = accept(change, limited)
        except _Spent:
            break
        proposals += 1
        if not taken:
            refused.add(change)
            continue
        blocks = changed(blocks, change)
        moves += [(i, task) for task in change.moved]
        rests = [
            next(block for block in change.after if task in block).difference(change.moved) for task in change.moved
        ]
        joined += [min(rest, default=None) for rest in rests]
        if keep_best and (now := total(blocks, losses)) < lowest:
            best, lowest = blocks, now
    return Found(_filled(best if keep_best else blocks), tuple(moves), proposals, _filled(first), tuple(joined))


def replayed(
    start: Iterable[Iterable[Task]], moves: Iterable[tuple[int, Task, Task | None]], iterations: int
) -> list[list[Task]]:
    """Return the blocks of a search after so many iterations, from its first blocks and its moves (iteration, task, a
    task of the joined block or None).
    """
    blocks: list[set[Task]] = [set(block) for block in start]
    for iteration, task, beside in moves:
        if iteration >= iterations:
            break
        for block in blocks:
            block.discard(task)
        home = next((block for block in blocks if beside in block), None)
        if home is None:
            blocks.append({task})
        else:
            home.add(task)
    return sorted(sorted(block) for block in blocks if block)


def settled(surrogate: Surrogate, blocks: Sequence[frozenset[int]]) -> Partition:
    """Make the most promising change until no gain is expected; no loss is measured."""
    propose, rng = Guided(surrogate), np.random.default_rng(0)
    while change := propose(blocks, rng):
        blocks = changed(blocks, change)
    return [sorted(block) for block in blocks]


def total(blocks: Iterable[Iterable[Task]], losses: Losses[Task]) -> float:
    """Return Σ_t ℓ(block of t, t)."""
    return sum(losses([(frozenset(block), task) for block in blocks for task in sorted(block)]))


def _filled(blocks: Iterable[Iterable[Task]]) -> tuple[tuple[Task, ...], ...]:
    return tuple(sorted(tuple(sorted(block)) for block in blocks if block))


def balanced_blocks(names: Sequence[Task], k: int, seed: int | Sequence[int]) -> list[frozenset[Task]]:
    """Return a random partition into k blocks whose sizes differ by at most one."""
    labels = balanced(len(names), k, seed)
    return [frozenset(n for n, label in zip(names, labels, strict=True) if label == c) for c in range(k)]


def _surrogate(xs: Sequence[Adapter], losses: Losses[int]) -> Surrogate:
    """Return the surrogate of what updates add to outputs, or, if the model does not show that, of the weights."""
    grams = losses.grams() if isinstance(losses, Weighed) else None
    return Surrogate(np.broadcast_to(gram(xs), (len(xs),) * 3) if grams is None else grams)


def _started(
    names: list[Task], k: int, seed: int | tuple[int, ...], start: Sequence[Sequence[Task]] | None
) -> list[frozenset[Task]]:
    if start is None:
        return balanced_blocks(names, k, seed)
    if sorted(name for block in start for name in block) != names or len(start) > k:
        what = f"the start is not a partition of the {len(names)} tasks into {k} blocks"
        raise UsageError(what, cure="give every task once, in at most that many blocks")
    blocks: list[frozenset[Task]] = [frozenset(block) for block in start]
    return blocks + [frozenset() for _ in range(k - len(start))]


@partition_method("d2c", by_loss=True, merge="ties")
def d2c(
    xs: Sequence[Adapter],
    k: int,
    seed: int,
    losses: Losses[int],
    watch: Watch,
    *,
    iterations: Annotated[int, Within(0)] = 200,
    propose: Propose = "uniform",
    accept: Accept = "task",
    init: Init = "random",
    restarts: Annotated[int, Within(0)] = 0,
    keep_best: bool = False,
    budget: Annotated[int, Within(0)] = 0,
) -> Partitioned:
    """Run Algorithm 1 on the indices of the adapters; of several starts, keep the end with the lowest total loss.

    `init` is the first start, restarts are random. "guided" proposals are moves and swaps from which the surrogate
    expects a gain, the most promising first, and under a `budget` then all others; a "guided" start has all the changes
    that the surrogate expects to gain. `budget` is the most losses that proposals may request, over all starts; 0 is no
    limit.
    """
    starts: list[Partition | None] = [None] * (restarts + 1)
    if init == "agglomerative" and len(xs) > k:
        starts[0] = partition(xs, k, method=init)
    surrogate = _surrogate(xs, losses) if "guided" in (propose, init) and len(xs) > k > 1 else None
    if surrogate and init == "guided":
        starts[0] = settled(surrogate, balanced_blocks(list(range(len(xs))), k, seed))
    found = [
        search(
            range(len(xs)),
            k,
            losses,
            iterations=iterations,
            seed=(seed, number) if number else seed,
            propose=uniform_move if surrogate is None or propose == "uniform" else Guided(surrogate, beyond=budget > 0),
            accept=ACCEPTORS[accept],
            start=start,
            keep_best=keep_best,
            budget=max(1, budget // len(starts)) if budget else 0,
            watch=watch,
        )
        for number, start in enumerate(starts)
    ]
    best = min(found, key=lambda each: total(each.blocks, losses)) if restarts else found[0]
    report = {
        "iterations": iterations,
        "propose": propose,
        "accept": accept,
        "init": init,
        "restarts": restarts,
        "keep_best": keep_best,
        "budget": budget,
        "proposals": sum(each.proposals for each in found),
        "accepted": sum(each.accepted for each in found),
    }
    first = found[0]
    moves = [(i, task, beside) for (i, task), beside in zip(first.moves, first.joined, strict=True)]
    alone = not (restarts or keep_best)  # then the moves lead to the result
    return Partitioned(
        [list(block) for block in best.blocks], report, [list(block) for block in first.start], moves if alone else []
    )
