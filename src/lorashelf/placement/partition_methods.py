"""Partition methods: registered rules that put N adapters into at most K blocks, with their declarations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from ..errors import UsageError, numbered
from ..lora.adapter import Adapter
from ..lora.algebra import trained
from ..lora.arrays import Cube
from ..lora.given import as_adapters
from ..merging.parameters import Parameter, checked, parameters_of
from ..registry import Registry

Task = TypeVar("Task", int, str)
Losses = Callable[[Sequence[tuple[frozenset[Task], Task]]], Sequence[float]]
"""The loss of each task with the merge of its block, in nats per token; tasks are names or indices of adapters."""


@runtime_checkable
class Weighed(Protocol):
    """Losses whose tasks also weigh updates, by what these add to outputs on the tasks' examples."""

    def grams(self) -> Cube | None:
        """Return G, (task, adapter, adapter): the inner products of the updates, as each task weighs them; None if the
        model does not show them.
        """
        ...


Watch = Callable[[Sequence[int]], Iterable[int]]
"""Wraps the iterations of a search, to follow their progress."""
Partition = list[list[int]]
Partitioner = Callable[[Sequence[Adapter], int, int], Sequence[int]]
"""(adapters, k, seed) → a label per adapter."""
RESERVED = frozenset({"xs", "k", "method", "seed", "losses", "watch"})


@dataclass(frozen=True, slots=True)
class Partitioned:
    """Blocks of indices, the method's report, the blocks that a search started from, and the moves that led from these
    to the result, as (iteration, task, a task of the joined block or None); empty unless they are the whole way.
    """

    blocks: Partition
    report: Mapping[str, Any] = field(default_factory=dict)
    start: Partition | None = None
    moves: Sequence[tuple[int, int, int | None]] = ()


@dataclass(frozen=True, slots=True)
class PartitionMethod:
    """A registered method: the rule and its declarations."""

    name: str
    rule: Callable[..., Partitioned]
    """(adapters, k, seed, losses, watch, **parameters) → Partitioned; `losses` is None unless it is `by_loss`."""
    by_loss: bool = False
    """Whether the method uses the losses of blocks."""
    merge: str = "linear"
    """The default merge method of the blocks."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    def checked(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters with defaults filled in. Raises UsageError naming every unknown or unusable one."""
        return checked(f"partition method {self.name}", self.parameters, parameters, "lorashelf cluster --help")

    def check_losses(self, given: bool) -> None:
        """Raise UsageError if the method uses losses and there are none."""
        if self.by_loss and not given:
            what = f"partition method {self.name} needs --examples DIR to measure the losses of blocks"
            raise UsageError(what, cure="give task folders with --examples; in Python call cluster_by_loss")


PARTITIONERS: Registry[PartitionMethod] = Registry("partition method")


def partition(
    xs: Sequence[Adapter],
    k: int,
    *,
    method: str,
    seed: int = 0,
    losses: Losses[int] | None = None,
    watch: Watch = iter,
    **parameters: Any,
) -> Partition:
    """Partition the adapters' indices into at most k non-empty blocks, each sorted, ordered by their smallest index.

    With n ≤ k every adapter is its own block. `losses` returns the loss of each (block, index); only some methods use
    losses. Raises UsageError for k < 1, no adapters, missing losses or unknown parameters; UnknownName, MissingExtra
    (`cluster`).
    """
    return partitioned(xs, k, method=method, seed=seed, losses=losses, watch=watch, **parameters).blocks


def partitioned(
    xs: Sequence[Adapter],
    k: int,
    *,
    method: str,
    seed: int = 0,
    losses: Losses[int] | None = None,
    watch: Watch = iter,
    **parameters: Any,
) -> Partitioned:
    """Return the result of `partition` with the method's report."""
    chosen, xs = PARTITIONERS[method], as_adapters(xs)
    chosen.check_losses(losses is not None)
    options = chosen.checked(parameters)
    check_counts(len(xs), k)
    return chosen.rule(xs, k, seed, losses, watch, **options)


def check_counts(n: int, k: int) -> None:
    """Raise UsageError unless there is at least one adapter and one block."""
    if k < 1 or not n:
        what = f"{numbered(n, 'adapter')} into {numbered(k, 'slot')}"
        raise UsageError(what, cure="give at least one adapter and one slot")


def blocks(effective: Sequence[bool], k: int, label: Callable[[list[int]], Sequence[int]]) -> Partition:
    """Return the blocks given by `label`, which is called only for more than k adapters; untrained adapters, which are
    similar to none, go to the first block instead of taking one.
    """
    if len(effective) <= k:
        return [[i] for i in range(len(effective))]
    chosen = [i for i, yes in enumerate(effective) if yes] or list(range(len(effective)))
    found: dict[int, list[int]] = {}
    for index, name in zip(chosen, label(chosen) if len(chosen) > k else chosen, strict=True):
        found.setdefault(int(name), []).append(index)
    first, *others = sorted(found.values())
    return sorted([sorted({*first, *range(len(effective))} - {i for block in others for i in block}), *others])


def partition_method(
    name: str, *, by_loss: bool = False, merge: str = "linear"
) -> Callable[[Callable[..., Partitioned]], Callable[..., Partitioned]]:
    """Register a rule as partition method `name`; its keyword-only parameters are the method's.

    Raises TypeError for parameters that `parameters_of` refuses, ValueError for a name already taken.
    """

    def register(rule: Callable[..., Partitioned]) -> Callable[..., Partitioned]:
        parameters = parameters_of(rule, "partition method", RESERVED)
        PARTITIONERS.add(name, PartitionMethod(name, rule, by_loss, merge, parameters))
        return rule

    return register


def partitioner(name: str, *, spread: bool = True) -> Callable[[Partitioner], Partitioner]:
    """Register a function of (adapters, k, seed) → label per adapter as partition method `name`.

    The function gets the trained adapters only. With `spread` it is not called for at most k adapters: each is its own
    block.
    """

    def register(function: Partitioner) -> Partitioner:
        def rule(xs: Sequence[Adapter], k: int, seed: int, losses: Losses[int] | None, watch: Watch) -> Partitioned:
            room = k if spread else 0
            return Partitioned(
                blocks([trained(x) for x in xs], room, lambda chosen: function([xs[i] for i in chosen], k, seed))
            )

        partition_method(name)(rule)
        return function

    return register


def balanced(n: int, k: int, seed: int | Sequence[int]) -> list[int]:
    """Return labels of a random partition of n into k blocks whose sizes differ by at most one."""
    return [int(label) for label in np.random.default_rng(seed).permutation(np.arange(n) % k)]
