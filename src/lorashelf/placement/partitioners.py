"""Offline rules: N adapters into at most K blocks. Pure functions of the adapters, a seed, and for some the losses of
blocks.

single         one block
random         balanced blocks, drawn
agglomerative  average linkage on 1 − cosine
kmeans         K-Means on the flattened factors A, B as stored (from their Gram matrix: the same distances)
kmeans_svd     K-Means on the rows of the cosine matrix of SVD features (MBC, arXiv 2405.11157)
d2c            a search by the losses of blocks (arXiv 2601.17441; placement/d2c.py)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from ..errors import MissingExtra, UsageError, numbered
from ..lora.adapter import Adapter
from ..lora.algebra import Square, trained
from ..lora.given import as_adapters
from ..lora.similarity import principal_coordinates, raw_gram, similarity
from ..merging.parameters import Parameter, checked, parameters_of
from ..registry import Registry

Task = TypeVar("Task", int, str)
Losses = Callable[[Sequence[tuple[frozenset[Task], Task]]], Sequence[float]]
"""The loss of each task under the merge of its block, in nats per token; tasks are names, or indices of adapters."""
Watch = Callable[[Sequence[int]], Iterable[int]]
"""Wraps the iterations of a search, as they are worked through."""
Partition = list[list[int]]
Partitioner = Callable[[Sequence[Adapter], int, int], Sequence[int]]
"""(adapters, k, seed) → a label per adapter."""
STARTS = 10
COPIES = 1e-3  # points nearer than this share of the largest norm are copies, apart by rounding only
RESERVED = frozenset({"xs", "k", "method", "seed", "losses", "watch"})


@dataclass(frozen=True, slots=True)
class Partitioned:
    """Blocks of indices; what the method reports of how it found them; the blocks that a search started from."""

    blocks: Partition
    report: Mapping[str, Any] = field(default_factory=dict)
    start: Partition | None = None


@dataclass(frozen=True, slots=True)
class PartitionMethod:
    """A registered method: its rule, and what it declares about itself."""

    name: str
    rule: Callable[..., Partitioned]
    """(adapters, k, seed, losses, watch, **parameters) → Partitioned; `losses` is None unless it is `by_loss`."""
    by_loss: bool = False
    """Whether it asks for the losses of blocks."""
    merge: str = "linear"
    """The merge method of its blocks where none is named."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    def checked(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters with defaults filled in. Raises UsageError naming every unknown or unusable one."""
        return checked(f"partition method {self.name}", self.parameters, parameters, "lorashelf cluster --help")

    def check_losses(self, given: bool) -> None:
        """Raise UsageError if the method asks for losses and there are none."""
        if self.by_loss and not given:
            what = f"partition method {self.name} needs --examples DIR: it asks for the losses of blocks"
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
    """Indices of the adapters in at most k non-empty blocks, each sorted, blocks by their smallest index.

    With n ≤ k every adapter is its own block. `losses` gives the loss of each (block, index); only some methods ask
    for them. Raises UsageError for k < 1, no adapters, lacking losses or unknown parameters; UnknownName, MissingExtra
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
    """As `partition`, with what the method reports."""
    chosen, xs = PARTITIONERS[method], as_adapters(xs)
    chosen.check_losses(losses is not None)
    options = chosen.checked(parameters)
    if k < 1 or not xs:
        what = f"{numbered(len(xs), 'adapter')} into {numbered(k, 'slot')}"
        raise UsageError(what, cure="give at least one adapter and one slot")
    return chosen.rule(xs, k, seed, losses, watch, **options)


def blocks(effective: Sequence[bool], k: int, label: Callable[[list[int]], Sequence[int]]) -> Partition:
    """The blocks of what `label` labels, asked only where there are more than k; untrained adapters, which are like no
    other, go to the first block rather than take one.
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

    Raises TypeError for parameters that `parameters_of` refuses, ValueError for a name that is taken.
    """

    def register(rule: Callable[..., Partitioned]) -> Callable[..., Partitioned]:
        parameters = parameters_of(rule, "partition method", RESERVED)
        PARTITIONERS.add(name, PartitionMethod(name, rule, by_loss, merge, parameters))
        return rule

    return register


def partitioner(name: str, *, spread: bool = True) -> Callable[[Partitioner], Partitioner]:
    """Register a function of (adapters, k, seed) → label per adapter as partition method `name`.

    It is given the trained adapters only. With `spread` it is not asked where there are at most k adapters: each is a
    block of its own.
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


@partitioner("single", spread=False)
def single(xs: Sequence[Adapter], k: int, seed: int) -> Sequence[int]:
    """All in one block."""
    return [0] * len(xs)


@partitioner("random")
def random(xs: Sequence[Adapter], k: int, seed: int) -> Sequence[int]:
    """A random balanced partition: block sizes differ by at most one."""
    return balanced(len(xs), k, seed)


@partitioner("agglomerative")
def agglomerative(xs: Sequence[Adapter], k: int, seed: int) -> Sequence[int]:
    """Average linkage on 1 − cosine similarity of ΔW; deterministic."""
    return average_linkage(1.0 - similarity(xs), k)


@partitioner("kmeans")
def kmeans(xs: Sequence[Adapter], k: int, seed: int) -> Sequence[int]:
    """K-Means on the flattened raw factors; coordinates from their Gram matrix have the same distances."""
    return _kmeans(principal_coordinates(raw_gram(xs)), k, seed)


@partitioner("kmeans_svd")
def kmeans_svd(xs: Sequence[Adapter], k: int, seed: int) -> Sequence[int]:
    """K-Means on the rows of the cosine matrix of SVD features (MBC)."""
    return _kmeans(similarity(xs, metric="svd_features"), k, seed)


def balanced(n: int, k: int, seed: int | Sequence[int]) -> list[int]:
    """Labels of a random partition of n into k blocks whose sizes differ by at most one."""
    return [int(label) for label in np.random.default_rng(seed).permutation(np.arange(n) % k)]


def average_linkage(distances: Square, k: int) -> list[int]:
    """Labels of k clusters by average linkage on an (n, n) matrix of distances."""
    cluster = _sklearn()
    model = cluster.AgglomerativeClustering(n_clusters=k, metric="precomputed", linkage="average")
    return [int(label) for label in model.fit_predict(np.maximum(distances, 0.0))]


def _kmeans(points: Square, k: int, seed: int) -> list[int]:
    cluster = _sklearn()
    apart = np.stack([np.linalg.norm(points - point, axis=1) for point in points])
    first = (apart <= COPIES * np.linalg.norm(points, axis=1).max()).argmax(axis=1)  # copies count as one point
    model = cluster.KMeans(n_clusters=min(k, len(np.unique(first))), n_init=STARTS, random_state=seed)
    return [int(label) for label in model.fit_predict(points[first])]


def _sklearn() -> Any:
    try:
        import sklearn.cluster
    except ImportError as error:
        raise MissingExtra("this partition method", "scikit-learn", "cluster") from error
    return sklearn.cluster
